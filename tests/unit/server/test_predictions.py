"""Whole sequences: a slice at a time, in turn with everybody, bounded, and given up in time."""

import itertools
from collections.abc import Callable

import pytest

from conveyor_server.core import ModelKey, WholeSequence
from conveyor_server.errors import ConveyorError, EngineFailed, InboxFull, ServerDraining
from tests.support.engine import whole
from tests.support.models import BOTHWAYS, FEATURES
from tests.support.replies import Recorder
from tests.support.rig import Rig, rows_of

Outcomes = list[bytes | ConveyorError]


def rig(**limits: int) -> Rig:
    return Rig((FEATURES, BOTHWAYS), quantum_steps=4, **limits)


def begin(
    it: Rig, length: int, outputs: int | None = None, due: float | None = None
) -> tuple[WholeSequence, Outcomes]:
    outcomes: Outcomes = []
    rows = rows_of(BOTHWAYS, *range(length))
    wanted = length if outputs is None else outputs
    now = it.clock.monotonic()
    sequence = WholeSequence(BOTHWAYS, rows, length, wanted, outcomes.append, now, due)
    it.operations.predict(sequence)
    return sequence, outcomes


@pytest.mark.parametrize("outputs", [0, 1, 7])
def test_a_sequence_runs_in_slices_of_a_quantum(outputs: int) -> None:
    it = rig()
    _, outcomes = begin(it, 7, outputs)
    it.run()
    expected = whole(BOTHWAYS, rows_of(BOTHWAYS, *range(7)))
    assert outcomes == [b"".join(expected[7 - outputs :])]
    assert [steps for _, steps in it.engine.slices] == [4] * 5 + [1]  # 7 steps of 3 layers
    assert it.scheduler.inbox.chunks == it.scheduler.inbox.size_bytes == 0
    assert not it.models.sessions[BOTHWAYS.key]


def test_sequences_and_sessions_take_turns() -> None:
    it = rig()
    it.open()
    reply = Recorder()
    it.send("s", 1, list(range(40)), reply)
    begin(it, 20)
    order: list[ModelKey] = []
    while (turn := it.scheduler.begin()) is not None:
        order.append(turn.model)
        it.scheduler.finish(turn, it.scheduler.execute(turn))
    together = order[: 2 * 10]  # until the session's ten quanta are through
    assert all(first != second for first, second in itertools.pairwise(together))
    assert order.count(BOTHWAYS.key) == 15


def test_a_short_sequence_overtakes_a_long_one_and_no_more_are_begun_than_may_be() -> None:
    it = rig(running_predictions_max=2)
    _, long = begin(it, 100)
    _, short = begin(it, 1)
    _, third = begin(it, 1)
    assert it.scheduler.predictions.waiting == 3
    it.scheduler.tick()
    assert (it.scheduler.predictions.running, it.scheduler.predictions.waiting) == (2, 1)
    while not third:
        it.scheduler.tick()
    assert short
    assert not long
    it.run()
    assert long


def test_their_number_and_bytes_are_bounded() -> None:
    it = rig(predictions_max=2, inbox_bytes_max=1024)
    begin(it, 1)
    with pytest.raises(InboxFull) as caught:
        begin(it, 128)  # 1024 bytes
    assert caught.value.metadata["limit"] == "limits.inbox_bytes_max"
    begin(it, 1)
    with pytest.raises(InboxFull) as caught:
        begin(it, 1)
    assert caught.value.metadata["limit"] == "limits.predictions_max"
    it.run()
    begin(it, 1)


def _failing(it: Rig, sequence: WholeSequence) -> None:
    it.engine.fail_next = [EngineFailed("broken")]


def _late(it: Rig, sequence: WholeSequence) -> None:
    it.clock.advance(1.5)


def _given_up(it: Rig, sequence: WholeSequence) -> None:
    it.operations.drop_prediction(sequence)
    it.operations.drop_prediction(sequence)


@pytest.mark.parametrize("ticks", [0, 1, 2])
@pytest.mark.parametrize(
    ("end", "reason"),
    [(_failing, "ENGINE_FAILED"), (_late, "DEADLINE_EXCEEDED"), (_given_up, "")],
)
def test_one_that_ends_early_leaves_the_others_alone(
    ticks: int, end: Callable[[Rig, WholeSequence], None], reason: str
) -> None:
    it = rig(running_predictions_max=1)
    sequence, outcomes = begin(it, 20, due=it.clock.monotonic() + 1.0)
    _, other = begin(it, 3)
    for _ in range(ticks):
        it.scheduler.tick()
    end(it, sequence)
    it.run()
    found = [each.reason for each in outcomes if isinstance(each, ConveyorError)]
    assert found == [reason] * bool(reason)
    assert len(outcomes) == len(found)
    assert other == [b"".join(whole(BOTHWAYS, rows_of(BOTHWAYS, 0, 1, 2)))]
    assert it.scheduler.inbox.chunks == 0
    assert not it.models.sessions[BOTHWAYS.key]


def test_none_is_begun_while_the_server_stops_or_on_a_model_that_went() -> None:
    it = rig()
    it.models.retire(BOTHWAYS.key)
    with pytest.raises(ConveyorError) as caught:
        begin(it, 1)
    assert caught.value.reason == "MODEL_NOT_FOUND"
    it.operations.draining = True
    with pytest.raises(ServerDraining):
        begin(it, 1)


def test_a_model_stays_until_its_last_sequence_is_through() -> None:
    it = rig()
    _, outcomes = begin(it, 2)
    it.models.retire(BOTHWAYS.key)
    assert it.dropped == []
    it.run()
    assert isinstance(outcomes[0], bytes)
    assert it.dropped == [BOTHWAYS.key]
