"""How a session comes into being, be it opened, forked or imported."""

import uuid

from conveyor_server.core import ModelInfo
from conveyor_server.errors import ModelNotStreamable, SessionExists
from conveyor_server.scheduler.scheduler import Scheduler
from conveyor_server.sessions.held import HeldResults
from conveyor_server.sessions.memory import SharedMemory
from conveyor_server.sessions.session import Session


class Creation:
    """Makes sessions at step 0 that nobody owns yet."""

    def __init__(self, scheduler: Scheduler) -> None:
        """`scheduler` takes in what is made."""
        self._scheduler = scheduler

    def free_id(self, principal: str, session_id: str) -> str:
        """The wanted id, or one made up where none is wanted.

        Raises:
            SessionExists: There is a session of that id.
        """
        if not session_id:
            return uuid.uuid4().hex
        if self._scheduler.sessions.find((principal, session_id)) is not None:
            raise SessionExists(f"session {session_id!r} exists already; take another id")
        return session_id

    def memory(self, model: ModelInfo, rows: bytes) -> SharedMemory | None:
        """What a session attends over that was forked from none; None without attention.

        Raises:
            MemoryTooLarge: The server has no room for it.
        """
        if not rows:
            return None
        self._scheduler.memories.check_room(rows)
        return self._scheduler.memories.make(model, rows)

    def session(
        self,
        principal: str,
        session_id: str,
        model: ModelInfo,
        idle_seconds: float,
        *,
        labels: tuple[tuple[str, str], ...] = (),
        ephemeral: bool = False,
        memory: SharedMemory | None = None,
    ) -> Session:
        """Makes a session; that its id is free and that there is room was checked before."""
        limits = self._scheduler.limits
        now = self._scheduler.clock.monotonic()
        session = Session(
            session_id=session_id,
            principal=principal,
            model=model,
            idle_seconds=min(idle_seconds, limits.idle_seconds_max),
            lifetime_seconds=limits.lifetime_seconds_max,
            created_monotonic=now,
            created_wall=self._scheduler.clock.wall(),
            active_monotonic=now,
            held=HeldResults(limits.held_results_steps_max, limits.held_results_bytes_max),
            labels=labels,
            ephemeral=ephemeral,
            memory=memory,
        )
        self._scheduler.sessions.add(session)
        self._scheduler.memories.attend(memory)
        self._scheduler.models.session_began(model.key)
        return session


def check_streamable(model: ModelInfo) -> None:
    """Raises `ModelNotStreamable` if the model needs a sequence's end before its first output."""
    if not model.streamable:
        layers = ", ".join(
            f"{number} ({layer.direction})"
            for number, layer in enumerate(model.layers)
            if layer.direction != "forward"
        )
        raise ModelNotStreamable(
            f"model {model.key.name!r} cannot be stepped: it has layers that run from the end of a"
            f" sequence ({layers}); use Predict",
            layers=layers,
        )
