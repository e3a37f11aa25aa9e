"""Traces: what comes with steps and streams, and what a broken connection leaves of them."""

import numpy as np
import pytest

import conveyor_client
from conveyor.v1 import session_pb2
from conveyor_client import InvalidShape, NotSupported, ServerError, Trace, aio
from conveyor_client._nouns import TraceMode
from conveyor_client._trace import TracePiece, trace_from_pieces
from tests.unit.client.conftest import QUICK
from tests.unit.client.fake.models import LOOKER, attention_weights, gate_values
from tests.unit.client.fake.server import FakeServer
from tests.unit.client.fake.sessions import State, make_trace

MEMORY = np.arange(12.0).reshape(4, 3)
UNITS = {"gru": 4, "lstm": 5}


@pytest.fixture
def server(server: FakeServer) -> FakeServer:
    server.models.append(LOOKER)
    return server


def assert_is_trace(trace: Trace, first_step: int, steps: int) -> None:
    """Every value of a full trace of the `looker`, in its place."""
    assert trace.first_step == first_step
    assert len(trace) == steps
    assert trace.complete
    assert [(layer.layer, layer.cell) for layer in trace.layers] == [(0, "gru"), (1, "lstm")]
    assert [list(layer.gates) for layer in trace.layers] == [list("rznh"), list("ifgoch")]
    for layer in trace.layers:
        for gate in layer:
            units = UNITS[layer.cell]
            expected = gate_values(layer.layer, gate.name, first_step, steps, units)
            assert gate.units == units
            np.testing.assert_array_equal(gate.values, expected)
            np.testing.assert_allclose(gate.mean, expected.mean(axis=1), rtol=1e-6)
    np.testing.assert_array_equal(trace.attention, attention_weights(first_step, steps, 4))


@pytest.mark.parametrize("piece_steps_max", [1, 2, 64])
async def test_a_full_trace_has_a_row_for_each_step(
    server: FakeServer, client: aio.Client, piece_steps_max: int
) -> None:
    server.faults.piece_steps_max = piece_steps_max
    async with client.session("looker", memory=MEMORY) as session:
        one, trace = await session.step_with_trace([1, 1], mode="full")
        assert one.tolist() == [6.5, 6.5]
        assert_is_trace(trace, 1, 1)
        many, trace = await session.step_with_trace(np.ones((100, 2)), mode="full")
        assert many.shape == (100, 2)
        assert_is_trace(trace, 2, 100)
    assert server.world.frames[1].steps.entries[0].trace == session_pb2.TRACE_MODE_FULL


async def test_a_summary_says_the_same_as_the_values(client: aio.Client) -> None:
    async with client.session("tokens") as session:
        _, full = await session.step_with_trace([1, 2, 3], mode="full")
    async with client.session("tokens") as session:
        _, summary = await session.step_with_trace([1, 2, 3])
    assert summary.attention is None
    for gate in full.layers[0]:
        other = summary.layers[0][gate.name]
        assert other.values is None
        for name in ("mean", "minimum", "maximum", "share_low", "share_high"):
            ours, theirs = getattr(gate, name), getattr(other, name)
            assert ours.shape == (3,)
            np.testing.assert_allclose(ours, theirs, atol=1e-6, err_msg=name)
    values = full.layers[0]["f"].values
    assert values is not None
    np.testing.assert_allclose(summary.layers[0]["f"].share_low, (values < 0.1).mean(axis=1))


async def test_a_stream_yields_each_output_with_its_trace(
    server: FakeServer, client: aio.Client
) -> None:
    async with client.session("looker", memory=MEMORY) as session:
        inputs = [[1.0, 1.0], np.ones((3, 2)), [2.0, 2.0]]
        answers = session.stream_with_trace(inputs, mode="full", in_flight=2)
        made = [answer async for answer in answers]
        assert [out.shape for out, _ in made] == [(2,), (3, 2), (2,)]
        for (_, trace), (first_step, steps) in zip(made, [(1, 1), (2, 3), (5, 1)], strict=True):
            assert_is_trace(trace, first_step, steps)
        assert_is_trace(Trace.joined([trace for _, trace in made]), 1, 5)


async def test_tracing_a_stream_stops_at_a_bad_input(client: aio.Client) -> None:
    async with client.session("counter") as session:
        answers = session.stream_with_trace([[1, 1], [1, 1, 1], [1, 1]])
        assert (await anext(answers))[1].complete
        with pytest.raises(InvalidShape):
            await anext(answers)
        assert session.applied_step == 1


async def test_a_stream_with_trace_left_early_can_be_followed(client: aio.Client) -> None:
    async with client.session("counter") as session:
        async for _, trace in session.stream_with_trace([[1, 1]] * 10, in_flight=3):
            assert trace.complete
            break
        _, trace = await session.step_with_trace([0, 0])
        assert trace.first_step == session.applied_step


async def test_a_server_without_traces_says_so(server: FakeServer, client: aio.Client) -> None:
    server.traces = False
    async with client.session("counter") as session:
        with pytest.raises(NotSupported):
            await session.step_with_trace([1, 1])
        assert (await session.step([1, 1])).tolist() == [1, 1]


async def test_a_unary_step_is_traced_too(client: aio.Client) -> None:
    await client.open_session("looker", session_id="one", memory=MEMORY)
    result = await client.step("one", np.ones((2, 2)), first_step=1, trace="full")
    assert result.trace is not None
    assert_is_trace(result.trace, 1, 2)
    summary = (await client.step("one", [1, 1], first_step=3, trace="summary")).trace
    assert summary is not None
    assert summary.layers[1]["f"].values is None
    assert (await client.step("one", [1, 1], first_step=4)).trace is None
    again = await client.step("one", [1, 1], first_step=4, trace="full")
    assert again.duplicate
    assert again.trace is not None
    assert again.trace.covered.tolist() == [False]
    assert not again.trace.layers


