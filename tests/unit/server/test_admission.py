"""The door: what passes, and the reason of every refusal."""

import struct
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conveyor_server.admission.admission import Admission, Binding, Entry
from conveyor_server.admission.fields import (
    LABEL_KEY_CHARACTERS_MAX,
    LABEL_VALUE_CHARACTERS_MAX,
    PAGE_SIZE_DEFAULT,
    PAGE_SIZE_MAX,
    check_session_id,
    page_size,
)
from conveyor_server.config import LimitsConfig
from conveyor_server.core import (
    STEP_MAX,
    Chunk,
    Durability,
    MemoryRows,
    ModelInfo,
    OpenMode,
    OutputMode,
)
from conveyor_server.errors import ConveyorError
from conveyor_server.scheduler.sampling import Sampling
from tests.support.models import FEATURES, LOOPED, TOKENS
from tests.support.replies import Recorder
from tests.support.rig import rows_of

MESSAGE_BYTES_MAX = 2048
ADMISSION = Admission(
    LimitsConfig(
        chunk_steps_max=8,
        predict_steps_max=10,
        generate_steps_max=12,
        idle_seconds_max=60,
        fork_sessions_max=3,
        labels_max=2,
        message_bytes_max=MESSAGE_BYTES_MAX,
    )
)
NAN, INF = float("nan"), float("inf")


def entry(model: ModelInfo = FEATURES, **changes: Any) -> Entry:
    values: dict[str, Any] = {"first_step": 1, "length": 2, "output": 0} | changes
    return Entry(Binding("ann", "s", 1, model, Recorder(), 5), **values)


def chunk(rows: bytes, model: ModelInfo = FEATURES, **changes: Any) -> Chunk:
    return ADMISSION.chunk(entry(model, **changes), rows, 1.0, None)


def opening(**changes: Any) -> Any:
    values: dict[str, Any] = {
        "principal": "ann",
        "model": "weather",
        "version": 0,
        "session_id": "",
        "mode": 0,
        "durability": 0,
        "idle_seconds": None,
        "memory": None,
        "labels": {},
        "token": "",
    }
    return ADMISSION.open(**(values | changes))


def generating(model: ModelInfo = TOKENS, **changes: Any) -> Any:
    values: dict[str, Any] = {
        "prompt": rows_of(model, 1),
        "prompt_length": 1,
        "steps_max": 3,
        "sampling": Sampling(),
        "stop_tokens": (),
    }
    return ADMISSION.generation(model, **(values | changes))


