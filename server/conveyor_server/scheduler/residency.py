"""Which sessions have their carry on the device, and what becomes of the others."""

from collections import OrderedDict, defaultdict
from collections.abc import Collection, Iterable, Iterator

from conveyor_server.core import ModelKey, SessionKey, Tier
from conveyor_server.engine.port import Engine
from conveyor_server.errors import ConveyorError, SnapshotCorrupt
from conveyor_server.metrics import Metrics
from conveyor_server.scheduler.memories import Memories
from conveyor_server.sessions.session import Session
from conveyor_server.store.checkpoint import Checkpoint, Header, decode, encode
from conveyor_server.store.port import CarryStore


class Residency:
    """Hands out slots.

    When none is free, another session is paged out to make one: see `victims`.
    """

    def __init__(
        self, engine: Engine, store: CarryStore, memories: Memories, metrics: Metrics
    ) -> None:
        """`store` takes what is paged out."""
        self._engine = engine
        self._memories = memories
        self._store = store
        self._metrics = metrics
        # Least recently stepped first.
        self._resident: defaultdict[ModelKey, OrderedDict[SessionKey, Session]] = defaultdict(
            OrderedDict
        )

    def resident(self, key: ModelKey) -> int:
        """Sessions of a model with a slot."""
        return len(self._resident.get(key, ()))

    def victims(self, key: ModelKey, candidates: Iterable[Session]) -> Iterator[Session]:
        """Yields each session with a slot, in the order in which one tick pages them out.

        First those with nothing to do, the one stepped longest ago first. If more sessions are busy
        than there are slots, they come up in turn, and the one stepped longest ago is the next to
        be wanted; so among the busy ones the one stepped last goes first, and the tick's own
        candidates after all others.
        """
        resident = list(self._resident.get(key, OrderedDict[SessionKey, Session]()).values())
        yield from (each for each in resident if not each.queue)
        wanted = set(candidates)
        busy = [each for each in reversed(resident) if each.queue]
        yield from (each for each in busy if each not in wanted)
        yield from (each for each in busy if each in wanted)

    def bring_in(
        self, session: Session, keep: Collection[Session], victims: Iterator[Session]
    ) -> bool:
        """Gives a session a slot with its carry in it.

        Args:
            session: Any.
            keep: Sessions that must not be paged out for it.
            victims: From `victims`, the same for all sessions of a tick.

        Returns:
            Whether that was possible: False if every slot is needed by `keep`.

        Raises:
            SnapshotCorrupt: The session's record is damaged; nothing was changed.
            EngineFailed, DeviceOutOfMemory: A carry or a memory could not be moved; the session is
                where it was.
        """
        key = session.model.key
        if session.slot is None:
            carry = self._stored(session)
            slot = self._free_slot(key, keep, victims)
            if slot is None:
                return False
            self._fill(session, slot, carry)
        self._resident[key].move_to_end(session.key)
        return True

    def page_out(self, session: Session) -> None:
        """Moves a carry from the device to the store."""
        assert session.slot is not None
        assert not session.running
        self._store.put(session.key, encode(self.checkpoint(session)))
        session.paged_tier = Tier.HOST
        self._release(session)
        self._metrics.page_outs.add(1, session.model.key.name)

    def checkpoint(self, session: Session) -> Checkpoint:
        """A session's state, wherever it lies, without what it attends over.

        Raises:
            SnapshotCorrupt: Its record is damaged.
            EngineFailed: It could not be read from the device.
        """
        carry = self._carry(session)
        return Checkpoint(_header(session), carry)

    def place(self, session: Session, carry: bytes, step: int) -> None:
        """Gives a new session a carry, in the store: it may wait long for its next step.

        Before its first step it has the initial one, which the engine knows and a record need not.
        """
        if not step:
            return
        session.applied = step
        self._store.put(session.key, encode(Checkpoint(_header(session), carry)))
        session.paged_tier = Tier.HOST

    def clear(self, session: Session) -> None:
        """Makes a session's carry the initial one."""
        if session.slot is not None:
            self._engine.reset(session.model.key, session.slot)
        self._store.delete(session.key)
        session.paged_tier = Tier.UNSET

    def drop(self, session: Session) -> None:
        """A session ended: frees its slot or its record."""
        if session.slot is not None:
            self._release(session)
        self._store.delete(session.key)
        session.paged_tier = Tier.UNSET

    def _carry(self, session: Session) -> bytes:
        if session.slot is not None:
            return self._engine.read(session.model.key, session.slot)
        # Zeros stand for the initial carry, whatever it is: see `place`.
        return self._stored(session) or bytes(session.model.carry_bytes)

    def _stored(self, session: Session) -> bytes | None:
        """The carry in a session's record; None if the session was never stepped."""
        if session.paged_tier is Tier.UNSET:
            return None
        try:
            checkpoint = decode(self._store.get(session.key))
        except ConveyorError as error:
            raise _damaged(session) from error
        header = checkpoint.header
        written = (header.principal, header.session_id, header.model_digest, header.step)
        if written != (*session.key, session.model.digest, session.applied):
            raise _damaged(session)
        if header.carry_bytes != session.model.carry_bytes:
            raise _damaged(session)
        return checkpoint.carry

    def _free_slot(
        self, key: ModelKey, keep: Collection[Session], victims: Iterator[Session]
    ) -> int | None:
        slot = self._engine.acquire(key)
        if slot is not None:
            return slot
        victim = next(
            (each for each in victims if each not in keep and each.slot is not None), None
        )
        if victim is None:
            return None
        self.page_out(victim)
        slot = self._engine.acquire(key)
        assert slot is not None
        return slot

    def _fill(self, session: Session, slot: int, carry: bytes | None) -> None:
        key = session.model.key
        try:
            if carry is not None:
                self._engine.write(key, slot, carry)
            self._memories.bring_in(session.memory)
        except ConveyorError:
            self._engine.release(key, slot)
            raise
        if carry is not None:
            self._store.delete(session.key)
            session.paged_tier = Tier.UNSET
            self._metrics.page_ins.add(1, key.name)
        session.slot = slot
        self._resident[key][session.key] = session

    def _release(self, session: Session) -> None:
        assert session.slot is not None
        self._engine.release(session.model.key, session.slot)
        session.slot = None
        self._memories.release(session.memory)
        resident = self._resident[session.model.key]
        del resident[session.key]
        if not resident:
            del self._resident[session.model.key]


def _header(session: Session) -> Header:
    return Header(
        session_id=session.session_id,
        principal=session.principal,
        model=session.model.key.name,
        version=session.model.key.version,
        model_digest=session.model.digest,
        epoch=session.epoch,
        step=session.applied,
        carry_bytes=session.model.carry_bytes,
    )


def _damaged(session: Session) -> SnapshotCorrupt:
    return SnapshotCorrupt(
        f"the state of session {session.session_id!r} after step {session.applied} was paged out"
        " and its record is damaged; reset or close the session",
        applied_step=session.applied,
    )
