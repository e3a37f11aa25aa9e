"""Which sessions run next: first come, first served within a model, the models in turn."""

from collections import OrderedDict, deque
from collections.abc import Sequence

from conveyor_server.core import ModelKey
from conveyor_server.sessions.session import Session


class ReadyQueues:
    """Sessions with a chunk to run, by model."""

    def __init__(self, batch_sessions_max: int, quantum_steps: int) -> None:
        """Bounds of one tick."""
        self._batch_sessions_max = batch_sessions_max
        self._quantum_steps = quantum_steps
        self._queues: OrderedDict[ModelKey, deque[Session]] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._queues)

    def add(self, session: Session) -> None:
        """Puts a session at the end of its model's queue, unless it is in it."""
        if session.ready:
            return
        session.ready = True
        queue = self._queues.get(session.model.key)
        if queue is None:
            queue = self._queues[session.model.key] = deque()
        queue.append(session)

    def add_turn(self, key: ModelKey) -> None:
        """Gives a model a turn, though perhaps no session of it waits."""
        if key not in self._queues:
            self._queues[key] = deque()

    def discard(self, session: Session) -> None:
        """Takes a session out, if it is in.

        Its place in the queue is passed over when its turn comes.
        """
        session.ready = False

    def put_back(self, sessions: Sequence[Session]) -> None:
        """Puts sessions of one model that were taken in vain before all others of it."""
        for session in reversed(sessions):
            session.ready = True
            self._queues.setdefault(session.model.key, deque()).appendleft(session)

    def take(self) -> tuple[ModelKey, list[Session]] | None:
        """Takes the next model's sessions for one tick, none or more.

        That model then waits for all the others.
        """
        if not self._queues:
            return None
        key, queue = self._queues.popitem(last=False)
        taken: list[Session] = []
        while queue and len(taken) < self._batch_sessions_max:
            session = queue.popleft()
            if session.ready:
                session.ready = False
                taken.append(session)
        if queue:
            self._queues[key] = queue
        return key, taken

    def quantum(self, steps_left: int) -> int:
        """How many of a chunk's steps run in this tick.

        A longer chunk shares the device with everybody else's quantum by quantum, so it delays
        nobody by more than one.
        """
        return min(steps_left, self._quantum_steps)
