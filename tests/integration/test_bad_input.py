"""Whatever is wrong with a chunk or a frame has its status and reason, and changes no state."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from conveyor.v1 import session_pb2
from tests.integration.wire import (
    Entry,
    Refusal,
    Stream,
    Wire,
    floats,
    refused,
)

INVALID = "INVALID_ARGUMENT"
X = np.random.default_rng(0).standard_normal((40, 3), dtype=np.float32)
TOKENS = np.array([0, 6, 3, 1], dtype=np.int32)


@dataclass(frozen=True)
class Chunk:
    """What is wrong with one chunk for a session at step 5, unless said otherwise."""

    name: str
    expected: Refusal
    rows: Any = field(default_factory=lambda: X[:1])
    first_step: int = 6
    length: int | None = None
    output: int = 0
    trace: int = 0
    model: str = "tiny"


def _with(value: float) -> Any:
    rows = X[:2].copy()
    rows[1, 2] = value
    return rows


CHUNKS = [
    Chunk("a gap", Refusal("FAILED_PRECONDITION", "STEP_GAP"), first_step=7),
    Chunk("a far gap", Refusal("FAILED_PRECONDITION", "STEP_GAP"), first_step=2**62),
    Chunk("another payload", Refusal("ABORTED", "STEP_CONFLICT"), first_step=5, rows=X[30:31]),
    Chunk("payload partly other", Refusal("ABORTED", "STEP_CONFLICT"), first_step=4, rows=X[5:8]),
    Chunk("step 0", Refusal(INVALID, "INVALID_FIELD"), first_step=0),
    Chunk("a step below 0", Refusal(INVALID, "INVALID_FIELD"), first_step=-1),
    Chunk("a step beyond counting", Refusal(INVALID, "INVALID_FIELD"), first_step=2**63 - 1),
    Chunk("no steps", Refusal(INVALID, "EMPTY_CHUNK"), rows=X[:0]),
    Chunk("a length of 0 with rows", Refusal(INVALID, "EMPTY_CHUNK"), length=0),
    Chunk("a length below 0", Refusal(INVALID, "EMPTY_CHUNK"), length=-1),
    Chunk("fewer bytes", Refusal(INVALID, "INVALID_SHAPE"), length=2),
    Chunk("more bytes", Refusal(INVALID, "INVALID_SHAPE"), rows=X[:2], length=1),
    Chunk("no bytes", Refusal(INVALID, "INVALID_SHAPE"), rows=X[:0], length=1),
    Chunk("one byte more", Refusal(INVALID, "INVALID_SHAPE"), rows=np.zeros(13, "u1"), length=1),
    Chunk("rows too narrow", Refusal(INVALID, "INVALID_SHAPE"), rows=X[:1, :2].copy()),
    Chunk("doubles", Refusal(INVALID, "INVALID_SHAPE"), rows=X[:1].astype(np.float64)),
    Chunk("an immense length", Refusal(INVALID, "CHUNK_TOO_LONG"), length=2**62),
    Chunk("NaN", Refusal(INVALID, "NON_FINITE_INPUT"), rows=_with(np.nan)),
    Chunk("infinity", Refusal(INVALID, "NON_FINITE_INPUT"), rows=_with(np.inf)),
    Chunk("minus infinity", Refusal(INVALID, "NON_FINITE_INPUT"), rows=_with(-np.inf)),
    Chunk("unknown output mode", Refusal(INVALID, "INVALID_FIELD"), output=4),
    Chunk("output mode below 0", Refusal(INVALID, "INVALID_FIELD"), output=-1),
    Chunk("unknown trace mode", Refusal(INVALID, "INVALID_FIELD"), trace=3),
    Chunk(
        "a token of the vocabulary's size",
        Refusal(INVALID, "TOKEN_OUT_OF_RANGE"),
        rows=np.array([7], np.int32),
        model="words",
    ),
    Chunk(
        "a token below 0",
        Refusal(INVALID, "TOKEN_OUT_OF_RANGE"),
        rows=np.array([-1], np.int32),
        model="words",
    ),
    Chunk(
        "the largest token",
        Refusal(INVALID, "TOKEN_OUT_OF_RANGE"),
        rows=np.array([2**31 - 1], np.int32),
        model="words",
    ),
    Chunk(
        "a token of 8 bytes",
        Refusal(INVALID, "INVALID_SHAPE"),
        rows=np.array([1], np.int64),
        model="words",
    ),
    Chunk(
        "a chunk longer than the model takes",
        Refusal(INVALID, "CHUNK_TOO_LONG"),
        rows=X[:9],
        model="short",
    ),
]


def _inputs(model: str) -> Any:
    return np.tile(TOKENS, 10) if model == "words" else X


@pytest.fixture(params=CHUNKS, ids=lambda chunk: chunk.name)
def chunk(request: pytest.FixtureRequest) -> Chunk:
    return request.param


async def test_a_wrong_chunk_in_a_unary_step(wire: Wire, chunk: Chunk) -> None:
    x = _inputs(chunk.model)
    session_id = await wire.new_session(chunk.model)
    await wire.step(session_id, 1, x[:5])
    before = await wire.get(session_id)
    said = await refused(
        wire.step(
            session_id,
            chunk.first_step,
            chunk.rows,
            chunk.length,
            output=chunk.output,
            trace=chunk.trace,
        )
    )
    assert said == chunk.expected
    assert said.retry_seconds is None
    after = await wire.get(session_id)
    after.active_time.CopyFrom(before.active_time)
    after.expire_time.CopyFrom(before.expire_time)
    assert after == before
    follow = (await wire.step(session_id, 6, x[5:6])).rows
    assert follow == (await wire.predict(chunk.model, x[:6]))[-len(follow) :]


async def test_a_wrong_chunk_on_a_stream(wire: Wire, chunk: Chunk) -> None:
    x = _inputs(chunk.model)
    async with wire.stream() as stream:
        opened, columns = await _opened_at_5(stream, chunk.model)
        await stream.send_steps(
            Entry(opened, chunk.first_step, chunk.rows, chunk.output, chunk.length, chunk.trace)
        )
        said, frame = await stream.failure()
        assert said == chunk.expected
        assert (frame.handle, frame.first_step) == (opened, chunk.first_step)
        follow = await stream.steps(opened, 6, x[5:6], columns)
        assert follow == (await wire.predict(chunk.model, x[:6]))[-len(follow) :]


async def _opened_at_5(stream: Stream, model: str) -> tuple[int, int]:
    columns = 7 if model == "words" else 2
    handle = (await stream.open(model)).handle
    await stream.steps(handle, 1, _inputs(model)[:5], columns)
    return handle, columns


SEPARABLE = [
    chunk
    for chunk in CHUNKS
    if chunk.model == "tiny" and chunk.expected.reason != "INVALID_SHAPE" and chunk.length is None
]


@pytest.mark.parametrize("chunk", SEPARABLE, ids=lambda chunk: chunk.name)
async def test_a_wrong_chunk_in_a_frame_of_many_harms_no_other(wire: Wire, chunk: Chunk) -> None:
    async with wire.stream() as stream:
        handles = [(await _opened_at_5(stream, "tiny"))[0] for _ in range(3)]
        await stream.send_steps(
            Entry(handles[0], 6, X[5:7]),
            Entry(handles[1], chunk.first_step, chunk.rows, chunk.output, None, chunk.trace),
            Entry(handles[2], 6, X[5:7]),
        )
        pieces = await stream.pieces(2, 2)
        assert [piece.handle for piece in pieces] == [handles[0], handles[2]]
        expected = (await wire.predict("tiny", X[:7]))[-16:]
        assert [piece.rows for piece in pieces] == [expected, expected]
        said, frame = await stream.failure()
        assert said == chunk.expected
        assert frame.handle == handles[1]
        assert await stream.steps(handles[1], 6, X[5:7], 2) == expected


async def test_a_frame_whose_bytes_do_not_add_up_runs_nothing(wire: Wire) -> None:
    async with wire.stream() as stream:
        handles = [(await _opened_at_5(stream, "tiny"))[0] for _ in range(2)]
        await stream.send_steps(Entry(handles[0], 6, X[5:6]), Entry(handles[1], 6, X[5:6], 0, 2))
        for handle in handles:
            said, frame = await stream.failure()
            assert said == Refusal(INVALID, "INVALID_SHAPE")
            assert (frame.handle, frame.first_step) == (handle, 6)
        for handle in handles:
            await stream.steps(handle, 6, X[5:6], 2)


async def test_a_gap_names_the_step_expected(wire: Wire) -> None:
    session_id = await wire.new_session("tiny")
    await wire.step(session_id, 1, X[:5])
    said = await refused(wire.step(session_id, 9, X[:1]))
    assert said.metadata == {"expected_step": "6"}
    assert "9" in said.message
    assert "6" in said.message


async def test_denormal_and_extreme_floats_are_inputs_like_others(wire: Wire) -> None:
    rows = np.array([[1e-45, -1e-45, 0.0], [3.4e38, -3.4e38, 1e-38]], np.float32)
    out = floats(await wire.predict("tiny", rows), 2)
    assert np.isfinite(out).all()


# --- frames --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Frame:
    name: str
    expected: Refusal
    frame: dict[str, Any]


_steps = session_pb2.StepsFrame
_entry = session_pb2.StepsEntry
_unknown = _steps(entries=[_entry(handle=99, first_step=1, length=1)], rows=X[:1].tobytes())
FRAMES = [
    Frame("nothing in it", Refusal(INVALID, "INVALID_FIELD"), {}),
    Frame("no entries", Refusal(INVALID, "EMPTY_CHUNK"), {"steps": _steps()}),
    Frame("rows and no entries", Refusal(INVALID, "EMPTY_CHUNK"), {"steps": _steps(rows=b"1234")}),
    Frame("steps for an unknown handle", Refusal(INVALID, "UNKNOWN_HANDLE"), {"steps": _unknown}),
    Frame(
        "steps for handle 0",
        Refusal(INVALID, "UNKNOWN_HANDLE"),
        {"steps": _steps(entries=[_entry(first_step=1, length=1)], rows=X[:1].tobytes())},
    ),
    Frame(
        "close of an unknown handle",
        Refusal(INVALID, "UNKNOWN_HANDLE"),
        {"close": session_pb2.CloseFrame(handle=99)},
    ),
    Frame(
        "detach of an unknown handle",
        Refusal(INVALID, "UNKNOWN_HANDLE"),
        {"close": session_pb2.CloseFrame(handle=99, detach=True)},
    ),
]


@pytest.mark.parametrize("case", FRAMES, ids=lambda case: case.name)
async def test_a_wrong_frame_leaves_the_stream_and_its_sessions(wire: Wire, case: Frame) -> None:
    async with wire.stream() as stream:
        handle, _ = await _opened_at_5(stream, "tiny")
        await stream.send(**case.frame)
        said, _ = await stream.failure()
        assert said == case.expected
        follow = await stream.steps(handle, 6, X[5:6], 2)
        assert follow == (await wire.predict("tiny", X[:6]))[-8:]


@pytest.mark.parametrize("detach", [False, True])
async def test_frames_for_a_closed_handle(wire: Wire, detach: bool) -> None:
    unknown = Refusal(INVALID, "UNKNOWN_HANDLE")
    async with wire.stream() as stream:
        handle, _ = await _opened_at_5(stream, "tiny")
        other, _ = await _opened_at_5(stream, "tiny")
        await stream.send(close=session_pb2.CloseFrame(handle=handle, detach=detach))
        await stream.next("closed")
        await stream.send_steps(Entry(handle, 6, X[5:6]))
        said, frame = await stream.failure()
        assert (said, frame.handle, frame.first_step) == (unknown, handle, 6)
        # Chunks of others in the same frame run all the same.
        await stream.send_steps(Entry(handle, 6, X[5:6]), Entry(other, 6, X[5:6]))
        assert (await stream.pieces(1, 2))[0].handle == other
        assert (await stream.failure())[0] == unknown
        await stream.send(close=session_pb2.CloseFrame(handle=handle))
        assert (await stream.failure())[0] == unknown
