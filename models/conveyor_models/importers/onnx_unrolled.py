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
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from conveyor_models.errors import UnsupportedModuleError
from conveyor_models.importers import folding
from conveyor_models.importers.common import ImportedLayer, refused, tensor_of
from conveyor_models.importers.onnx_flows import elementwise
from conveyor_models.importers.onnx_maps import selected, short
from conveyor_models.importers.onnx_node import Inputs, Node, at, split_sizes
from conveyor_models.importers.onnx_ranges import plain_range, slice_ranges
from conveyor_models.importers.onnx_shapes import ONE, Length
from conveyor_models.importers.onnx_stacks import same_stage
from conveyor_models.importers.onnx_values import (
    Array,
    Atom,
    Axis,
    Flow,
    Known,
    Mixed,
    Moved,
    Repeated,
    Stage,
    Start,
    Term,
    Value,
    axis_number,
    axis_of,
    known,
    last_row,
    sources_of,
)

FUNCTIONS: Final = ("Relu", "Sigmoid", "Tanh")
OPERATIONS: Final = ("Add", "Mul", "Sub")
ORDERS: Final = {"lstm": "ifgo", "gru": "rzn", "rnn": "h"}
_EXPECTED: Final = (
    "export nn.LSTM, nn.GRU or nn.RNN with dynamo=False instead of a loop, or the state dict of"
    " the cells"
)


@dataclass(frozen=True, slots=True, eq=False)
class _Gate:
    """What goes into one function of one step: a map of its row, and what the state adds."""

    row: Flow
    state: Flow | Start | None
    folded: Tensor | None = None
    """What a constant state adds, where the file holds nothing else of it."""

    @property
    def weight(self) -> Tensor:
        assert self.row.affine is not None
        affine = self.row.affine
        return affine.weight if affine.weight.dim() == 2 else affine.weight.diag()

    @property
    def recurrent(self) -> Tensor | None:
        affine = None if self.state is None else self.state.affine
        if affine is None:
            return None
        return affine.weight if affine.weight.dim() == 2 else affine.weight.diag()

    @property
    def biases(self) -> tuple[Tensor, Tensor]:
        assert self.row.affine is not None
        affine = None if self.state is None else self.state.affine
        own = self.row.affine.bias
        none = torch.zeros_like(own) if self.folded is None else self.folded
        return own, none if affine is None else affine.bias


@dataclass(slots=True, eq=False)
class _Layer:
    """A layer whose steps are being found."""

    name: str
    cell: str
    first: Mapping[str, _Gate]
    stage: Stage
    units: Axis
    backwards: bool
    nonlinearity: str | None
    complete: bool
    """Whether its recurrent weights are known: a first step may have them folded away."""
    steps: int = 1


