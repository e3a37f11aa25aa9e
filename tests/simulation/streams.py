"""Those who hear what the server says, and check that it may say so."""

from conveyor_server.core import Chunk, Piece
from conveyor_server.errors import ConveyorError, SessionEnded
from tests.simulation.reasons import justify_end, justify_failure
from tests.simulation.world import Caller, World


class Stream(Caller):
    """A caller: a stream that owns sessions, or a call that waits for one answer."""

    def __init__(self, world: World, principal: str) -> None:
        super().__init__(principal)
        self._world = world

    def piece(self, chunk: Chunk, piece: Piece) -> None:
        """Some steps were answered."""
        super().piece(chunk, piece)
        world = self._world
        expected = world.live.get((chunk.principal, chunk.session_id))
        assert expected is not None, "a session that is over was stepped"
        if chunk.epoch:
            assert world.unanswered[chunk] is expected, "a chunk ran on a later session of its id"
            assert chunk.epoch == expected.epoch, "a chunk of a lost claim was run"
        if chunk.reply in world.streams:
            assert expected.owner is chunk.reply, "run for a stream that gave the session back"
        expected.take(chunk, piece)
        world.ended["duplicate" if piece.duplicate else "applied"] += 1
        world.ended["traced"] += piece.trace is not None
        if not piece.duplicate:
            expected.touched = world.now
        if piece.final:
            world.settled(chunk)

    def failed(self, chunk: Chunk, first_step: int, error: ConveyorError) -> None:
        """A chunk was refused, or ended before its end."""
        super().failed(chunk, first_step, error)
        world = self._world
        key = (chunk.principal, chunk.session_id)
        expected = world.live.get(key)
        justify_failure(world, expected, chunk, first_step, error)
        world.ended[error.reason] += 1
        world.settled(chunk)
        if expected is not None:
            expected.planned = {}

    def lost(self, session_id: str, epoch: int, applied_step: int, error: ConveyorError) -> None:
        """It was told that a session is no longer its own."""
        super().lost(session_id, epoch, applied_step, error)
        world = self._world
        claim = self.claims.pop(session_id)
        expected = claim.session
        assert world.holds(self, claim)
        assert (epoch, applied_step) == (claim.epoch, expected.applied)
        expected.owner = None
        if isinstance(error, SessionEnded):
            justify_end(world, expected, error)
        else:
            assert error.reason == "SESSION_SUPERSEDED"
            assert world.dropping == expected.key
