"""The record of a session's state: round trips, and everything that can be wrong with one."""

import hashlib
import json
import struct
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conveyor_server.errors import SnapshotCorrupt, SnapshotIncompatible
from conveyor_server.store.checkpoint import (
    FORMAT_VERSION,
    HEADER_BYTES_MAX,
    MAGIC,
    MEMORY_FORMAT_VERSION,
    Checkpoint,
    Header,
    check_fits,
    decode,
    encode,
    read_snapshot,
    record_bytes,
)
from tests.support.models import FEATURES
from tests.support.rig import Rig

HEADER = Header(
    session_id="s-1",
    principal="ann",
    model=FEATURES.key.name,
    version=1,
    model_digest=FEATURES.digest,
    epoch=3,
    step=42,
    carry_bytes=32,
)
CARRY = struct.pack("<8f", *range(8))
RECORD = encode(Checkpoint(HEADER, CARRY))
FIELDS = sorted(set(Header.__dataclass_fields__) - {"memory_bytes"})
"""Of a header without a memory."""
REFUSALS = (SnapshotCorrupt, SnapshotIncompatible)


def sealed(header: bytes, carry: bytes = CARRY, version: int = FORMAT_VERSION) -> bytes:
    """A record with a checksum that is right, whatever it holds: anybody can make one."""
    body = struct.pack("<4sHI", MAGIC, version, len(header)) + header + carry
    return body + hashlib.sha256(body).digest()


def header_json(**changes: Any) -> bytes:
    fields = {name: getattr(HEADER, name) for name in FIELDS}
    fields |= changes
    return json.dumps({key: value for key, value in fields.items() if value != "GONE"}).encode()


@given(
    text=st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), max_size=40),
    numbers=st.tuples(*[st.integers(0, 2**62)] * 3),
    carry=st.binary(max_size=200),
)
def test_a_record_is_read_as_it_was_written(
    text: str, numbers: tuple[int, int, int], carry: bytes
) -> None:
    version, epoch, step = numbers
    header = replace(
        HEADER, principal=text, version=version, epoch=epoch, step=step, carry_bytes=len(carry)
    )
    checkpoint = Checkpoint(header, carry)
    assert decode(encode(checkpoint)) == checkpoint


def test_every_truncation_is_refused() -> None:
    for length in range(len(RECORD)):
        with pytest.raises(REFUSALS):
            decode(RECORD[:length])
    with pytest.raises(SnapshotCorrupt):
        decode(RECORD + b"\0")


def test_every_flipped_bit_is_refused() -> None:
    for position in range(len(RECORD)):
        for bit in range(8):
            damaged = bytearray(RECORD)
            damaged[position] ^= 1 << bit
            with pytest.raises(REFUSALS):
                decode(bytes(damaged))


@given(st.binary(max_size=400))
def test_any_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(REFUSALS):
        decode(data)


@given(st.binary(max_size=300), st.binary(max_size=64))
def test_any_header_with_a_right_checksum_is_refused(header: bytes, carry: bytes) -> None:
    with pytest.raises(REFUSALS):
        decode(sealed(header, carry))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@given(name=st.sampled_from(FIELDS), value=JSON)
def test_any_header_field_is_taken_or_refused(name: str, value: Any) -> None:
    try:
        checkpoint = decode(sealed(header_json(**{name: value})))
    except REFUSALS:
        return
    assert type(getattr(checkpoint.header, name)) is type(getattr(HEADER, name))
    assert decode(encode(checkpoint)) == checkpoint


WRONG_HEADERS: dict[str, bytes] = {
    "no JSON": b"{",
    "no UTF-8": b'{"model":"\xff"}',
    "a list": b"[]",
    "a number": b"1",
    "a field missing": header_json(step="GONE"),
    "a field too many": header_json(extra=1),
    "step as text": header_json(step="42"),
    "step as a fraction": header_json(step=4.5),
    "step as a truth value": header_json(step=True),
    "step below 0": header_json(step=-1),
    "step beyond any session's": header_json(step=2**62 + 1),
    "step beyond 64 bits": header_json(step=2**64),
    "version beyond 64 bits": header_json(version=2**64),
    "step of five thousand digits": header_json().replace(b"42", b"9" * 5000),
    "id as a number": header_json(session_id=7),
    "id with a line break": header_json(session_id="a\nb"),
    "id that is half a character": header_json(session_id="\ud800"),
    "id too long": header_json(session_id="x" * 1000),
    "digest that is half a character": header_json(model_digest="\ud800"),
    "model with a line break": header_json(model="a\r\nb"),
    "carry of another size": header_json(carry_bytes=36),
    "nested without end": b"[" * 20_000,
}


@pytest.mark.parametrize("header", WRONG_HEADERS.values(), ids=WRONG_HEADERS.keys())
def test_a_wrong_header_is_refused(header: bytes) -> None:
    with pytest.raises(SnapshotCorrupt) as caught:
        decode(sealed(header))
    assert len(caught.value.message.encode()) < 500


def test_a_header_too_long_is_refused() -> None:
    with pytest.raises(SnapshotCorrupt):
        decode(sealed(b" " * (HEADER_BYTES_MAX + 1)))
    body = struct.pack("<4sHI", MAGIC, FORMAT_VERSION, 2**32 - 1) + header_json() + CARRY
    with pytest.raises(SnapshotCorrupt):
        decode(body + hashlib.sha256(body).digest())


@pytest.mark.parametrize("version", [0, MEMORY_FORMAT_VERSION + 1, 2**16 - 1])
def test_another_format_is_incompatible(version: int) -> None:
    with pytest.raises(SnapshotIncompatible, match=f"format {version}"):
        decode(sealed(header_json(), version=version))


