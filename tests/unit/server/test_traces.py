"""Traces: what the engine shows goes out as it is, in as many bytes as were reckoned with."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conveyor_server.admission.admission import Admission, Binding, Entry, result_bytes
from conveyor_server.config import LimitsConfig
from conveyor_server.core import MemoryRows, Trace, TraceMode
from conveyor_server.errors import ChunkTooLong
from conveyor_server.rpc.traces import trace_message
from tests.support.engine import straight_through, trace_of
from tests.support.models import ATTENTIVE
from tests.support.replies import Recorder
from tests.support.rig import Rig, rows_of

ROW = bytes(12)
MODES = [TraceMode.SUMMARY, TraceMode.FULL]


def made(mode: TraceMode, steps: int, memory_rows: int, first: int = 0) -> Trace:
    rows = rows_of(ATTENTIVE, *range(first, first + steps))
    outputs, _ = straight_through(ATTENTIVE, rows)
    return trace_of(ATTENTIVE, outputs, ROW * memory_rows, mode)


@pytest.mark.parametrize("mode", MODES)
@given(steps=st.integers(1, 40), memory_rows=st.integers(1, 5))
def test_a_trace_takes_no_more_bytes_than_reckoned(
    mode: TraceMode, steps: int, memory_rows: int
) -> None:
    trace = made(mode, steps, memory_rows)
    assert trace_message([trace]).ByteSize() <= trace.size_bytes
    reckoned = steps * ATTENTIVE.trace_step_bytes(mode, memory_rows)
    assert reckoned <= trace.size_bytes <= reckoned + 1_000


@pytest.mark.parametrize("mode", MODES)
def test_pieces_of_a_trace_are_one_trace(mode: TraceMode) -> None:
    parts = [made(mode, 3, 2), made(mode, 4, 2, first=3)]
    message = trace_message(parts)
    assert message.attention_columns == 2
    assert message.attention == parts[0].attention + parts[1].attention
    for number, layer in enumerate(message.layers):
        assert (layer.layer, layer.cell) == (number, ATTENTIVE.layers[number].cell)
        for place, gate in enumerate(layer.gates):
            gates = [part.layers[number].gates[place] for part in parts]
            assert (gate.name, gate.units) == (gates[0].name, gates[0].units)
            values = gates[0].values + gates[1].values
            assert gate.values == (values if mode is TraceMode.FULL else b"")
            assert len(gate.summaries) == (0 if mode is TraceMode.FULL else 7)


def test_a_chunk_whose_results_and_trace_are_too_large_is_refused() -> None:
    a_step = ATTENTIVE.output_row_bytes + ATTENTIVE.trace_step_bytes(TraceMode.FULL, 5)
    admission = Admission(LimitsConfig(result_bytes_max=1024))
    fitting = 1024 // a_step
    binding = Binding("ann", "s", 1, ATTENTIVE, Recorder(), memory_rows=5)
    for length in (fitting, fitting + 1):
        entry = Entry(binding, 1, length, 0, TraceMode.FULL)
        rows = rows_of(ATTENTIVE, *range(length))
        if length == fitting:
            chunk = admission.chunk(entry, rows, 0.0, None)
            assert result_bytes(chunk) == fitting * a_step
        else:
            with pytest.raises(ChunkTooLong):
                admission.chunk(entry, rows, 0.0, None)


@pytest.mark.parametrize("mode", MODES)
def test_a_traced_step_is_like_any_other_and_a_repeated_one_shows_nothing(mode: TraceMode) -> None:
    rig = Rig((ATTENTIVE,), quantum_steps=3)
    for name in ("plain", "watched"):
        rig.open(name, memory=MemoryRows(2, ROW * 2))
    reply = Recorder()
    chunk = rig.send("watched", 1, [1, 2, 3, 4], reply, trace=mode)
    rig.run()
    answer = reply.of(chunk)
    assert answer.rows == rig.step("plain", 1, [1, 2, 3, 4])
    assert [piece.trace and piece.trace.steps for piece in answer.pieces] == [3, 1]
    again = rig.send("watched", 3, [3, 4, 5], reply, trace=mode)
    rig.run()
    pieces = reply.of(again).pieces
    assert [(piece.duplicate, piece.trace is None) for piece in pieces] == [
        (True, True),
        (False, False),
    ]