@pytest.mark.parametrize("mode", ["full", "summary"])
async def test_a_unary_step_answered_in_part_from_memory_has_the_trace_of_its_rest(
    client: aio.Client, mode: TraceMode
) -> None:
    await client.open_session("looker", session_id="one", memory=MEMORY)
    await client.step("one", np.ones((3, 2)), first_step=1)
    result = await client.step("one", np.ones((5, 2)), first_step=1, trace=mode)
    assert result.duplicate
    assert result.trace is not None
    assert result.trace.covered.tolist() == [False] * 3 + [True] * 2
    for layer in result.trace.layers:
        for gate in layer:
            expected = gate_values(layer.layer, gate.name, 4, 2, gate.units).mean(axis=1)
            np.testing.assert_allclose(gate.mean[3:], expected, rtol=1e-6)


def test_the_blocking_twin_traces_alike(threaded_server: FakeServer) -> None:
    threaded_server.models.append(LOOKER)
    with (
        conveyor_client.Client(threaded_server.target, options=QUICK) as client,
        client.session("looker", memory=MEMORY) as session,
    ):
        out, trace = session.step_with_trace([[1, 1], [1, 1]], mode="full")
        assert out.shape == (2, 2)
        assert_is_trace(trace, 1, 2)
        made = list(session.stream_with_trace(([n, 1] for n in range(20)), mode="full"))
        assert [out[1] - 5.5 for out, _ in made] == list(range(3, 23))
        for n, (_, trace) in enumerate(made):
            assert_is_trace(trace, 3 + n, 1)
        result = client.step(session.session_id, [0, 0], first_step=23, trace="summary")
        assert result.trace is not None
        assert result.trace.complete


async def test_steps_answered_from_memory_leave_gaps_and_no_row_is_out_of_place(
    server: FakeServer, client: aio.Client
) -> None:
    server.faults.piece_steps_max = 4
    async with client.session("looker", memory=MEMORY) as session:
        server.faults.break_after_results = 1  # 64 steps ran by then, and 4 were told
        out, trace = await session.step_with_trace(np.ones((200, 2)), mode="full")
    assert server.streams_seen == 2
    np.testing.assert_array_equal(out[:, 0], 5.5 + np.arange(1, 201))
    told = trace.covered
    assert not trace.complete
    assert told[:4].all()
    assert not told[4:64].any()
    assert told[192:].all()  # sent after the break only: too many were in flight before
    assert trace.attention is not None
    rows = [(trace.attention, attention_weights(1, 200, 4))]
    for layer in trace.layers:
        for gate in layer:
            assert gate.values is not None
            rows.append((gate.values, gate_values(layer.layer, gate.name, 1, 200, gate.units)))
            assert np.isnan(gate.summary[~told]).all()
            assert not np.isnan(gate.summary[told]).any()
    for ours, expected in rows:
        np.testing.assert_array_equal(ours[told], expected[told])
        assert np.isnan(ours[~told]).all()


async def test_a_summary_has_gaps_too_and_may_be_all_gap(
    server: FakeServer, client: aio.Client
) -> None:
    async with client.session("tokens") as session:
        server.faults.break_after_results = 0
        _, lost = await session.step_with_trace([1, 2])
        assert lost.covered.tolist() == [False, False]
        assert list(lost.layers) == []
        assert lost.attention is None
        _, trace = await session.step_with_trace([1, 2])
        both = Trace.joined([lost, trace])
        assert both.covered.tolist() == [False, False, True, True]
        assert np.isnan(both.layers[0]["f"].mean).tolist() == [True, True, False, False]
        assert both.first_step == 1
        assert Trace.joined([lost, lost]).covered.tolist() == [False] * 4


def make_piece(first_step: int, length: int, *, skipped: int = 0, mode: int = 2) -> TracePiece:
    state = State("one", LOOKER, memory=MEMORY)
    trace = make_trace(state, mode, first_step - skipped, length + skipped)
    return TracePiece(length, trace, skipped)


def test_a_piece_told_in_part_before_gives_its_rest() -> None:
    pieces = [make_piece(1, 3), make_piece(4, 2, skipped=2), make_piece(6, 1)]
    assert_is_trace(trace_from_pieces(1, pieces), 1, 6)
    (layer, *_) = trace_from_pieces(1, [make_piece(4, 2, skipped=2, mode=1)]).layers
    np.testing.assert_allclose(
        layer["r"].mean, gate_values(0, "r", 4, 2, 4).mean(axis=1), rtol=1e-6
    )


@pytest.mark.parametrize("damage", ["values", "units", "summaries", "attention", "gates"])
def test_a_trace_that_does_not_fit_is_an_error_of_the_server(damage: str) -> None:
    pieces = [make_piece(1, 2), make_piece(3, 2, mode=1 if damage == "summaries" else 2)]
    trace = pieces[1].trace
    assert trace is not None
    gate = trace.layers[0].gates[0]
    if damage == "values":
        gate.values = gate.values[4:]
    elif damage == "units":
        gate.units = 0
    elif damage == "summaries":
        del gate.summaries[0]
    elif damage == "attention":
        trace.attention += b"four"
    else:
        del trace.layers[0].gates[0]
    with pytest.raises(ServerError):
        trace_from_pieces(1, pieces)