def floats(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


def ints(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}i", *values)


TWO = rows_of(FEATURES, 1, 2)
BAD: list[tuple[str, str, Callable[[], object]]] = [
    ("no step", "EMPTY_CHUNK", lambda: chunk(b"", length=0)),
    ("fewer steps than none", "EMPTY_CHUNK", lambda: chunk(b"", length=-1)),
    ("one step too many", "CHUNK_TOO_LONG", lambda: chunk(rows_of(FEATURES, *range(9)), length=9)),
    ("far too many steps", "CHUNK_TOO_LONG", lambda: chunk(b"", length=2**62)),
    ("no bytes", "INVALID_SHAPE", lambda: chunk(b"")),
    ("a byte short", "INVALID_SHAPE", lambda: chunk(TWO[:-1])),
    ("a byte over", "INVALID_SHAPE", lambda: chunk(TWO + b"\0")),
    ("a row short", "INVALID_SHAPE", lambda: chunk(rows_of(FEATURES, 1))),
    ("rows of another width", "INVALID_SHAPE", lambda: chunk(floats(1, 2, 3, 4, 5, 6))),
    ("doubles for floats", "INVALID_SHAPE", lambda: chunk(struct.pack("<4d", 1, 2, 3, 4))),
    ("NaN", "NON_FINITE_INPUT", lambda: chunk(floats(1, 2, 3, NAN))),
    ("infinity", "NON_FINITE_INPUT", lambda: chunk(floats(INF, 2, 3, 4))),
    ("minus infinity", "NON_FINITE_INPUT", lambda: chunk(floats(1, -INF, 3, 4))),
    ("a token too large", "TOKEN_OUT_OF_RANGE", lambda: chunk(ints(1, 8), TOKENS)),
    ("a negative token", "TOKEN_OUT_OF_RANGE", lambda: chunk(ints(-1, 1), TOKENS)),
    ("the lowest token", "TOKEN_OUT_OF_RANGE", lambda: chunk(ints(-(2**31), 1), TOKENS)),
    ("step 0", "INVALID_FIELD", lambda: chunk(TWO, first_step=0)),
    ("step -1", "INVALID_FIELD", lambda: chunk(TWO, first_step=-1)),
    ("a step beyond all", "INVALID_FIELD", lambda: chunk(TWO, first_step=STEP_MAX + 1)),
    ("an unknown output mode", "INVALID_FIELD", lambda: chunk(TWO, output=4)),
    ("an output mode below 0", "INVALID_FIELD", lambda: chunk(TWO, output=-1)),
    ("an unknown trace mode", "INVALID_FIELD", lambda: chunk(TWO, trace=3)),
    ("a trace mode below 0", "INVALID_FIELD", lambda: chunk(TWO, trace=-1)),
    ("a frame without entries", "EMPTY_CHUNK", lambda: ADMISSION.frame([], b"", 1.0, None)),
    ("a frame with bytes left over", "INVALID_SHAPE",
     lambda: ADMISSION.frame([entry(), entry()], TWO * 2 + b"\0", 1.0, None)),
    ("a frame with bytes missing", "INVALID_SHAPE",
     lambda: ADMISSION.frame([entry(), entry()], TWO, 1.0, None)),
    ("a frame whose lengths cancel out", "INVALID_SHAPE",
     lambda: ADMISSION.frame([entry(length=-1), entry(length=3)], TWO, 1.0, None)),
    ("open: neither model nor id", "INVALID_FIELD", lambda: opening(model="")),
    ("open: resume without id", "INVALID_FIELD", lambda: opening(mode=OpenMode.RESUME)),
    ("open: a malformed id", "INVALID_FIELD", lambda: opening(session_id="a/b")),
    ("open: an id with a line break", "INVALID_FIELD", lambda: opening(session_id="a\n")),
    ("open: an id too long", "INVALID_FIELD", lambda: opening(session_id="x" * 129)),
    ("open: a version below 0", "INVALID_FIELD", lambda: opening(version=-1)),
    ("open: an unknown mode", "INVALID_FIELD", lambda: opening(mode=3)),
    ("open: an unknown durability", "INVALID_FIELD", lambda: opening(durability=4)),
    ("open: NaN in the memory", "NON_FINITE_INPUT",
     lambda: opening(memory=MemoryRows(1, floats(1, NAN, 2)))),
    ("open: infinity in a memory of odd bytes", "NON_FINITE_INPUT",
     lambda: opening(memory=MemoryRows(1, floats(-INF) + b"\0"))),
    ("open: a memory larger than a message", "MESSAGE_TOO_LARGE",
     lambda: opening(memory=MemoryRows(1, bytes(MESSAGE_BYTES_MAX + 1)))),
    ("predict: a memory and rows larger than a message", "MESSAGE_TOO_LARGE",
     lambda: ADMISSION.memory(MemoryRows(1, bytes(MESSAGE_BYTES_MAX - 3)), bytes(4))),
    ("open: no idle time", "INVALID_FIELD", lambda: opening(idle_seconds=0.0)),
    ("open: an idle time below 0", "INVALID_FIELD", lambda: opening(idle_seconds=-1.0)),
    ("open: an idle time too long", "INVALID_FIELD", lambda: opening(idle_seconds=60.001)),
    ("open: an idle time of NaN", "INVALID_FIELD", lambda: opening(idle_seconds=NAN)),
    ("open: too many labels", "INVALID_FIELD", lambda: opening(labels={"a": "", "b": "", "c": ""})),
    ("open: a label without key", "INVALID_FIELD", lambda: opening(labels={"": "x"})),
    ("open: a label's key too long", "INVALID_FIELD",
     lambda: opening(labels={"k" * (LABEL_KEY_CHARACTERS_MAX + 1): "x"})),
    ("open: a label's value too long", "INVALID_FIELD",
     lambda: opening(labels={"k": "x" * (LABEL_VALUE_CHARACTERS_MAX + 1)})),
    ("fork: into none", "INVALID_FIELD", lambda: ADMISSION.fork_ids([])),
    ("fork: into too many", "INVALID_FIELD", lambda: ADMISSION.fork_ids(list("abcd"))),
    ("fork: into one twice", "INVALID_FIELD", lambda: ADMISSION.fork_ids(["a", "b", "a"])),
    ("fork: into a malformed id", "INVALID_FIELD", lambda: ADMISSION.fork_ids(["a b"])),
    ("predict: no step", "EMPTY_CHUNK", lambda: ADMISSION.sequence(FEATURES, 0, b"")),
    ("predict: too long", "CHUNK_TOO_LONG",
     lambda: ADMISSION.sequence(FEATURES, 11, rows_of(FEATURES, *range(11)))),
    ("predict: wrong bytes", "INVALID_SHAPE", lambda: ADMISSION.sequence(FEATURES, 2, TWO[1:])),
    ("predict: NaN", "NON_FINITE_INPUT", lambda: ADMISSION.sequence(FEATURES, 1, floats(NAN, 1))),
    ("predict: token", "TOKEN_OUT_OF_RANGE", lambda: ADMISSION.sequence(TOKENS, 1, ints(8))),
    ("generate: output is no input", "MODEL_NOT_GENERATIVE",
     lambda: generating(FEATURES, prompt=rows_of(FEATURES, 1))),
    ("generate: gates are no distribution", "MODEL_NOT_GENERATIVE",
     lambda: generating(replace(TOKENS, activation="sigmoid"))),
    ("generate: no output", "INVALID_FIELD", lambda: generating(steps_max=0)),
    ("generate: too many outputs", "CHUNK_TOO_LONG", lambda: generating(steps_max=12)),
    ("generate: prompt below 0", "INVALID_FIELD",
     lambda: generating(prompt=b"", prompt_length=-1)),
    ("generate: prompt's bytes", "INVALID_SHAPE", lambda: generating(prompt_length=2)),
    ("generate: prompt's token", "TOKEN_OUT_OF_RANGE", lambda: generating(prompt=ints(9))),
    ("generate: prompt's NaN", "NON_FINITE_INPUT",
     lambda: generating(LOOPED, prompt=floats(NAN, 1))),
    ("generate: temperature below 0", "INVALID_FIELD",
     lambda: generating(sampling=Sampling(-0.1))),
    ("generate: temperature too high", "INVALID_FIELD",
     lambda: generating(sampling=Sampling(100.1))),
    ("generate: temperature of NaN", "INVALID_FIELD", lambda: generating(sampling=Sampling(NAN))),
    ("generate: infinite temperature", "INVALID_FIELD",
     lambda: generating(sampling=Sampling(INF))),
    ("generate: top_k below 0", "INVALID_FIELD", lambda: generating(sampling=Sampling(1.0, -1))),
    ("generate: sampling features", "INVALID_FIELD",
     lambda: generating(LOOPED, sampling=Sampling(1.0))),
    ("generate: stop tokens for features", "INVALID_FIELD",
     lambda: generating(LOOPED, stop_tokens=[1])),
    ("generate: a stop token too large", "INVALID_FIELD", lambda: generating(stop_tokens=[8])),
    ("generate: a negative stop token", "INVALID_FIELD", lambda: generating(stop_tokens=[-1])),
    ("list: a page below 0", "INVALID_FIELD", lambda: page_size(-1)),
]  # fmt: skip


@pytest.mark.parametrize(("what", "reason", "call"), BAD, ids=[row[0] for row in BAD])
def test_bad_input_is_refused(what: str, reason: str, call: Callable[[], object]) -> None:
    with pytest.raises(ConveyorError) as caught:
        call()
    assert caught.value.reason == reason
    assert len(caught.value.message) < 300


GOOD: list[tuple[str, Callable[[], object]]] = [
    ("steps at the limit", lambda: chunk(rows_of(FEATURES, *range(8)), length=8)),
    ("the last step of all", lambda: chunk(TWO, first_step=STEP_MAX)),
    ("the largest float", lambda: chunk(floats(3.4e38, -3.4e38, 1e-45, -0.0))),
    ("the first and last token", lambda: chunk(ints(0, 7), TOKENS)),
    ("every mode", lambda: [chunk(TWO, output=mode) for mode in (0, 1, 2, 3)]),
    ("open: an id of every character", lambda: opening(session_id="Az09._:-")),
    ("open: an id at the limit", lambda: opening(session_id="x" * 128)),
    ("every trace mode", lambda: [chunk(TWO, trace=mode) for mode in (0, 1, 2)]),
    ("open: a memory as large as a message",
     lambda: opening(memory=MemoryRows(1, bytes(MESSAGE_BYTES_MAX)))),
    ("open: idle time at the limit", lambda: opening(idle_seconds=60.0)),
    ("open: labels at the limit",
     lambda: opening(labels={"k" * LABEL_KEY_CHARACTERS_MAX: "v" * LABEL_VALUE_CHARACTERS_MAX,
                             "other": ""})),
    ("fork: at the limit", lambda: ADMISSION.fork_ids(list("abc"))),
    ("fork: ids left to the server", lambda: ADMISSION.fork_ids(["", "", "a"])),
    ("predict: at the limit",
     lambda: ADMISSION.sequence(FEATURES, 10, rows_of(FEATURES, *range(10)))),
    ("generate: at the limit", lambda: generating(steps_max=11)),
    ("generate: without prompt", lambda: generating(prompt=b"", prompt_length=0)),
    ("generate: temperature at the limit", lambda: generating(sampling=Sampling(100.0, 8))),
    ("generate: features", lambda: generating(LOOPED, prompt=rows_of(LOOPED, 1))),
]  # fmt: skip


@pytest.mark.parametrize(("what", "call"), GOOD, ids=[row[0] for row in GOOD])
def test_input_at_the_limit_passes(what: str, call: Callable[[], object]) -> None:
    assert call() is not None or what.startswith("predict")


def test_a_bundle_may_set_a_lower_limit_but_no_higher_one() -> None:
    for model, limit in (
        (replace(FEATURES, chunk_steps_max=3), 3),
        (replace(FEATURES, chunk_steps_max=99), 8),
    ):
        assert chunk(rows_of(model, *range(limit)), model, length=limit).length == limit
        with pytest.raises(ConveyorError) as caught:
            chunk(rows_of(model, *range(limit + 1)), model, length=limit + 1)
        assert caught.value.reason == "CHUNK_TOO_LONG"
        assert caught.value.metadata["maximum"] == str(limit)


def test_a_chunk_is_what_was_asked_for() -> None:
    made = ADMISSION.chunk(entry(first_step=7), TWO, 3.0, 4.0)
    assert (made.principal, made.session_id, made.epoch, made.handle) == ("ann", "s", 1, 5)
    assert (made.first_step, made.length, made.rows, made.done) == (7, 2, TWO, 0)
    assert made.output is OutputMode.ALL
    assert (made.arrived_seconds, made.deadline_seconds) == (3.0, 4.0)


def test_an_opening_is_what_was_asked_for() -> None:
    made = opening(
        session_id="s", mode=1, idle_seconds=5.0, labels={"b": "2", "a": "1"}, token="t", version=3
    )
    assert (made.mode, made.durability) == (OpenMode.CREATE, Durability.NONE)
    assert made.labels == (("a", "1"), ("b", "2"))
    assert (made.idle_seconds, made.token, made.version) == (5.0, "t", 3)
    assert opening().idle_seconds is None


def test_pages_have_a_default_and_a_bound() -> None:
    assert page_size(0) == PAGE_SIZE_DEFAULT
    assert page_size(1) == 1
    assert page_size(PAGE_SIZE_MAX) == page_size(PAGE_SIZE_MAX + 1) == PAGE_SIZE_MAX


@given(st.text(max_size=140))
def test_session_ids_are_of_few_characters(text: str) -> None:
    allowed = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._:-"
    if 1 <= len(text) <= 128 and set(text) <= set(allowed):
        check_session_id(text)
    else:
        with pytest.raises(ConveyorError):
            check_session_id(text)


@st.composite
def frames(draw: st.DrawFn) -> list[tuple[Entry, bytes]]:
    made: list[tuple[Entry, bytes]] = []
    for _ in range(draw(st.integers(1, 6))):
        model = draw(st.sampled_from([FEATURES, TOKENS]))
        length = draw(st.integers(0, 9))
        values = [draw(st.integers(0, 9)) for _ in range(length)]
        rows = bytearray(rows_of(model, *values))
        if rows and model is FEATURES and draw(st.integers(0, 3)) == 0:
            rows[-4:] = floats(NAN)
        first_step = draw(st.sampled_from([1, 5, 0]))
        made.append((entry(model, first_step=first_step, length=length), bytes(rows)))
    return made


def outcome(each: Entry, rows: bytes) -> Chunk | ConveyorError:
    try:
        return ADMISSION.chunk(each, rows, 1.0, 2.0)
    except ConveyorError as error:
        return error


@given(frames())
def test_each_chunk_of_a_frame_fares_as_it_would_alone(parts: list[tuple[Entry, bytes]]) -> None:
    rows = b"".join(part for _, part in parts)
    checked = ADMISSION.frame([each for each, _ in parts], rows, 1.0, 2.0)
    assert len(checked) == len(parts)
    for result, (each, part) in zip(checked, parts, strict=True):
        alone = outcome(each, part)
        assert type(result) is type(alone)
        if isinstance(alone, Chunk):
            assert isinstance(result, Chunk)
            assert (result.rows, result.first_step) == (alone.rows, alone.first_step)
            assert result.length == alone.length
        else:
            assert str(result) == str(alone)
