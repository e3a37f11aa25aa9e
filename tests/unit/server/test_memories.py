"""What sessions attend over: who may bring what, who shares it and where it lies."""

from dataclasses import replace

import pytest

from conveyor_server.core import MemoryRows, ModelInfo, OpenMode
from conveyor_server.errors import ConveyorError, DeviceOutOfMemory, SnapshotIncompatible
from conveyor_server.store.checkpoint import decode
from tests.support.engine import straight_through
from tests.support.models import ATTENTIVE, FEATURES
from tests.support.rig import Rig, rows_of

ROW = bytes(range(1, 13))
"""Three numbers, as one row of the model's memory has them."""


def memory(rows: int, length: int | None = None) -> MemoryRows:
    return MemoryRows(rows if length is None else length, ROW * rows)


def rig(**limits: int) -> Rig:
    return Rig((ATTENTIVE, FEATURES), slots=2, **limits)


WRONG: list[tuple[str, ModelInfo, MemoryRows | None, str]] = [
    ("none where one is needed", ATTENTIVE, None, "INVALID_MEMORY"),
    ("one where none is needed", FEATURES, memory(1), "INVALID_MEMORY"),
    ("no row", ATTENTIVE, memory(0), "INVALID_MEMORY"),
    ("fewer rows than none", ATTENTIVE, memory(1, -1), "INVALID_MEMORY"),
    ("a row short", ATTENTIVE, memory(2, 3), "INVALID_SHAPE"),
    ("a row over", ATTENTIVE, memory(3, 2), "INVALID_SHAPE"),
    ("a byte short", ATTENTIVE, MemoryRows(1, ROW[1:]), "INVALID_SHAPE"),
    ("a row too many", ATTENTIVE, memory(6), "MEMORY_TOO_LARGE"),
    ("rows beyond counting", ATTENTIVE, memory(1, 2**62), "MEMORY_TOO_LARGE"),
]


@pytest.mark.parametrize(("what", "model", "given", "reason"), WRONG, ids=[w[0] for w in WRONG])
def test_a_wrong_memory_opens_nothing(
    what: str, model: ModelInfo, given: MemoryRows | None, reason: str
) -> None:
    it = rig()
    with pytest.raises(ConveyorError) as caught:
        it.open(model=model.key.name, memory=given)
    assert caught.value.reason == reason
    assert len(it.scheduler.sessions) == 0
    assert it.scheduler.memories.size_bytes == 0
    assert not it.models.sessions[model.key]


def test_a_memory_of_as_many_rows_as_may_be_is_taken() -> None:
    view = rig().open(memory=memory(5)).view
    assert view.memory_rows == 5
    assert view.state_bytes == ATTENTIVE.carry_bytes + 5 * len(ROW)


def test_a_memory_decides_what_comes_out() -> None:
    it = rig()
    for name, rows in (("one", 1), ("two", 2)):
        it.open(name, memory=memory(rows))
        expected, _ = straight_through(ATTENTIVE, rows_of(ATTENTIVE, 1, 2), memory=ROW * rows)
        assert it.step(name, 1, [1, 2]) == b"".join(expected)


def test_forks_share_it_until_the_last_one_ends() -> None:
    it = rig()
    it.open(memory=memory(3))
    it.step("s", 1, [1])
    it.fork("s", "a", "b")
    assert it.scheduler.memories.size_bytes == 3 * len(ROW)
    for name in ("s", "a"):
        it.close(name)
        assert it.step("b", 2, [2]) if name == "s" else it.step("b", 3, [3])
        assert list(it.engine.memories[ATTENTIVE.key].values()) == [ROW * 3]
    it.close("b")
    assert not it.engine.memories[ATTENTIVE.key]
    assert it.scheduler.memories.size_bytes == it.scheduler.memories.device_bytes == 0