def test_what_fits_the_model_passes() -> None:
    check_fits(Checkpoint(HEADER, CARRY), FEATURES)


@pytest.mark.parametrize(
    ("change", "carry", "error"),
    [
        ({"model_digest": "sha256:00"}, CARRY, SnapshotIncompatible),
        ({"dtype": "bfloat16"}, CARRY, SnapshotIncompatible),
        ({"carry_bytes": 28}, CARRY[:28], SnapshotIncompatible),
    ],
    ids=["digest", "dtype", "layout"],
)
def test_what_does_not_fit_the_model_is_refused(
    change: dict[str, Any], carry: bytes, error: type[Exception]
) -> None:
    with pytest.raises(error):
        check_fits(Checkpoint(replace(HEADER, **change), carry), FEATURES)


@pytest.mark.parametrize("value", ["nan", "-inf"])
def test_a_carry_that_is_not_finite_is_corrupt(value: str) -> None:
    carry = CARRY[:-4] + struct.pack("<f", float(value))
    with pytest.raises(SnapshotCorrupt, match="carry"):
        read_snapshot(encode(Checkpoint(HEADER, carry)))


@pytest.mark.parametrize("memory", [b"", bytes(16)])
def test_the_size_of_a_record_is_told_without_writing_it(memory: bytes) -> None:
    header = replace(HEADER, memory_bytes=len(memory))
    assert record_bytes(header) == len(encode(Checkpoint(header, CARRY, memory)))


def imported(rig: Rig, snapshot: bytes, session_id: str = "new", principal: str = "bob") -> Any:
    return rig.operations.import_(principal, read_snapshot(snapshot), session_id, 10.0)


def test_a_snapshot_goes_on_where_it_was_taken_and_names_nobody() -> None:
    rig = Rig()
    rig.open()
    rig.step("s", 1, [1, 2, 3])
    snapshot = rig.export()
    assert decode(snapshot).header.principal == ""
    view = imported(rig, snapshot)
    assert (view.session_id, view.applied_step, view.epoch) == ("new", 3, 1)
    assert rig.step("new", 4, [4, 5], principal="bob") == rig.step("s", 4, [4, 5])


def test_a_snapshot_of_another_model_changes_nothing() -> None:
    rig = Rig()
    for header in (
        header_json(model_digest="sha256:00"),
        header_json(model="other"),
        header_json(model_digest="x" * 60_000),
    ):
        with pytest.raises(REFUSALS) as caught:
            imported(rig, sealed(header))
        assert len(caught.value.message.encode()) < 2_000
    assert len(rig.scheduler.sessions) == 0


@pytest.mark.parametrize("damage", [0, 20, -40, -1])
def test_a_damaged_snapshot_changes_nothing(damage: int) -> None:
    rig = Rig()
    rig.open()
    rig.step("s", 1, [1])
    snapshot = bytearray(rig.export())
    snapshot[damage] ^= 4
    with pytest.raises(SnapshotCorrupt):
        imported(rig, bytes(snapshot))
    assert len(rig.scheduler.sessions) == 1


@pytest.mark.parametrize("session_id", ["a/b", "a b", "é", "x" * 129])
def test_a_snapshot_cannot_bring_in_an_id_that_could_not_be_opened(session_id: str) -> None:
    rig = Rig()
    with pytest.raises(SnapshotCorrupt):
        imported(rig, sealed(header_json(session_id=session_id)), session_id="")
    assert len(rig.scheduler.sessions) == 0


MEMORY = struct.pack("<6f", *range(6))
REMEMBERED = Checkpoint(replace(HEADER, memory_bytes=len(MEMORY)), CARRY, MEMORY)


@given(carry=st.binary(max_size=100), memory=st.binary(max_size=100))
def test_a_record_with_a_memory_is_read_as_it_was_written(carry: bytes, memory: bytes) -> None:
    header = replace(HEADER, carry_bytes=len(carry), memory_bytes=len(memory))
    checkpoint = Checkpoint(header, carry, memory)
    record = encode(checkpoint)
    assert decode(record) == checkpoint
    assert record[4] == (MEMORY_FORMAT_VERSION if memory else FORMAT_VERSION)


def test_every_truncated_or_altered_record_with_a_memory_is_refused() -> None:
    record = encode(REMEMBERED)
    for position in range(len(record)):
        altered = bytearray(record)
        altered[position] ^= 16
        for damaged in (record[:position], bytes(altered)):
            with pytest.raises(REFUSALS):
                decode(damaged)


@pytest.mark.parametrize(
    ("version", "changes"),
    [
        (FORMAT_VERSION, {"memory_bytes": 0}),
        (MEMORY_FORMAT_VERSION, {}),
        (MEMORY_FORMAT_VERSION, {"memory_bytes": 4}),
        (MEMORY_FORMAT_VERSION, {"memory_bytes": -24, "carry_bytes": 56}),
        (MEMORY_FORMAT_VERSION, {"memory_bytes": 24.0}),
    ],
    ids=["known too early", "missing", "of another size", "below 0", "a fraction"],
)
def test_a_wrong_memory_in_a_header_is_refused(version: int, changes: dict[str, Any]) -> None:
    with pytest.raises(SnapshotCorrupt):
        decode(sealed(header_json(**changes), CARRY, version))


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_memory_that_is_not_finite_is_corrupt(value: str) -> None:
    memory = MEMORY[:-4] + struct.pack("<f", float(value))
    assert read_snapshot(encode(REMEMBERED)) == REMEMBERED
    with pytest.raises(SnapshotCorrupt, match="memory"):
        read_snapshot(encode(replace(REMEMBERED, memory=memory)))


def test_a_memory_of_a_model_without_attention_is_incompatible() -> None:
    with pytest.raises(SnapshotIncompatible):
        check_fits(REMEMBERED, FEATURES)