@dataclass(slots=True, eq=False)
class Unrolled:
    """The layers of one graph that are written out."""

    notes: list[str]
    _layers: list[_Layer] = field(default_factory=list[_Layer])
    _rows: dict[Term, Flow] = field(default_factory=dict[Term, Flow])
    _cells: dict[Term, tuple[_Layer, int | None]] = field(
        default_factory=dict[Term, "tuple[_Layer, int | None]"]
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
            return _sum_of_two(node, values)
        if node.op in ("Gemm", "MatMul") and isinstance(values[0], Known | Repeated):
            return _started(node, inputs)
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
        for layer in self._layers:
            if layer.name in passed and not layer.complete:
                raise refused(
                    layer.name,
                    "written out for one step, with its initial state folded into its bias, so its"
                    f" recurrent weights are not in the file: {_EXPECTED}",
                )

    def final(self, flow: Flow) -> Flow:
        """A state is final if no step follows it."""
        for layer in self._layers:
            if flow.stage is layer.stage and flow.final and flow.steps not in (None, layer.steps):
                return replace(flow, final=False)
        return flow

    def _of_sums(self, node: Node, inputs: Inputs) -> list[Value] | None:
        value = inputs[0]
        if node.op in ("Split", "Slice") and isinstance(value, Mixed | Start):
            return _gates_apart(node, value, inputs)
        if node.op in ("Squeeze", "Unsqueeze", "Identity"):
            return [value] if isinstance(value, Start) else None
        pair = [each for each in inputs if each is not None]
        if node.op not in OPERATIONS or len(pair) != 2:
            return None
        if any(isinstance(each, Term) for each in pair):
            return [Term(node.op, node.name, tuple(pair))]
        if node.op != "Add":
            return None
        return _sum_with(node, pair[0], pair[1])

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
                    f" a bundle has no other place for it: {_EXPECTED}",
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

    def _lstm_step(self, term: Term, gates: dict[str, _Gate], c: Term, before: Value) -> Flow:
        if isinstance(before, Term):
            if before not in self._cells:
                raise refused(term.node, f"its c is no state of a step before: {_EXPECTED}")
            layer, row = self._cells[before]
            found = self._next(term, "lstm", gates, None, layer, row)
        else:
            layer, found = self._begun(term, "lstm", gates, None, before)
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
                    complement = isinstance(rest, Term) and rest.op == "Sub"
                    if complement and rest.args[1] is z and _is_one(rest.args[0]):
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
                    gates["n"] = _Gate(row, state)
                elif isinstance(state, Known | Repeated):
                    gates["n"] = _Gate(row, None, _folded(term, state))
                else:
                    continue
                return self._step(term, "gru", gates, h)
        return None

    def _rnn(self, term: Term) -> Flow | None:
        gate = self._gate(term, "Tanh") or self._gate(term, "Relu")
        return None if gate is None else self._step(term, "rnn", {"h": gate}, None)

    # --- Gates -----------------------------------------------------------------------------------

    def _gate(self, value: Value, function: str | None = None) -> _Gate | None:
        """What goes into a function, if that is a map of a row, and maybe of a state."""
        if not isinstance(value, Term) or value.op not in FUNCTIONS:
            return None
        if function not in (None, value.op):
            return None
        (inner,) = value.args
        if isinstance(inner, Flow):
            return None if inner.affine is None else _Gate(inner, None)
        if not isinstance(inner, Mixed):
            return None
        row, state = inner.parts
        if isinstance(state, Flow) and self._is_state(row, state):
            row, state = state, row
        return _Gate(row, state)

    def _gates(self, parts: Mapping[str, tuple[Value, str]]) -> dict[str, _Gate] | None:
        found = {key: self._gate(value, function) for key, (value, function) in parts.items()}
        plain = {key: gate for key, gate in found.items() if gate is not None}
        return plain if len(plain) == len(found) else None

    def _is_state(self, state: Flow, row: Flow) -> bool:
        """Whether the first of two is the state, and the second the row that is read.

        Either the state is that of a written-out layer, a step before; or it is an input, and what
        is read is not, or has another length than the state.
        """
        if isinstance(state.row, int) and isinstance(row.row, int):
            layer = self._layer_of(state)
            step = -1 if layer is not None and layer.backwards else 1
            return layer is not None and row.row == state.row + step
        if state.stage.kind != row.stage.kind:
            return state.stage.kind == "input"
        sizes = [None if flow.affine is None else flow.affine.input_size for flow in (state, row)]
        if sizes[0] == sizes[1]:
            raise refused(
                state.stage.node,
                f"and {row.stage.node} have the same length, so which of them is the state is not"
                f" in the file: {_EXPECTED}",
            )
        return sizes[0] == state.size

    # --- Steps -----------------------------------------------------------------------------------

    def _step(self, term: Term, cell: str, gates: dict[str, _Gate], h: Value | None) -> Flow:
        """A step of a cell without a c: the layer is that of the state which its gates read."""
        if isinstance(h, Term):
            h = self.read(h)
        state = next(iter(gates.values())).state
        layer = self._layer_of(state)
        if layer is None:
            return self._begun(term, cell, gates, h, None)[1]
        assert isinstance(state, Flow)
        row = state.row if isinstance(state.row, int) else None
        return self._next(term, cell, gates, h, layer, row)

    def _layer_of(self, state: Value | None) -> _Layer | None:
        if not isinstance(state, Flow):
            return None
        return next((layer for layer in self._layers if layer.stage is state.stage), None)

    def _begun(
        self,
        term: Term,
        cell: str,
        gates: dict[str, _Gate],
        h: Value | None,
        c: Value | None,
    ) -> tuple[_Layer, Flow]:
        """The first step, and the layer."""
        rows = [gate.row for gate in gates.values()]
        start = rows[0]
        time = start.time
        backwards = start.row not in (0, None) and start.row == last_row(time)
        if start.row not in (0, None) and not backwards:
            raise refused(term.node, f"begins with step {start.row} of its input: {_EXPECTED}")
        if start.row is None and (start.time is not None and start.time.length != ONE):
            raise refused(term.node, f"reads all steps at once: {_EXPECTED}")
        size = gates[ORDERS[cell][0]].weight.shape[0]
        _check_rows(term, gates, start, size)
        initial = self._initial(term, gates, h, c, size, start.stage.origin)
        table: dict[str, Any] = {"cell": cell, "size": size}
        if cell == "gru":
            table["reset"] = "after"
        if cell == "rnn" and term.op == "Relu":
            table["nonlinearity"] = "relu"
        if backwards:
            table["direction"] = "reverse"
        if initial:
            table["initial_state"] = True
        layer = ImportedLayer(term.node, table, initial)
        complete = all(gate.recurrent is not None for gate in gates.values())
        found = _Layer(
            name=term.node,
            cell=cell,
            first=gates,
            stage=Stage("layer", term.node, start.stage, None, (layer,)),
            units=axis_of(Atom(f"{term.node}.units", Length.of(size))),
            backwards=backwards,
            nonlinearity=term.op if cell == "rnn" else None,
            complete=complete,
        )
        layer.tensors.update(_tensors(term.node, cell, gates, size))
        self._layers.append(found)
        return found, _state(found, start, start.row if isinstance(start.row, int) else None)

    def _initial(
        self,
        term: Term,
        gates: dict[str, _Gate],
        h: Value | None,
        c: Value | None,
        size: int,
        origin: str,
    ) -> dict[str, Tensor]:
        """What a session begins with, where that is not zeros."""
        states = [gate.state for gate in gates.values()]
        found: dict[str, Array | None] = {"h": np.zeros(size, np.float32)}
        if all(isinstance(state, Start) for state in states):
            starts = [state for state in states if isinstance(state, Start)]
            if any(not np.array_equal(each.state, starts[0].state) for each in starts):
                raise refused(term.node, f"its gates begin with different states: {_EXPECTED}")
            found["h"] = starts[0].state
        elif any(state is not None for state in states):
            found["h"] = self._outside(term, states, origin)
        if isinstance(h, Known | Repeated):
            row = _constant_row(h, size)
            if row is None or found["h"] is None or not np.array_equal(row, found["h"]):
                raise refused(term.node, f"does not begin with one state: {_EXPECTED}")
        elif h is not None:
            self._outside(term, [h, *(state for state in states if state is not None)], origin)
        if isinstance(c, Known | Repeated):
            found["c"] = _constant_row(c, size)
            if found["c"] is None:
                raise refused(term.node, f"its c differs within the batch: {_EXPECTED}")
        elif c is not None:
            found["c"] = self._outside(term, [c], origin)
        if all(each is None or not each.any() for each in found.values()):
            return {}
        none = np.zeros(size, np.float32)
        return {
            f"initial_{part}": tensor_of(term.node, none if row is None else row)
            for part, row in found.items()
        }

    def _outside(self, term: Term, states: list[Any], origin: str) -> None:
        """An input of the graph is the carry; nothing else that is no constant."""
        inputs: set[str] = set()
        for state in states:
            bare = replace(state, computed=None, affine=None) if isinstance(state, Flow) else state
            sources = None if bare is None else sources_of(bare)
            inputs |= set() if sources is None else sources.inputs
            if sources is None or sources.states or origin in inputs or len(inputs) != 1:
                raise refused(
                    term.node,
                    "its first step begins with something that the graph computes: expected zeros,"
                    " a constant, or an input of the graph that is used for nothing else",
                )
        note = f"{term.node}: its state is given from outside, so a session begins with zeros"
        if note not in self.notes:
            self.notes.append(note)

    def _next(
        self,
        term: Term,
        cell: str,
        gates: dict[str, _Gate],
        h: Value | None,
        layer: _Layer,
        before: int | None,
    ) -> Flow:
        """One more step of a layer."""
        if before is None or cell != layer.cell:
            raise refused(term.node, f"is no further step of {layer.name}: {_EXPECTED}")
        row = before - 1 if layer.backwards else before + 1
        start = gates[ORDERS[cell][0]].row
        states = [gate.state for gate in gates.values()] + ([] if h is None else [h])
        for state in states:
            if not isinstance(state, Flow) or (state.stage, state.row) != (layer.stage, before):
                raise refused(term.node, f"does not go on from the step before: {_EXPECTED}")
        if h is not None and (not isinstance(h, Flow) or h.affine is not None):
            raise refused(term.node, f"does not go on from the step before: {_EXPECTED}")
        first = next(iter(layer.first.values())).row
        same = same_stage(start.stage, first.stage) and start.time == first.time
        if start.row != row or not same or layer.nonlinearity not in (None, term.op):
            raise refused(
                term.node, f"does not read the row after that of {layer.name}: {_EXPECTED}"
            )
        _check_rows(term, gates, start, layer.first[ORDERS[cell][0]].weight.shape[0])
        self._check_weights(term, gates, layer)
        layer.steps += 1
        return _state(layer, start, row, layer.steps)

    def _check_weights(self, term: Term, gates: dict[str, _Gate], layer: _Layer) -> None:
        """The same as in the first step; what was folded away there is taken from the second."""
        for key, gate in gates.items():
            first = layer.first[key]
            same = torch.equal(gate.weight, first.weight) and gate.recurrent is not None
            if first.recurrent is None and first.folded is None:
                # The first state was folded into the bias: if it was zeros, the sums are equal.
                same = same and torch.equal(sum(gate.biases), sum(first.biases))
            elif first.recurrent is None:
                same = same and all(map(torch.equal, gate.biases, first.biases))
            else:
                same = same and gate.recurrent is not None
                same = same and torch.equal(gate.recurrent, first.recurrent)
                same = same and all(map(torch.equal, gate.biases, first.biases))
            if not same:
                raise refused(
                    term.node,
                    f"differs from the first step of {layer.name} in its weights or its initial"
                    f" state: {_EXPECTED}",
                )
        if not layer.complete:
            size = gates[ORDERS[layer.cell][0]].weight.shape[0]
            layer.first = gates
            layer.complete = True
            (content,) = layer.stage.layers
            content.tensors.update(_tensors(layer.name, layer.cell, gates, size))


# --- Parts ---------------------------------------------------------------------------------------


def _sum_of_two(node: Node, values: list[Value]) -> list[Value] | None:
    """A map of a row and one of a state, where they are not of the same row."""
    left, right = values
    if node.op != "Add" or not (isinstance(left, Flow) and isinstance(right, Flow)):
        return None
    try:
        return elementwise(node, values)
    except UnsupportedModuleError as error:
        if left.affine is None or right.affine is None or left.activation or right.activation:
            raise
        if not all(isinstance(each.row, int) or _one_step(each) for each in (left, right)):
            raise
        return [Mixed(_alike_axes(node, left, right), error)]


def _one_step(flow: Flow) -> bool:
    return flow.row is None and (
        flow.stage.kind == "input" or (flow.time is not None and flow.time.length == ONE)
    )


def _alike_axes(node: Node, left: Flow, right: Flow) -> tuple[Flow, Flow]:
    rank = max(len(left.axes), len(right.axes))
    found = [
        replace(flow, axes=((),) * (rank - len(flow.axes)) + flow.axes) for flow in (left, right)
    ]
    if left.size != right.size or any(flow.axes[-1] != flow.features for flow in found):
        raise node.refused("of rows that differ in length, or lie along other axes")
    return found[0], found[1]


def _sum_with(node: Node, left: Value, right: Value) -> list[Value] | None:
    """A state's map and a row's, or a bias on either."""
    for one, other in ((left, right), (right, left)):
        match one, other:
            case Start(), Flow():
                size = one.affine.output_size
                if other.affine is None or other.size != size:
                    raise node.refused("of rows that differ in length")
                return [Mixed((_padded(other, one), one))]
            case Mixed(), Known():
                (row,) = elementwise(node, [one.parts[0], other])
                assert isinstance(row, Flow)
                return [Mixed((row, one.parts[1]), one.why)]
            case Start(), Known() if other.array.size == one.affine.output_size:
                bias = folding.scale(
                    short(node.name),
                    torch.ones(other.array.size),
                    tensor_of(node.name, other.array.reshape(-1)),
                )
                added = one.value.array + other.array
                value = replace(one.value, array=added)
                return [Start(value, one.state, bias.after(one.affine))]
            case _:
                continue
    return None


def _padded(flow: Flow, start: Start) -> Flow:
    rank = max(len(flow.axes), start.value.array.ndim)
    return replace(flow, axes=((),) * (rank - len(flow.axes)) + flow.axes)


def _started(node: Node, inputs: Inputs) -> list[Value] | None:
    """A linear layer on a constant state, whose rows are all alike."""
    state, matrix = inputs[0], at(inputs, 1)
    if not isinstance(state, Known | Repeated) or not isinstance(matrix, Known):
        return None
    weight = matrix.array if node.attributes.get("transB", 0) else matrix.array.T
    if weight.ndim != 2 or state.array.ndim < 2 or state.array.dtype.kind != "f":
        return None
    row = _constant_row(state, weight.shape[1])
    plain = all(node.attributes.get(name, 1) == 1 for name in ("alpha", "beta"))
    if row is None or not plain or node.attributes.get("transA", 0):
        return None
    node.multiply(weight.size)
    node.spend((weight.shape[0],))
    bias = at(inputs, 2)
    offset = None if bias is None else known(node.name, "its bias", bias).reshape(-1)
    affine = folding.linear(
        short(node.name),
        tensor_of(node.name, weight),
        None if offset is None else tensor_of(node.name, offset),
    )
    found = weight @ row if offset is None else weight @ row + offset
    array = found.astype(np.float32).reshape((1,) * (state.array.ndim - 1) + (-1,))
    if isinstance(state, Repeated):
        value = Repeated(array, (*state.lengths[:-1], Length.of(array.size)))
    else:
        value = Known(np.broadcast_to(array, (*state.array.shape[:-1], array.size)))
    return [Start(value, row, affine)]


def _constant_row(value: Known | Repeated, size: int) -> Array | None:
    """[size], if every row of the array is that one."""
    array = value.array
    if isinstance(value, Repeated) and value.lengths and value.lengths[-1].known != size:
        return None
    if array.ndim == 0 or array.shape[-1] not in (1, size) or array.size == 0:
        return None
    flat = array.reshape(-1, array.shape[-1])
    if not (flat == flat[0]).all():
        return None
    return np.array(np.broadcast_to(flat[0], (size,)))


def _folded(term: Term, state: Known | Repeated) -> Tensor:
    size = int(state.array.shape[-1]) if state.array.ndim else 1
    row = _constant_row(state, size)
    if row is None:
        raise refused(term.node, f"begins with a state that differs within the batch: {_EXPECTED}")
    return tensor_of(term.node, row).double()


def _gates_apart(node: Node, value: Mixed | Start, inputs: Inputs) -> list[Value]:
    """Ranges of the last axis, which the gates lie along."""
    start = value if isinstance(value, Start) else None
    flow = None if start is not None else value.parts[0]
    size = start.affine.output_size if start is not None else flow.size
    rank = start.value.array.ndim if start is not None else len(flow.axes)
    if size is None:
        raise node.refused("of features whose number the file does not state")
    if node.op == "Split":
        if node.axis(rank) != rank - 1:
            raise node.refused("along another axis than that of the gates")
        ends = np.cumsum(split_sizes(node, inputs, size)).tolist()
        ranges = [range(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]
    else:
        whole = slice_ranges(node, inputs)
        if len(whole) != 1 or axis_number(node.name, whole[0][0], rank) != rank - 1:
            raise node.refused("along another axis than that of the gates")
        ranges = [range(size)[plain_range(node, *whole[0][1:])]]
    return [_entries(node, value, places) for places in ranges]


def _entries(node: Node, value: Mixed | Start, places: range) -> Value:
    if isinstance(value, Start):
        chosen = folding.selection(short(node.name), places, value.affine.output_size)
        array = value.value.array[..., list(places)]
        lengths = {}
        if isinstance(value.value, Repeated):
            lengths = {"lengths": (*value.value.lengths[:-1], Length.of(len(places)))}
        kept = replace(value.value, array=array, **lengths)
        return Start(kept, value.state, chosen.after(value.affine))
    parts: list[Flow | Start] = []
    for part in value.parts:
        if isinstance(part, Start):
            found = _entries(node, part, places)
            assert isinstance(found, Start)
        else:
            features = axis_of(Atom(f"{node.name}.gate", Length.of(len(places))))
            found = selected(node, part, places)
            found = replace(found, features=features, axes=(*part.axes[:-1], features))
        parts.append(found)
    row, state = parts
    assert isinstance(row, Flow)
    return Mixed((row, state), value.why)


# --- Matching ------------------------------------------------------------------------------------


def _orders(value: Value, op: str) -> Iterator[tuple[Value, Value]]:
    """The operands of a term either way round; none of another operator."""
    if isinstance(value, Term) and value.op == op and len(value.args) == 2:
        left, right = value.args
        yield left, right
        yield right, left


def _is_one(value: Value) -> bool:
    return isinstance(value, Known | Repeated) and bool((value.array == 1).all())


def _check_rows(term: Term, gates: Mapping[str, _Gate], start: Flow, size: int) -> None:
    """All gates read the same row, and are of the same size."""
    for gate in gates.values():
        row = gate.row
        same = (row.stage, row.row, row.time) == (start.stage, start.row, start.time)
        square = gate.recurrent is None or gate.recurrent.shape == (size, size)
        if not same or row.activation is not None or gate.weight.shape[0] != size or not square:
            raise refused(term.node, f"its gates do not all read the same row: {_EXPECTED}")
        flat = isinstance(gate.state, Flow) and gate.state.activation is not None
        if flat or row.axes[-1] != row.features:
            raise refused(term.node, f"its gates do not all read the same row: {_EXPECTED}")


def _tensors(name: str, cell: str, gates: Mapping[str, _Gate], size: int) -> dict[str, Tensor]:
    order = ORDERS[cell]
    none = torch.zeros(size, size, dtype=torch.float64)
    recurrent = [gates[key].recurrent for key in order]
    found = {
        "weight_input": torch.cat([gates[key].weight for key in order]),
        "weight_recurrent": torch.cat([none if each is None else each for each in recurrent]),
        "bias": torch.cat([sum(gates[key].biases) for key in order]),
    }
    if cell == "gru":
        own, of_h = gates["n"].biases
        found["bias"][-size:] = own
        found["bias_recurrent"] = of_h
    return {key: folding.rounded(name, tensor) for key, tensor in found.items()}


def _state(layer: _Layer, row: Flow, number: int | None, steps: int = 1) -> Flow:
    """The h of one step."""
    time = row.time
    if number is None:
        time = time or Atom(f"{layer.name}.step", ONE)
    return Flow(
        stage=layer.stage,
        axes=(*row.axes[:-1], layer.units),
        features=layer.units,
        time=time,
        flipped=row.flipped,
        row=number,
        steps=None if number is None else steps,
        final=True,
    )