def test_it_leaves_the_device_with_the_last_of_its_sessions() -> None:
    it = rig()
    for name in ("a", "b", "c"):
        it.open(name, memory=memory(1))
        it.step(name, 1, [1])
    assert len(it.engine.memories[ATTENTIVE.key]) == 2
    assert it.scheduler.memories.device_bytes == 2 * len(ROW)
    assert it.scheduler.memories.size_bytes == 3 * len(ROW)
    assert it.step("a", 2, [2])  # paged in again, what it attends over too


def test_one_that_does_not_get_onto_the_device_changes_nothing() -> None:
    it = rig()
    it.open(memory=memory(2))
    it.engine.fail_next_memory = [DeviceOutOfMemory("fake")]
    with pytest.raises(DeviceOutOfMemory):
        it.step("s", 1, [1])
    assert it.engine.slots_used(ATTENTIVE.key) == 0
    expected, _ = straight_through(ATTENTIVE, rows_of(ATTENTIVE, 1), memory=ROW * 2)
    assert it.step("s", 1, [1]) == b"".join(expected)


def test_a_resume_may_repeat_it_and_not_change_it() -> None:
    it = rig()
    it.open(memory=memory(2))
    assert it.open(mode=OpenMode.RESUME, memory=memory(2)).resumed
    epoch = it.open(mode=OpenMode.RESUME).view.epoch
    with pytest.raises(ConveyorError) as caught:
        it.open(memory=memory(1))
    assert caught.value.reason == "SESSION_MISMATCH"
    assert it.view().epoch == epoch
    it.open("plain", model=FEATURES.key.name)
    with pytest.raises(ConveyorError) as caught:
        it.open("plain", model=FEATURES.key.name, memory=memory(1))
    assert caught.value.reason == "SESSION_MISMATCH"


def test_a_reset_leaves_it() -> None:
    it = rig()
    it.open(memory=memory(2))
    first = it.step("s", 1, [1])
    assert it.reset().memory_rows == 2
    assert it.step("s", 1, [1]) == first


def test_snapshots_hold_it_and_pages_do_not() -> None:
    it = rig()
    it.open(memory=memory(4))
    it.step("s", 1, [1])
    snapshot = it.export()
    assert decode(snapshot).memory == ROW * 4
    view = it.operations.import_("bob", decode(snapshot), "new", 10.0)
    assert (view.memory_rows, view.applied_step) == (4, 1)
    assert decode(it.store.get(("bob", "new"))).memory == b""
    assert it.step("new", 2, [2], principal="bob") == it.step("s", 2, [2])
    assert it.scheduler.memories.size_bytes == 2 * 4 * len(ROW)


@pytest.mark.parametrize("rows", [b"", ROW[:4], ROW * 6], ids=["none", "part of a row", "too many"])
def test_a_snapshot_with_a_memory_that_does_not_fit_changes_nothing(rows: bytes) -> None:
    it = rig()
    it.open(memory=memory(1))
    taken = decode(it.export())
    forged = replace(taken, header=replace(taken.header, memory_bytes=len(rows)), memory=rows)
    with pytest.raises(ConveyorError) as caught:
        it.operations.import_("bob", forged, "new", 10.0)
    fits = SnapshotIncompatible.reason if len(rows) < len(ROW) else "MEMORY_TOO_LARGE"
    assert caught.value.reason == fits
    assert len(it.scheduler.sessions) == 1


def test_all_of_them_together_are_bounded() -> None:
    it = rig(memories_bytes_max=3 * len(ROW))
    it.open("a", memory=memory(2))
    it.fork("a", "b")  # shares it
    it.open("c", memory=memory(1))
    snapshot = it.export("c")
    for call in (
        lambda: it.open("d", memory=memory(1)),
        lambda: it.operations.import_("bob", decode(snapshot), "new", 10.0),
    ):
        with pytest.raises(ConveyorError) as caught:
            call()
        assert caught.value.metadata["limit"] == "limits.memories_bytes_max"
    it.close("c")
    it.open("d", memory=memory(1))
