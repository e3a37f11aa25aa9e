"""Recurrent layers that an ONNX graph writes out, step by step, from matrices and functions.

nn.LSTMCell, nn.GRUCell and nn.RNNCell in a loop come out as such graphs, and so does nn.RNN from
PyTorch's default exporter. The parts of a step stay terms until something reads the state that they
make up. Then it is known which cell that is: in an LSTM the gate beside the old c forgets, the one
beside a tanh of rows lets in, the one beside the tanh of the new c puts out. Every step has to have
the weights of the first one and to read the next row, and the first has to begin with a constant.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from conveyor_models.importers.common import refused
from conveyor_models.importers.onnx_node import Inputs, Node
from conveyor_models.importers.onnx_steps import EXPECTED, Gate, Layer, Layers, folded_state
from conveyor_models.importers.onnx_sums import gates_apart, started, sum_of_two, sum_with
from conveyor_models.importers.onnx_values import (
    Flow,
    Known,
    Mixed,
    Moved,
    Repeated,
    Start,
    Term,
    Value,
)

FUNCTIONS: Final = ("Relu", "Sigmoid", "Tanh")
OPERATIONS: Final = ("Add", "Mul", "Sub")


@dataclass(slots=True, eq=False)
class Unrolled:
    """The layers of one graph that are written out."""

    _layers: Layers
    _rows: dict[Term, Flow] = field(default_factory=dict[Term, Flow])
    _cells: dict[Term, tuple[Layer, int | None]] = field(
        default_factory=dict[Term, "tuple[Layer, int | None]"]
    )

    # --- While the graph is followed -------------------------------------------------------------

    def part(self, node: Node, inputs: Inputs) -> list[Value] | None:
        """The outputs of a node that is a part of a step; None of any other."""
        values = [value for value in inputs if value is not None]
        if node.op in FUNCTIONS and self._may_be_gate(values[0]):
            return [Term(node.op, node.name, (values[0],))]
        if any(isinstance(value, Mixed | Start) for value in values):
            return self._of_sums(node, inputs)
        if node.op in OPERATIONS and len(values) == 2:
            if any(isinstance(value, Term) for value in values):
                return [Term(node.op, node.name, tuple(values))]
            return sum_of_two(node, values)
        if node.op in ("Gemm", "MatMul") and isinstance(values[0], Known | Repeated):
            return started(node, inputs)
        return None

    def read(self, value: Value | None) -> Value | None:
        """A value as something else than a part of a step reads it."""
        match value:
            case Term():
                return self._state_c(value) or self._row(value)
            case Start():
                return value.value
            case Mixed() if value.why is not None:
                raise value.why
            case _:
                return value

    def check(self, passed: frozenset[str]) -> None:
        """Refuses layers on the way whose weights are not all known."""
        for layer in self._layers.found:
            if layer.name in passed and not layer.complete:
                raise refused(
                    layer.name,
                    "written out for one step, with its initial state folded into its bias, so its"
                    f" recurrent weights are not in the file: {EXPECTED}",
                )

    def final(self, flow: Flow) -> Flow:
        """A state is final if no step follows it."""
        for layer in self._layers.found:
            if flow.stage is layer.stage and flow.final and flow.steps not in (None, layer.steps):
                return replace(flow, final=False)
        return flow

    def _of_sums(self, node: Node, inputs: Inputs) -> list[Value] | None:
        value = inputs[0]
        if node.op in ("Split", "Slice") and isinstance(value, Mixed | Start):
            return gates_apart(node, value, inputs)
        if node.op in ("Squeeze", "Unsqueeze", "Identity"):
            return [value] if isinstance(value, Start) else None
        pair = [each for each in inputs if each is not None]
        if node.op not in OPERATIONS or len(pair) != 2:
            return None
        if any(isinstance(each, Term) for each in pair):
            return [Term(node.op, node.name, tuple(pair))]
        if node.op != "Add":
            return None
        return sum_with(node, pair[0], pair[1])

    def _may_be_gate(self, value: Value) -> bool:
        """Whether a function of it may be a part of a step."""
        if not isinstance(value, Flow):
            return isinstance(value, Mixed | Term)
        single = isinstance(value.row, int) and value.activation is None and not value.tokens
        return single and (value.stage.kind != "layer" or value.steps is not None)

    # --- What a term is --------------------------------------------------------------------------

    def _state_c(self, term: Term) -> Value | None:
        """The c of an LSTM, which is a session's carry."""
        found = self._cells.get(term)
        return None if found is None else Moved(states=frozenset({found[0].name}))

    def _row(self, term: Term) -> Flow:
        """The state of a step, or an output's sigmoid."""
        if term not in self._rows:
            found = self._lstm(term) or self._gru(term) or self._rnn(term)
            if found is None and term.op == "Sigmoid":
                found = self._activated(term)
            if found is None:
                raise refused(
                    term.node,
                    f"operator {term.op} is not a part of a step of an LSTM, a GRU or an RNN, and"
                    f" a bundle has no other place for it: {EXPECTED}",
                )
            self._rows[term] = found
        return self._rows[term]

    def _activated(self, term: Term) -> Flow | None:
        flow = self.read(term.args[0])
        if not isinstance(flow, Flow) or flow.activation is not None:
            return None
        return replace(flow, activation="sigmoid", final=False)

    def _lstm(self, term: Term) -> Flow | None:
        for o, tanh in _orders(term, "Mul"):
            if not (
                isinstance(tanh, Term) and tanh.op == "Tanh" and isinstance(tanh.args[0], Term)
            ):
                continue
            c = tanh.args[0]
            for kept, new in _orders(c, "Add"):
                for f, before in _orders(kept, "Mul"):
                    for i, g in _orders(new, "Mul"):
                        parts = {"i": (i, "Sigmoid"), "f": (f, "Sigmoid"), "g": (g, "Tanh")}
                        gates = self._gates(parts | {"o": (o, "Sigmoid")})
                        if gates is None or self._gate(before) is not None:
                            continue
                        return self._lstm_step(term, gates, c, before)
        return None

    def _lstm_step(self, term: Term, gates: dict[str, Gate], c: Term, before: Value) -> Flow:
        if isinstance(before, Term):
            if before not in self._cells:
                raise refused(term.node, f"its c is no state of a step before: {EXPECTED}")
            layer, row = self._cells[before]
            found = self._layers.next(term, "lstm", gates, None, layer, row)
        else:
            layer, found = self._layers.begun(term, "lstm", gates, None, before)
        row = found.row if isinstance(found.row, int) else None
        self._cells[c] = (layer, row)
        return found

    def _gru(self, term: Term) -> Flow | None:
        for mixed, n in _orders(term, "Add"):
            for rest, z in _orders(mixed, "Mul"):
                if isinstance(rest, Term) and rest.op == "Sub" and rest.args[1] is n:
                    return self._gru_step(term, n, z, rest.args[0])
            for z, h in _orders(n, "Mul"):
                for rest, candidate in _orders(mixed, "Mul"):
                    if not isinstance(rest, Term) or rest.op != "Sub":
                        continue
                    if rest.args[1] is z and _is_one(rest.args[0]):
                        return self._gru_step(term, candidate, z, h)
        return None

    def _gru_step(self, term: Term, n: Value, z: Value, h: Value) -> Flow | None:
        if not (isinstance(n, Term) and n.op == "Tanh" and isinstance(n.args[0], Term)):
            return None
        for row, reset in _orders(n.args[0], "Add"):
            for r, state in _orders(reset, "Mul"):
                gates = self._gates({"r": (r, "Sigmoid"), "z": (z, "Sigmoid")})
                if gates is None or not isinstance(row, Flow):
                    continue
                if isinstance(state, Flow | Start):
                    gates["n"] = Gate(row, state)
                elif isinstance(state, Known | Repeated):
                    gates["n"] = Gate(row, None, folded_state(term, state))
                else:
                    continue
                return self._step(term, "gru", gates, h)
        return None

    def _rnn(self, term: Term) -> Flow | None:
        gate = self._gate(term, "Tanh") or self._gate(term, "Relu")
        return None if gate is None else self._step(term, "rnn", {"h": gate}, None)

    # --- Gates -----------------------------------------------------------------------------------

    def _gate(self, value: Value, function: str | None = None) -> Gate | None:
        """What goes into a function, if that is a map of a row, and maybe of a state."""
        if not isinstance(value, Term) or value.op not in FUNCTIONS:
            return None
        if function not in (None, value.op):
            return None
        (inner,) = value.args
        if isinstance(inner, Flow):
            return None if inner.affine is None else Gate(inner, None)
        if not isinstance(inner, Mixed):
            return None
        row, state = inner.parts
        if isinstance(state, Flow) and self._is_state(row, state):
            row, state = state, row
        return Gate(row, state)

    def _gates(self, parts: Mapping[str, tuple[Value, str]]) -> dict[str, Gate] | None:
        found = {key: self._gate(value, function) for key, (value, function) in parts.items()}
        plain = {key: gate for key, gate in found.items() if gate is not None}
        return plain if len(plain) == len(found) else None

    def _is_state(self, state: Flow, row: Flow) -> bool:
        """Whether the first of two is the state, and the second the row that is read.

        Either the state is that of a written-out layer, a step before; or it is an input, and what
        is read is not, or has another length than the state.
        """
        goes_on = self._layers.goes_on(state, row), self._layers.goes_on(row, state)
        if goes_on[0] != goes_on[1]:
            return goes_on[0]
        if state.stage.kind != row.stage.kind:
            return state.stage.kind == "input"
        sizes = [None if flow.affine is None else flow.affine.input_size for flow in (state, row)]
        if sizes[0] == sizes[1]:
            raise refused(
                state.stage.node,
                f"and {row.stage.node} have the same length, so which of them is the state is not"
                f" in the file: {EXPECTED}",
            )
        return sizes[0] == state.size

    # --- Steps -----------------------------------------------------------------------------------

    def _step(self, term: Term, cell: str, gates: dict[str, Gate], h: Value | None) -> Flow:
        """A step of a cell without a c: the layer is that of the state which its gates read."""
        if isinstance(h, Term):
            h = self.read(h)
        state = next(iter(gates.values())).state
        layer = self._layers.layer_of(state)
        if layer is None:
            return self._layers.begun(term, cell, gates, h, None)[1]
        assert isinstance(state, Flow)
        row = state.row if isinstance(state.row, int) else None
        return self._layers.next(term, cell, gates, h, layer, row)


def _orders(value: Value, op: str) -> Iterator[tuple[Value, Value]]:
    """The operands of a term either way round; none of another operator."""
    if isinstance(value, Term) and value.op == op and len(value.args) == 2:
        left, right = value.args
        yield left, right
        yield right, left


def _is_one(value: Value) -> bool:
    return isinstance(value, Known | Repeated) and bool((value.array == 1).all())
