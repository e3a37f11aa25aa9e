"""Gate activations that came with results.

Every array of a trace has one row for each step of the chunk, in step with the output rows, so that
row k of a gate belongs to row k of the output. A step may have come without a trace: the answer to
a chunk that was sent again after a broken connection comes from the server's memory, which keeps
outputs only. The rows of such a step are NaN, and `Trace.covered` is False there.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from conveyor.v1 import session_pb2
from conveyor_client._errors import ServerError
from conveyor_client._nouns import FloatArray

LOW, HIGH = 0.1, 0.9
"""Between what a summary counts: the share of units below the one and above the other."""

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class TracePiece:
    """What the server sent of some steps of a chunk.

    Attributes:
        length: Steps.
        trace: Of these steps and of `skipped` before them; None where it kept none.
        skipped: Steps at its beginning that were told before.
    """

    length: int
    trace: session_pb2.Trace | None
    skipped: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class GateTrace:
    """What one gate, or one part of the state, did step by step.

    Attributes:
        name: "i", "f", "g", "o", "r", "z", "n", or for the state "c" and "h".
        units: Units of the gate.
        values: Every activation, (K, units); None in a summary.
        summary: (K, 5): the five arrays below as columns, in their order.
    """

    name: str
    units: int
    values: FloatArray | None
    summary: FloatArray

    @property
    def mean(self) -> FloatArray:
        """Mean over the units, (K,)."""
        return self.summary[:, 0]

    @property
    def minimum(self) -> FloatArray:
        """The least activation, (K,)."""
        return self.summary[:, 1]

    @property
    def maximum(self) -> FloatArray:
        """The greatest activation, (K,)."""
        return self.summary[:, 2]

    @property
    def share_low(self) -> FloatArray:
        """The share of units below 0.1, (K,)."""
        return self.summary[:, 3]

    @property
    def share_high(self) -> FloatArray:
        """The share of units above 0.9, (K,)."""
        return self.summary[:, 4]


@dataclass(frozen=True, slots=True, eq=False)
class LayerTrace:
    """One layer, which is also indexed by gate: ``layer["f"]``.

    Attributes:
        layer: Its number, from 0 at the bottom.
        cell: Its cell, as in the bundle.
        gates: Its gates and state by name.
    """

    layer: int
    cell: str
    gates: Mapping[str, GateTrace]

    def __getitem__(self, gate: str) -> GateTrace:
        return self.gates[gate]

    def __iter__(self) -> Iterator[GateTrace]:
        return iter(self.gates.values())


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """What the network did while it ran K steps.

    Attributes:
        first_step: The number of the first of them.
        covered: Which steps have a trace, (K,); the rows of the others are NaN. All have one unless
            the connection broke.
        layers: Bottom first; empty if no step has a trace.
        attention: Weights over the memory's rows, (K, M); None without attention.
    """

    first_step: int
    covered: BoolArray
    layers: Sequence[LayerTrace]
    attention: FloatArray | None

    def __len__(self) -> int:
        return len(self.covered)

    @property
    def complete(self) -> bool:
        """Whether every step has a trace."""
        return bool(self.covered.all())

    @staticmethod
    def joined(traces: "Sequence[Trace]") -> "Trace":
        """Puts traces of consecutive chunks of one session together.

        Args:
            traces: In order, all of them full or all summaries; at least one.

        Returns:
            One trace of all their steps.
        """
        example = next((trace for trace in traces if trace.layers), traces[0])
        layers = [
            LayerTrace(
                layer.layer,
                layer.cell,
                {gate.name: _joined(traces, n, gate) for gate in layer},
            )
            for n, layer in enumerate(example.layers)
        ]
        attention = example.attention
        if attention is not None:
            columns = attention.shape[1]
            attention = np.concatenate(
                [
                    _nan(len(trace), columns) if trace.attention is None else trace.attention
                    for trace in traces
                ]
            )
        covered = np.concatenate([trace.covered for trace in traces])
        return Trace(traces[0].first_step, covered, layers, attention)


@dataclass(frozen=True, slots=True, eq=False)
class StepResult:
    """The answer to one unary chunk, see `Client.step`.

    Attributes:
        output: As `Session.step` returns it.
        first_step: The number of the chunk's first step.
        durable_step: The session's durable step.
        duplicate: Whether any of the steps was answered from memory.
        trace: If one was asked for.
    """

    output: FloatArray
    first_step: int
    durable_step: int
    duplicate: bool
    trace: Trace | None = None


def _joined(traces: Sequence[Trace], layer: int, gate: GateTrace) -> GateTrace:
    parts = [trace.layers[layer][gate.name] if trace.layers else None for trace in traces]
    summary = [
        _nan(len(trace), 5) if part is None else part.summary
        for trace, part in zip(traces, parts, strict=True)
    ]
    values: FloatArray | None = None
    if gate.values is not None:
        values = np.concatenate(
            [
                _nan(len(trace), gate.units) if part is None or part.values is None else part.values
                for trace, part in zip(traces, parts, strict=True)
            ]
        )
    return GateTrace(gate.name, gate.units, values, np.concatenate(summary))


def trace_from_pieces(first_step: int, pieces: Sequence[TracePiece]) -> Trace:
    """Puts the traces of a chunk's pieces together.

    Args:
        first_step: The number of the chunk's first step.
        pieces: In order, without gaps.

    Returns:
        One trace of the whole chunk.

    Raises:
        ServerError: They do not fit each other or the steps they are of.
    """
    traces = [_from_piece(first_step, piece) for piece in pieces]
    if len({_structure(trace) for trace in traces if trace.layers}) > 1:
        raise _unfit()
    return Trace.joined(traces)


def pieces_of(length: int, trace: session_pb2.Trace | None) -> list[TracePiece]:
    """Cuts the answer to a whole chunk where its trace begins.

    What is answered from the server's memory comes before what ran.

    Args:
        length: Steps of the chunk.
        trace: Of the last of them; None if it has none.

    Returns:
        The pieces for `trace_from_pieces`.
    """
    gates = trace.layers[0].gates if trace is not None and trace.layers else ()
    if not gates:
        return [TracePiece(length, None)]
    row_bytes = 4 * max(gates[0].units, 1)
    traced = len(gates[0].summaries) or len(gates[0].values) // row_bytes
    if traced >= length:
        return [TracePiece(length, trace)]
    return [TracePiece(length - traced, None), TracePiece(traced, trace)]


def _structure(trace: Trace) -> tuple[object, ...]:
    gates = [(gate.name, gate.units) for layer in trace.layers for gate in layer]
    columns = None if trace.attention is None else trace.attention.shape[1]
    return (columns, len(trace.layers), *gates)


def _from_piece(first_step: int, piece: TracePiece) -> Trace:
    """One piece; of `first_step`, only that of the first one is ever looked at."""
    trace, length = piece.trace, piece.length
    if trace is None or not trace.layers:
        return Trace(first_step, np.zeros(length, np.bool_), [], None)
    rows = length + piece.skipped
    layers = [
        LayerTrace(
            layer.layer,
            layer.cell,
            {gate.name: _gate(gate, rows, piece.skipped) for gate in layer.gates},
        )
        for layer in trace.layers
    ]
    attention: FloatArray | None = None
    if trace.attention_columns:
        attention = _unpack(trace.attention, rows, trace.attention_columns)[piece.skipped :]
    return Trace(first_step, np.ones(length, np.bool_), layers, attention)


def _gate(gate: session_pb2.GateTrace, rows: int, skipped: int) -> GateTrace:
    if gate.values:
        values = _unpack(gate.values, rows, gate.units)[skipped:]
        return GateTrace(gate.name, gate.units, values, summarise(values))
    if len(gate.summaries) != rows:
        raise _unfit()
    summary = [
        (s.mean, s.minimum, s.maximum, s.share_low, s.share_high) for s in gate.summaries[skipped:]
    ]
    return GateTrace(gate.name, gate.units, None, np.array(summary, np.float32).reshape(-1, 5))


def summarise(values: FloatArray) -> FloatArray:
    """Works out the statistics of activations.

    Args:
        values: (K, units), at least one unit.

    Returns:
        (K, 5): mean, least, greatest, share below 0.1, share above 0.9.
    """
    mean = values.mean(axis=1)
    return np.stack(
        [
            mean,
            values.min(axis=1),
            values.max(axis=1),
            (values < LOW).mean(axis=1, dtype=np.float32),
            (values > HIGH).mean(axis=1, dtype=np.float32),
        ],
        axis=1,
    )


def _unpack(packed: bytes, rows: int, columns: int) -> FloatArray:
    if columns < 1 or len(packed) != rows * columns * 4:
        raise _unfit()
    return np.frombuffer(packed, dtype="<f4").reshape(rows, columns)


def _nan(rows: int, columns: int) -> FloatArray:
    return np.full((rows, columns), np.nan, dtype=np.float32)


def _unfit() -> ServerError:
    return ServerError("the server sent a trace that does not fit its steps")
