"""Whatever is wrong with a call has its status and its reason, and changes no state."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest

from conveyor.v1 import model_pb2, session_pb2
from tests.integration.wire import Refusal, Wire, refused, seconds

INVALID = "INVALID_ARGUMENT"
X = np.random.default_rng(0).standard_normal((40, 3), dtype=np.float32)
TOKENS = np.array([0, 6, 3, 1], dtype=np.int32)

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
_nan = X[:2].copy()
_nan[1, 2] = np.nan
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
        _predict(model="tiny", length=2, rows=_nan.tobytes()),
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
    assert said == Refusal("DATA_LOSS", "SERVER_RESTARTED")
    mine = (await wire.open(session_id=session_id)).token
    other = await wire.new_session("tiny")
    assert await refused(wire.open(session_id=other, token=mine)) == Refusal(
        INVALID, "INVALID_TOKEN"
    )
