"""Memories, traces and whole sequences, on a real server over a real socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pytest
import torch

from conveyor.v1 import model_pb2, session_pb2
from conveyor_models import Bundle, Network
from tests.integration.bundles import add_model
from tests.integration.conftest import StartServer
from tests.integration.process import ServerProcess
from tests.integration.wire import Entry, Refusal, Wire, floats, refused

Rows = Callable[..., npt.NDArray[Any]]

LOOKING: Final[dict[str, Any]] = {
    "input": {"kind": "features", "size": 3},
    "attention": {"memory_size": 5, "size": 6, "gate": True, "head": True},
    "layers": [{"cell": "lstm", "size": 9, "projection": 4}, {"cell": "gru", "size": 7}],
    "head": {"size": 2},
}
BOTHWAYS: Final[dict[str, Any]] = {
    "input": {"kind": "features", "size": 3},
    "layers": [
        {"cell": "lstm", "size": 6, "direction": "bidirectional"},
        {"cell": "gru", "size": 5, "direction": "reverse"},
    ],
    "head": {"size": 2},
}
MODES: Final = (session_pb2.TRACE_MODE_SUMMARY, session_pb2.TRACE_MODE_FULL)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Bundle, Bundle]:
    folder = tmp_path_factory.mktemp("attentive")
    return (
        folder,
        add_model(folder, "looking", LOOKING, seed=3),
        add_model(folder, "bothways", BOTHWAYS, seed=4),
    )


@pytest.fixture(scope="module")
def server(start_server: StartServer, models: tuple[Path, Bundle, Bundle]) -> ServerProcess:
    settings = {
        "engine.slots": 2,
        "engine.quantum_steps": 4,
        "limits.memory_rows_max": 12,
        "limits.memories_bytes_max": 1024,
        "limits.result_bytes_max": 4096,
        "shutdown.grace_seconds": 2,
    }
    return start_server(settings, models=models[0])


@pytest.fixture
async def wire(server: ServerProcess) -> AsyncIterator[Wire]:
    async with Wire(server.address) as connected:
        yield connected


def memory(length: int, seed: int = 0) -> session_pb2.Memory:
    values = np.random.default_rng(seed).standard_normal((length, 5), dtype=np.float32)
    return session_pb2.Memory(length=length, rows=values.tobytes())


def reference(
    bundle: Bundle, x: npt.NDArray[Any], given: session_pb2.Memory
) -> npt.NDArray[np.float32]:
    """What `conveyor_models.Network` makes of one sequence, [steps, outputs]."""
    network = Network(bundle.spec, bundle.weights)
    rows = torch.from_numpy(floats(given.rows, 5).copy()).unsqueeze(0)
    _, y = network.run(torch.from_numpy(x.copy()).unsqueeze(1), memory=network.memory(rows))
    return y.squeeze(1).numpy()


async def traced(
    wire: Wire, session_id: str, x: npt.NDArray[Any], mode: int, first_step: int = 1
) -> session_pb2.StepResponse:
    request = session_pb2.StepRequest(
        session_id=session_id,
        first_step=first_step,
        length=len(x),
        rows=x.tobytes(),
        trace=session_pb2.TraceMode.ValueType(mode),
    )
    return await wire.sessions.Step(request)


REFUSED: Final[list[tuple[str, session_pb2.Memory | None, str, str]]] = [
    ("none", None, "INVALID_ARGUMENT", "INVALID_MEMORY"),
    ("no row", session_pb2.Memory(), "INVALID_ARGUMENT", "INVALID_MEMORY"),
    ("rows below none", session_pb2.Memory(length=-1), "INVALID_ARGUMENT", "INVALID_MEMORY"),
    ("a row short", session_pb2.Memory(length=2, rows=bytes(20)), "INVALID_ARGUMENT",
     "INVALID_SHAPE"),
    ("a byte over", session_pb2.Memory(length=1, rows=bytes(21)), "INVALID_ARGUMENT",
     "INVALID_SHAPE"),
    ("NaN", session_pb2.Memory(length=1, rows=np.full(5, np.nan, np.float32).tobytes()),
     "INVALID_ARGUMENT", "NON_FINITE_INPUT"),
    ("a row too many", memory(13), "RESOURCE_EXHAUSTED", "MEMORY_TOO_LARGE"),
    ("rows beyond counting", session_pb2.Memory(length=2**62), "RESOURCE_EXHAUSTED",
     "MEMORY_TOO_LARGE"),
]  # fmt: skip


@pytest.mark.parametrize(("what", "given", "code", "reason"), REFUSED, ids=[r[0] for r in REFUSED])
async def test_a_wrong_memory_is_refused_wherever_one_is_given(
    wire: Wire, rows: Rows, what: str, given: session_pb2.Memory | None, code: str, reason: str
) -> None:
    expected = Refusal(code, reason)
    assert await refused(wire.open("looking", session_id="wrong", memory=given)) == expected
    async with wire.stream() as stream:
        assert await stream.open_or_fail("looking", memory=given) == expected
    request = session_pb2.PredictRequest(
        model="looking", length=2, rows=rows(2).tobytes(), memory=given
    )
    assert await refused(wire.sessions.Predict(request)) == expected
    listed = await wire.sessions.ListSessions(session_pb2.ListSessionsRequest())
    assert listed.total_size == 0


async def test_the_model_tells_what_it_attends_over(wire: Wire) -> None:
    answer = await wire.models.GetModel(model_pb2.GetModelRequest(name="looking"))
    assert answer.model.streamable
    assert answer.model.signature.memory.row_elements == 5
    assert answer.model.signature.memory.row_bytes == 20
    assert answer.model.limits.memory_rows_max == 12
    other = await wire.models.GetModel(model_pb2.GetModelRequest(name="bothways"))
    assert not other.model.streamable
    assert not other.model.signature.HasField("memory")


async def test_a_memory_follows_its_session_everywhere(
    wire: Wire, rows: Rows, models: tuple[Path, Bundle, Bundle]
) -> None:
    x, given = rows(30), memory(7)
    expected = reference(models[1], x, given)
    opened = (await wire.open("looking", session_id="one", memory=given)).session
    assert (opened.memory_rows, opened.state_bytes) == (7, 4 * (4 + 9 + 7) + 7 * 20)
    out = [(await wire.step("one", 1, x[:9])).rows]
    fork = session_pb2.ForkSessionRequest(session_id="one", new_session_ids=["two", "three"])
    assert [each.memory_rows for each in (await wire.sessions.ForkSession(fork)).sessions] == [7, 7]
    snapshot = await wire.export("one")
    imported = (
        await wire.sessions.ImportSession(
            session_pb2.ImportSessionRequest(snapshot=snapshot, session_id="four")
        )
    ).session
    assert (imported.memory_rows, imported.applied_step) == (7, 9)
    await wire.close("one")  # the others go on with what it brought
    out.append(b"")
    for start in range(9, 30, 7):  # two slots for three sessions: each is paged out and in
        parts = [
            (await wire.step(name, start + 1, x[start : start + 7])).rows
            for name in ("two", "three", "four")
        ]
        assert parts[0] == parts[1] == parts[2]
        out.append(parts[0])
    np.testing.assert_allclose(floats(b"".join(out), 2), expected, rtol=1e-5, atol=1e-5)
    request = session_pb2.PredictRequest(model="looking", length=30, rows=x.tobytes(), memory=given)
    assert (await wire.sessions.Predict(request)).rows == b"".join(out)
    for name in ("two", "three", "four"):
        await wire.close(name)


async def test_what_a_session_attends_over_never_changes(wire: Wire, rows: Rows) -> None:
    x = rows(6)
    await wire.open("looking", session_id="s", memory=memory(3))
    out = (await wire.step("s", 1, x)).rows
    refusal = await refused(wire.open("looking", session_id="s", memory=memory(3, seed=1)))
    assert refusal == Refusal("FAILED_PRECONDITION", "SESSION_MISMATCH")
    assert (await wire.open("looking", session_id="s", memory=memory(3))).resumed
    assert (await wire.open(session_id="s")).session.memory_rows == 3
    await wire.sessions.ResetSession(session_pb2.ResetSessionRequest(session_id="s"))
    assert (await wire.step("s", 1, x)).rows == out
    await wire.close("s")


async def test_memories_are_counted_and_bounded(wire: Wire, server: ServerProcess) -> None:
    names = [f"n{number}" for number in range(4)]
    for name in names:
        await wire.open("looking", session_id=name, memory=memory(12))
    assert server.metric("conveyor_state_bytes", tier="host") == 4 * 240
    assert server.metric("conveyor_memories_bytes") == 4 * 240
    assert server.metric("conveyor_limit", setting="memories_bytes_max") == 1024
    refusal = await refused(wire.open("looking", memory=memory(12)))
    assert refusal == Refusal("RESOURCE_EXHAUSTED", "SESSIONS_LIMIT")
    assert refusal.metadata["limit"] == "limits.memories_bytes_max"
    assert refusal.retry_seconds
    await wire.open("looking", session_id="small", memory=memory(3))  # as large as there is room
    for name in (*names, "small"):
        await wire.close(name)
    assert server.metric("conveyor_state_bytes", tier="host") == 0
    assert server.metric("conveyor_memories_bytes") == 0


@pytest.mark.parametrize("mode", MODES)
async def test_a_trace_shows_the_gates_and_changes_no_bit(
    wire: Wire, rows: Rows, mode: int
) -> None:
    x = rows(10)
    for name in ("plain", "watched"):
        await wire.open("looking", session_id=name, memory=memory(4))
    plain = await wire.step("plain", 1, x)
    assert not plain.HasField("trace")
    watched = await traced(wire, "watched", x, mode)
    assert watched.rows == plain.rows
    _check_trace(watched.trace, mode, steps=10)
    again = await traced(wire, "watched", x, mode)
    assert again.duplicate
    assert again.rows == plain.rows
    assert not again.HasField("trace")
    for name in ("plain", "watched"):
        await wire.close(name)
    async with wire.stream() as stream:
        handle = (await stream.open("looking", memory=memory(4))).handle
        await stream.send_steps(Entry(handle, 1, x, trace=mode))
        out, done = b"", 0
        while done < 10:
            results = await stream.next("results")
            for entry in results.entries:
                _check_trace(entry.trace, mode, steps=entry.length)
                done += entry.length
            out += results.rows
        assert out == plain.rows
        await stream.send(close=session_pb2.CloseFrame(handle=handle))
        await stream.next("closed")


def _check_trace(trace: session_pb2.Trace, mode: int, *, steps: int) -> None:
    assert [layer.cell for layer in trace.layers] == ["lstm", "gru"]
    names = [[(gate.name, gate.units) for gate in layer.gates] for layer in trace.layers]
    assert names[0] == [("i", 9), ("f", 9), ("g", 9), ("o", 9), ("c", 9), ("h", 4)]
    assert names[1] == [("r", 7), ("z", 7), ("n", 7), ("h", 7)]
    assert trace.attention_columns == 4
    weights = floats(trace.attention, 4)
    assert len(weights) == steps
    np.testing.assert_allclose(weights.sum(axis=1), 1.0, rtol=1e-5)
    for gate in (gate for layer in trace.layers for gate in layer.gates):
        if mode == session_pb2.TRACE_MODE_FULL:
            assert len(floats(gate.values, gate.units)) == steps
            assert not gate.summaries
        else:
            assert len(gate.summaries) == steps
            assert not gate.values
            assert all(each.minimum <= each.mean <= each.maximum for each in gate.summaries)


async def test_a_trace_too_large_is_refused_before_anything_runs(wire: Wire, rows: Rows) -> None:
    await wire.open("looking", session_id="big", memory=memory(4))
    x = rows(20)  # 4096 bytes hold 12 full traces, and the summaries of 14 steps
    refusal = await refused(traced(wire, "big", x, session_pb2.TRACE_MODE_FULL))
    assert refusal == Refusal("INVALID_ARGUMENT", "CHUNK_TOO_LONG")
    assert refusal.metadata["limit"] == "limits.result_bytes_max"
    unknown = await refused(traced(wire, "big", x, 3))
    assert unknown == Refusal("INVALID_ARGUMENT", "INVALID_FIELD")
    assert (await wire.get("big")).applied_step == 0
    await wire.step("big", 1, x)
    await wire.close("big")


async def test_a_whole_sequence_runs_through_layers_from_its_end(
    wire: Wire, rows: Rows, models: tuple[Path, Bundle, Bundle]
) -> None:
    x = rows(37)
    network = Network(models[2].spec, models[2].weights)
    expected = network.predict(torch.from_numpy(x.copy()).unsqueeze(1)).squeeze(1).numpy()
    several = await asyncio.gather(*(wire.predict("bothways", x) for _ in range(6)))
    assert len(set(several)) == 1
    np.testing.assert_allclose(floats(several[0], 2), expected, rtol=1e-5, atol=1e-5)
    for output, outputs in ((session_pb2.OUTPUT_MODE_LAST, 1), (session_pb2.OUTPUT_MODE_NONE, 0)):
        request = session_pb2.PredictRequest(
            model="bothways", length=37, rows=x.tobytes(), output=output
        )
        answer = await wire.sessions.Predict(request)
        assert answer.rows_length == outputs
        assert answer.rows == several[0][len(several[0]) - outputs * 8 :]


async def test_no_session_can_be_opened_on_such_a_model(wire: Wire) -> None:
    expected = Refusal("FAILED_PRECONDITION", "MODEL_NOT_STREAMABLE")
    refusal = await refused(wire.open("bothways"))
    assert refusal == expected
    assert "0 (bidirectional), 1 (reverse)" in refusal.message
    async with wire.stream() as stream:
        assert await stream.open_or_fail("bothways") == expected
    generate = session_pb2.GenerateRequest(model="bothways", steps_max=1)
    assert await refused(wire.sessions.Generate(generate).read()) == expected
    request = session_pb2.PredictRequest(
        model="bothways", length=1, rows=bytes(12), memory=memory(1)
    )
    assert await refused(wire.sessions.Predict(request)) == Refusal(
        "INVALID_ARGUMENT", "INVALID_MEMORY"
    )
