"""Whatever is wrong with a request has its status and its reason, and changes no state."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from conveyor.v1 import model_pb2, session_pb2
from tests.integration.wire import (
    Entry,
    Refusal,
    Stream,
    Wire,
    floats,
    refused,
    seconds,
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


# --- calls ---------------------------------------------------------------------------------------

Call = Callable[[Wire, str], Awaitable[Any]]


def _open(**fields: Any) -> Call:
    return lambda wire, _: wire.open(**fields)


def _open_this(**fields: Any) -> Call:
    return lambda wire, session_id: wire.open(session_id=session_id, **fields)


def _sessions(rpc: str, message: Any) -> Call:
    return lambda wire, _: getattr(wire.sessions, rpc)(message)


def _fork(*ids: str, at_step: int = 0) -> Call:
    return lambda wire, session_id: wire.sessions.ForkSession(
        session_pb2.ForkSessionRequest(session_id=session_id, new_session_ids=ids, at_step=at_step)
    )


def _predict(**fields: Any) -> Call:
    return lambda wire, _: wire.sessions.Predict(session_pb2.PredictRequest(**fields))


def _generate(**fields: Any) -> Call:
    return lambda wire, _: wire.generate(**fields)


_absent = Refusal("NOT_FOUND", "SESSION_NOT_FOUND")
_no_model = Refusal("NOT_FOUND", "MODEL_NOT_FOUND")
_field = Refusal(INVALID, "INVALID_FIELD")
_memory = Refusal(INVALID, "INVALID_MEMORY")
_mismatch = Refusal("FAILED_PRECONDITION", "SESSION_MISMATCH")
_corrupt = Refusal("DATA_LOSS", "SNAPSHOT_CORRUPT")
_rows = X[:2].tobytes()
_a_memory = session_pb2.Memory(length=1, rows=b"1234")
_prompt = {"model": "words", "prompt": TOKENS.tobytes(), "prompt_length": 4, "steps_max": 3}

CALLS: list[tuple[str, Refusal, Call]] = [
    ("open: unknown model", _no_model, _open(model="none")),
    ("open: unknown version", _no_model, _open(model="tiny", version=9)),
    ("open: neither model nor id", _field, _open()),
    ("open: unknown id and no model", _field, _open(session_id="absent-1")),
    ("open: version below 0", _field, _open(model="tiny", version=-1)),
    ("open: id with a space", _field, _open(model="tiny", session_id="a b")),
    ("open: id with a line break", _field, _open(model="tiny", session_id="a\n")),
    ("open: id of letters beyond ASCII", _field, _open(model="tiny", session_id="ä")),
    ("open: id too long", _field, _open(model="tiny", session_id="x" * 129)),
    ("open: unknown mode", _field, _open(model="tiny", mode=7)),
    ("open: unknown durability", _field, _open(model="tiny", durability=9)),
    ("open: idle time of 0", _field, _open(model="tiny", idle_ttl=seconds(0))),
    ("open: idle time below 0", _field, _open(model="tiny", idle_ttl=seconds(-1))),
    ("open: idle time too long", _field, _open(model="tiny", idle_ttl=seconds(86_400.001))),
    ("open: a memory", _memory, _open(model="tiny", memory=_a_memory)),
    ("open: 17 labels", _field, _open(model="tiny", labels={str(n): "" for n in range(17)})),
    ("open: an empty label", _field, _open(model="tiny", labels={"": "x"})),
    ("open: a long label", _field, _open(model="tiny", labels={"k" * 65: "x"})),
    ("open: a long label's value", _field, _open(model="tiny", labels={"k": "x" * 257})),
    ("open: resume without id", _field, _open(model="tiny", mode=2)),
    ("open: resume an absent one", _absent, _open(session_id="absent-1", mode=2)),
    (
        "open: durability without a store",
        Refusal("UNIMPLEMENTED", "NOT_SUPPORTED"),
        _open(model="tiny", durability=3),
    ),
    (
        "open: create one there is",
        Refusal("ALREADY_EXISTS", "SESSION_EXISTS"),
        _open_this(model="tiny", mode=1),
    ),
    ("open: of another model", _mismatch, _open_this(model="words")),
    ("open: of another version", _mismatch, _open_this(model="tiny", version=2)),
    ("open: a token that is none", Refusal(INVALID, "INVALID_TOKEN"), _open_this(token="%%%")),
    ("open: a token of no form", Refusal(INVALID, "INVALID_TOKEN"), _open_this(token="YQ")),
    ("step: absent", _absent, lambda wire, _: wire.step("absent-1", 1, X[:1])),
    ("step: id malformed", _field, lambda wire, _: wire.step("a b", 1, X[:1])),
    ("step: no id", _field, lambda wire, _: wire.step("", 1, X[:1])),
    (
        "step: epoch over",
        Refusal("ABORTED", "SESSION_SUPERSEDED"),
        lambda wire, session_id: wire.step(session_id, 6, X[:1], epoch=9),
    ),
    ("get: absent", _absent, lambda wire, _: wire.get("absent-1")),
    ("get: id malformed", _field, lambda wire, _: wire.get("../x")),
    ("close: absent", _absent, lambda wire, _: wire.close("absent-1")),
    ("export: absent", _absent, lambda wire, _: wire.export("absent-1")),
    (
        "reset: absent",
        _absent,
        _sessions("ResetSession", session_pb2.ResetSessionRequest(session_id="absent-1")),
    ),
    (
        "list: page size below 0",
        _field,
        _sessions("ListSessions", session_pb2.ListSessionsRequest(page_size=-1)),
    ),
    (
        "list: page token malformed",
        _field,
        _sessions("ListSessions", session_pb2.ListSessionsRequest(page_token="a b")),
    ),
    (
        "fork: absent",
        _absent,
        _sessions(
            "ForkSession",
            session_pb2.ForkSessionRequest(session_id="absent-1", new_session_ids=[""]),
        ),
    ),
    ("fork: none wanted", _field, _fork()),
    ("fork: too many", _field, _fork(*[""] * 65)),
    ("fork: one id twice", _field, _fork("twin", "twin")),
    ("fork: id malformed", _field, _fork("a b")),
    ("fork: step below 0", _field, _fork("", at_step=-1)),
    (
        "fork: at another step",
        Refusal("FAILED_PRECONDITION", "CHECKPOINT_NOT_RETAINED"),
        _fork("", at_step=4),
    ),
    (
        "import: nothing",
        _corrupt,
        _sessions("ImportSession", session_pb2.ImportSessionRequest()),
    ),
    (
        "import: something else",
        _corrupt,
        _sessions("ImportSession", session_pb2.ImportSessionRequest(snapshot=b"x" * 500)),
    ),
    ("predict: unknown model", _no_model, _predict(model="none", length=2, rows=_rows)),
    ("predict: no model", _no_model, _predict(length=2, rows=_rows)),
    ("predict: no steps", Refusal(INVALID, "EMPTY_CHUNK"), _predict(model="tiny")),
    (
        "predict: bytes",
        Refusal(INVALID, "INVALID_SHAPE"),
        _predict(model="tiny", length=3, rows=_rows),
    ),
    (
        "predict: NaN",
        Refusal(INVALID, "NON_FINITE_INPUT"),
        _predict(model="tiny", length=2, rows=_with(np.nan).tobytes()),
    ),
    (
        "predict: output mode",
        _field,
        _predict(model="tiny", length=2, rows=_rows, output=9),
    ),
    ("predict: a memory", _memory, _predict(model="tiny", length=2, rows=_rows, memory=_a_memory)),
    ("generate: no target", _field, _generate(steps_max=1)),
    ("generate: unknown model", _no_model, _generate(**{**_prompt, "model": "none"})),
    ("generate: absent", _absent, _generate(session_id="absent-1", steps_max=1)),
    ("generate: no prompt", _field, _generate(model="words", steps_max=1)),
    ("generate: no steps", _field, _generate(**{**_prompt, "steps_max": 0})),
    ("generate: steps below 0", _field, _generate(**{**_prompt, "steps_max": -5})),
    (
        "generate: a prompt length below 0",
        _field,
        _generate(**{**_prompt, "prompt_length": -1}),
    ),
    (
        "generate: bytes",
        Refusal(INVALID, "INVALID_SHAPE"),
        _generate(**{**_prompt, "prompt_length": 3}),
    ),
    (
        "generate: a token beyond",
        Refusal(INVALID, "TOKEN_OUT_OF_RANGE"),
        _generate(**{**_prompt, "prompt": np.array([0, 1, 2, 7], np.int32).tobytes()}),
    ),
    ("generate: temperature NaN", _field, _generate(**_prompt, temperature=float("nan"))),
    ("generate: temperature below 0", _field, _generate(**_prompt, temperature=-0.1)),
    ("generate: top_k below 0", _field, _generate(**_prompt, top_k=-1)),
    ("generate: stop token beyond", _field, _generate(**_prompt, stop_tokens=[7])),
    ("generate: first step with a model", _field, _generate(**_prompt, first_step=3)),
    ("generate: a memory", _memory, _generate(**_prompt, memory=_a_memory)),
    (
        "generate: outputs are no inputs",
        Refusal("FAILED_PRECONDITION", "MODEL_NOT_GENERATIVE"),
        _generate(model="tiny", prompt=_rows, prompt_length=2, steps_max=1),
    ),
    (
        "generate: sampling of features",
        _field,
        _generate(model="loop", prompt=bytes(8), prompt_length=1, steps_max=1, temperature=1.0),
    ),
    (
        "get model: unknown",
        _no_model,
        lambda wire, _: wire.models.GetModel(model_pb2.GetModelRequest(name="none")),
    ),
    (
        "get model: unknown version",
        _no_model,
        lambda wire, _: wire.models.GetModel(model_pb2.GetModelRequest(name="tiny", version=3)),
    ),
    (
        "list models: page token",
        _field,
        lambda wire, _: wire.models.ListModels(model_pb2.ListModelsRequest(page_token="x")),
    ),
    (
        "list models: page size",
        _field,
        lambda wire, _: wire.models.ListModels(model_pb2.ListModelsRequest(page_size=-1)),
    ),
]


@pytest.mark.parametrize(
    ("expected", "call"), [case[1:] for case in CALLS], ids=[case[0] for case in CALLS]
)
async def test_a_wrong_call(wire: Wire, expected: Refusal, call: Call) -> None:
    session_id = await wire.new_session("tiny")
    await wire.step(session_id, 1, X[:5])
    before = await _summary(wire)
    said = await refused(call(wire, session_id))
    assert said == expected
    assert said.message
    assert said.retry_seconds is None
    assert await _summary(wire) == before
    follow = (await wire.step(session_id, 6, X[5:6])).rows
    assert follow == (await wire.predict("tiny", X[:6]))[-8:]
    await wire.close(session_id)


async def _summary(wire: Wire) -> list[tuple[str, int, int]]:
    """Every session there is, with its epoch and its step."""
    page = await wire.sessions.ListSessions(session_pb2.ListSessionsRequest(page_size=1000))
    assert not page.next_page_token
    return [(each.session_id, each.epoch, each.applied_step) for each in page.sessions]


async def test_a_field_at_fault_is_named(wire: Wire) -> None:
    said = await refused(wire.open("tiny", session_id="a b"))
    assert said.metadata == {"field": "session_id"}
    said = await refused(wire.open("tiny", idle_ttl=seconds(0)))
    assert said.metadata == {"field": "idle_ttl"}


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


async def test_closed_sessions_are_told_from_absent_ones_to_their_owner(wire: Wire) -> None:
    session_id = await wire.new_session("tiny")
    await wire.close(session_id)
    gone = Refusal("NOT_FOUND", "SESSION_CLOSED")
    assert await refused(wire.step(session_id, 1, X[:1])) == gone
    assert await refused(wire.close(session_id)) == gone
    assert await refused(wire.open(session_id=session_id, mode=2)) == gone
    again = await wire.open("tiny", session_id=session_id)  # the id is free again
    assert not again.resumed


async def test_a_token_of_another_server_life_says_that_state_is_lost(wire: Wire) -> None:
    import base64

    session_id = await wire.new_session("tiny")
    token = base64.urlsafe_b64encode(f"{'0' * 32}/1/{session_id}".encode()).decode().rstrip("=")
    said = await refused(wire.open(session_id=session_id, token=token))
    assert said == Refusal("DATA_LOSS", "STORE_LOST_WRITES")
    mine = (await wire.open(session_id=session_id)).token
    other = await wire.new_session("tiny")
    assert await refused(wire.open(session_id=other, token=mine)) == Refusal(
        INVALID, "INVALID_TOKEN"
    )
