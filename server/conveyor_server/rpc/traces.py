"""Traces as messages. Made when they are written: summaries become a message for each number."""

import struct
from collections.abc import Sequence
from typing import Final

from conveyor.v1 import session_pb2
from conveyor_server.core import SUMMARY_VALUES, GateTrace, LayerTrace, Trace, TraceMode

_SUMMARY: Final = struct.Struct(f"<{SUMMARY_VALUES}f")


def trace_message(traces: Sequence[Trace]) -> session_pb2.Trace:
    """One trace of consecutive pieces' traces, in order; at least one."""
    first = traces[0]
    return session_pb2.Trace(
        layers=[
            _layer(first.mode, [each.layers[number] for each in traces])
            for number in range(len(first.layers))
        ],
        attention=b"".join(each.attention for each in traces),
        attention_columns=first.attention_columns,
    )


def _layer(mode: TraceMode, parts: Sequence[LayerTrace]) -> session_pb2.LayerTrace:
    first = parts[0]
    return session_pb2.LayerTrace(
        layer=first.layer,
        cell=first.cell,
        gates=[
            _gate(mode, [part.gates[number] for part in parts])
            for number in range(len(first.gates))
        ],
    )


def _gate(mode: TraceMode, parts: Sequence[GateTrace]) -> session_pb2.GateTrace:
    first, values = parts[0], b"".join(part.values for part in parts)
    gate = session_pb2.GateTrace(name=first.name, units=first.units)
    if mode is TraceMode.FULL:
        gate.values = values
        return gate
    for mean, minimum, maximum, share_low, share_high in _SUMMARY.iter_unpack(values):
        gate.summaries.add(
            mean=mean,
            minimum=minimum,
            maximum=maximum,
            share_low=share_low,
            share_high=share_high,
        )
    return gate
