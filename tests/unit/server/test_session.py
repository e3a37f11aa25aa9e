"""What becomes of the chunk at the head of a session's queue."""

import pytest

from conveyor_server.core import Chunk, OutputMode, Piece, SessionState
from conveyor_server.errors import ConveyorError, StepConflict, StepGap, StepResultNotHeld
from conveyor_server.sessions.held import HeldResults
from conveyor_server.sessions.session import Session
from tests.support.models import FEATURES
from tests.support.replies import Recorder
from tests.support.rig import rows_of

ROW = FEATURES.output_row_bytes


def session_at(applied: int, *, held_steps: int = 8, last_only: bool = False) -> Session:
    """A session whose step n had the input n, and the output byte n repeated."""
    session = Session(
        session_id="s",
        principal="ann",
        model=FEATURES,
        idle_seconds=10.0,
        lifetime_seconds=100.0,
        created_monotonic=50.0,
        created_wall=5_000.0,
        active_monotonic=50.0,
        held=HeldResults(held_steps, 10**9),
    )
    for step in range(1, applied + 1, 2):
        steps = range(step, min(step + 2, applied + 1))
        outputs = steps[-1:] if last_only else steps
        rows = b"".join(bytes([each]) * ROW for each in outputs)
        session.held.add(step, len(steps), rows_of(FEATURES, *steps), rows, len(outputs))
        session.applied += len(steps)
    return session


def chunk(
    first_step: int,
    *values: int,
    output: OutputMode = OutputMode.ALL,
    done: int = 0,
) -> Chunk:
    return Chunk(
        session_id="s",
        principal="ann",
        model=FEATURES,
        epoch=1,
        first_step=first_step,
        length=len(values),
        rows=rows_of(FEATURES, *values),
        output=output,
        reply=Recorder(),
        arrived_seconds=0.0,
        done=done,
    )


def output_rows(*steps: int) -> bytes:
    return b"".join(bytes([step]) * ROW for step in steps)


# Applied: 6 steps, in runs of two, the newest 8 held.
RUNS = [
    ("the next step", chunk(7, 7)),
    ("the next steps", chunk(7, 7, 8, 9)),
    ("what is left of a chunk half done", chunk(5, 5, 6, 7, done=2)),
]
ANSWERED = [
    ("the last step", chunk(6, 6), Piece(6, 1, output_rows(6), 1, True)),
    ("all steps", chunk(1, *range(1, 7)), Piece(1, 6, output_rows(*range(1, 7)), 6, True)),
    ("across runs", chunk(2, 2, 3), Piece(2, 2, output_rows(2, 3), 2, True)),
    ("the first part of a chunk", chunk(5, 5, 6, 7), Piece(5, 2, output_rows(5, 6), 2, False)),
    ("only the last row", chunk(3, 3, 4, 5, output=OutputMode.LAST),
     Piece(3, 3, output_rows(5), 1, True)),
    ("the last row is yet to run", chunk(5, 5, 6, 7, output=OutputMode.LAST),
     Piece(5, 2, b"", 0, False)),
    ("no row", chunk(3, 3, 4, output=OutputMode.NONE), Piece(3, 2, b"", 0, True)),
    ("a part of a chunk half done", chunk(4, 4, 5, 6, 7, done=1),
     Piece(5, 2, output_rows(5, 6), 2, False)),
]  # fmt: skip
REFUSED: list[tuple[str, Chunk, type[ConveyorError]]] = [
    ("a step left out", chunk(8, 8), StepGap),
    ("many left out", chunk(1_000_000, 8), StepGap),
    ("another payload", chunk(6, 60), StepConflict),
    ("another payload in the middle", chunk(3, 3, 40, 5), StepConflict),
    ("another payload before new steps", chunk(5, 5, 60, 7), StepConflict),
]


@pytest.mark.parametrize(("what", "given"), RUNS, ids=[row[0] for row in RUNS])
def test_runs(what: str, given: Chunk) -> None:
    assert session_at(6).settle(given) is None


@pytest.mark.parametrize(("what", "given", "piece"), ANSWERED, ids=[row[0] for row in ANSWERED])
def test_answered_from_memory(what: str, given: Chunk, piece: Piece) -> None:
    piece.duplicate = True
    assert session_at(6).settle(given) == piece


@pytest.mark.parametrize(("what", "given", "error"), REFUSED, ids=[row[0] for row in REFUSED])
def test_refused(what: str, given: Chunk, error: type[ConveyorError]) -> None:
    session = session_at(6)
    with pytest.raises(error):
        session.settle(given)
    assert session.applied == 6
    assert session.settle(chunk(7, 7)) is None


def test_a_gap_names_the_expected_step() -> None:
    with pytest.raises(StepGap) as caught:
        session_at(6).settle(chunk(9, 9))
    assert caught.value.metadata["expected_step"] == "7"


def test_a_forgotten_result_is_not_made_up() -> None:
    session = session_at(6, held_steps=2)
    assert session.settle(chunk(5, 5, 6)) is not None
    with pytest.raises(StepResultNotHeld):
        session.settle(chunk(4, 4, 5))
    with pytest.raises(StepResultNotHeld):
        session.settle(chunk(4, 4, output=OutputMode.NONE))


def test_a_row_that_was_never_asked_for_is_not_made_up() -> None:
    session = session_at(6, last_only=True)
    with pytest.raises(StepResultNotHeld):
        session.settle(chunk(5, 5, 6))
    answered = session.settle(chunk(5, 5, 6, output=OutputMode.LAST))
    assert answered is not None
    assert answered.rows == output_rows(6)


def test_a_session_is_active_while_something_waits_or_runs() -> None:
    session = session_at(0)
    assert session.state is SessionState.IDLE
    session.queue.append(chunk(1, 1))
    assert session.state is SessionState.ACTIVE
    session.queue.clear()
    session.running = True
    assert session.state is SessionState.ACTIVE
    session.quarantined = True
    assert session.state is SessionState.QUARANTINED


def test_a_lease_ends_after_the_idle_time_or_the_lifetime() -> None:
    session = session_at(0)
    assert session.lease_ends == 60.0
    session.active_monotonic = 145.0
    assert session.lease_ends == 150.0


def test_wall_times_are_reckoned_from_the_monotonic_ones() -> None:
    session = session_at(0)
    session.active_monotonic = 53.0
    view = session.view(55.0)
    assert (view.create_seconds, view.active_seconds, view.expire_seconds) == (5000, 5003, 5013)
