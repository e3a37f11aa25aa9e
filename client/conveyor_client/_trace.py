"""Gate activations that came with results."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from conveyor.v1 import session_pb2
from conveyor_client._nouns import FloatArray


@dataclass(frozen=True, slots=True)
class GateTrace:
    """What one gate did, step by step.

    Attributes:
        units: Units of the gate.
        values: Every activation, (K, units); None in a summary.
        mean: Mean over the units, (K,); empty with "full", like the others below.
        minimum: The least activation, (K,).
        maximum: The greatest, (K,).
        share_low: The share of units below 0.1, (K,).
        share_high: The share above 0.9, (K,).
    """

    units: int
    values: FloatArray | None
    mean: FloatArray
    minimum: FloatArray
    maximum: FloatArray
    share_low: FloatArray
    share_high: FloatArray


@dataclass(frozen=True, slots=True)
class LayerTrace:
    """One layer: its cell, and its gates by name ("i", "f", "g", "o", "r", "z", "n", "c", "h")."""

    cell: str
    gates: Mapping[str, GateTrace]


@dataclass(frozen=True, slots=True)
class Trace:
    """What the network did while it ran a chunk of K steps.

    Attributes:
        layers: Bottom first.
        attention: Weights over the memory, (K, M); None without attention.
    """

    layers: Sequence[LayerTrace]
    attention: FloatArray | None


def trace_from_proto(pieces: Sequence[session_pb2.Trace]) -> Trace:
    """Joins the traces of a chunk's pieces.

    Args:
        pieces: In order.

    Returns:
        One trace of the whole chunk.
    """
    first = pieces[0] if pieces else session_pb2.Trace()
    layers = [
        LayerTrace(
            layer.cell,
            {
                gate.name: _gate([piece.layers[i].gates[j] for piece in pieces])
                for j, gate in enumerate(layer.gates)
            },
        )
        for i, layer in enumerate(first.layers)
    ]
    attention: FloatArray | None = None
    if first.attention_columns:
        joined = b"".join(piece.attention for piece in pieces)
        attention = np.frombuffer(joined, dtype="<f4").reshape(-1, first.attention_columns)
    return Trace(layers, attention)


def _gate(pieces: Sequence[session_pb2.GateTrace]) -> GateTrace:
    units = pieces[0].units
    joined = b"".join(piece.values for piece in pieces)
    values: FloatArray | None = None
    if joined:
        values = np.frombuffer(joined, dtype="<f4").reshape(-1, units)
    summaries = [summary for piece in pieces for summary in piece.summaries]
    return GateTrace(
        units=units,
        values=values,
        mean=np.array([summary.mean for summary in summaries], dtype=np.float32),
        minimum=np.array([summary.minimum for summary in summaries], dtype=np.float32),
        maximum=np.array([summary.maximum for summary in summaries], dtype=np.float32),
        share_low=np.array([summary.share_low for summary in summaries], dtype=np.float32),
        share_high=np.array([summary.share_high for summary in summaries], dtype=np.float32),
    )
