"""The steps of recurrent layers that an ONNX graph writes out, and the layers that they make up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from conveyor_models.importers import folding
from conveyor_models.importers.common import ImportedLayer, refused, tensor_of
from conveyor_models.importers.onnx_shapes import ONE, Length
from conveyor_models.importers.onnx_stacks import same_stage
from conveyor_models.importers.onnx_sums import constant_row
from conveyor_models.importers.onnx_values import (
    Array,
    Atom,
    Axis,
    Flow,
    Known,
    Repeated,
    Stage,
    Start,
    Term,
    Value,
    axis_of,
    last_row,
    sources_of,
)

ORDERS: Final = {"lstm": "ifgo", "gru": "rzn", "rnn": "h"}
EXPECTED: Final = (
    "export nn.LSTM, nn.GRU or nn.RNN with dynamo=False instead of a loop, or the state dict of"
    " the cells"
)


@dataclass(frozen=True, slots=True, eq=False)
class Gate:
    """What goes into one function of one step: a map of its row, and what the state adds."""

    row: Flow
    state: Flow | Start | None
    folded: Tensor | None = None
    """What a constant state adds, where the file holds nothing else of it."""

    @property
    def weight(self) -> Tensor:
        """Of the row: [H, I]."""
        assert self.row.affine is not None
        affine = self.row.affine
        return affine.weight if affine.weight.dim() == 2 else affine.weight.diag()

    @property
    def recurrent(self) -> Tensor | None:
        """Of the state, where the file has it: [H, H]."""
        affine = None if self.state is None else self.state.affine
        if affine is None:
            return None
        return affine.weight if affine.weight.dim() == 2 else affine.weight.diag()

    @property
    def bias(self) -> Tensor:
        """Of the row and of the state together: [H]."""
        own, of_state = self.biases
        return own + of_state

    @property
    def biases(self) -> tuple[Tensor, Tensor]:
        """Beside the row and beside the state, each [H]."""
        assert self.row.affine is not None
        affine = None if self.state is None else self.state.affine
        own = self.row.affine.bias
        none = torch.zeros_like(own) if self.folded is None else self.folded
        return own, none if affine is None else affine.bias


@dataclass(slots=True, eq=False)
class Layer:
    """A layer whose steps are being found."""

    name: str
    cell: str
    first: Mapping[str, Gate]
    stage: Stage
    units: Axis
    backwards: bool
    nonlinearity: str | None
    complete: bool
    """Whether its recurrent weights are known: a first step may have them folded away."""
    steps: int = 1


@dataclass(slots=True, eq=False)
class Layers:
    """The written-out layers of one graph.

    Attributes:
        notes: what somebody should know, which the steps add to.
    """

    notes: list[str]
    found: list[Layer] = field(default_factory=list["Layer"])

    def layer_of(self, state: Value | None) -> Layer | None:
        """The layer whose state something is."""
        if not isinstance(state, Flow):
            return None
        return next((layer for layer in self.found if layer.stage is state.stage), None)

    def goes_on(self, state: Flow, row: Flow) -> bool:
        """Whether the first is the state of a layer, and the second the row that it reads next."""
        layer = self.layer_of(state)
        if layer is None or not isinstance(state.row, int):
            return False
        read = next(iter(layer.first.values())).row
        step = -1 if layer.backwards else 1
        return row.row == state.row + step and same_stage(row.stage, read.stage)

    def begun(
        self,
        term: Term,
        cell: str,
        gates: dict[str, Gate],
        h: Value | None,
        c: Value | None,
    ) -> tuple[Layer, Flow]:
        """The first step, and the layer."""
        rows = [gate.row for gate in gates.values()]
        start = rows[0]
        time = start.time
        backwards = start.row not in (0, None) and start.row == last_row(time)
        if start.row not in (0, None) and not backwards:
            raise refused(term.node, f"begins with step {start.row} of its input: {EXPECTED}")
        if start.row is None and (start.time is not None and start.time.length != ONE):
            raise refused(term.node, f"reads all steps at once: {EXPECTED}")
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
        found = Layer(
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
        self.found.append(found)
        return found, _state(found, start, start.row if isinstance(start.row, int) else None)

    def _initial(
        self,
        term: Term,
        gates: dict[str, Gate],
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
                raise refused(term.node, f"its gates begin with different states: {EXPECTED}")
            found["h"] = starts[0].state
        elif any(state is not None for state in states):
            found["h"] = self._outside(term, states, origin)
        if isinstance(h, Known | Repeated):
            row = constant_row(h, size)
            if row is None or found["h"] is None or not np.array_equal(row, found["h"]):
                raise refused(term.node, f"does not begin with one state: {EXPECTED}")
        elif h is not None:
            self._outside(term, [h, *(state for state in states if state is not None)], origin)
        if isinstance(c, Known | Repeated):
            found["c"] = constant_row(c, size)
            if found["c"] is None:
                raise refused(term.node, f"its c differs within the batch: {EXPECTED}")
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

    def next(
        self,
        term: Term,
        cell: str,
        gates: dict[str, Gate],
        h: Value | None,
        layer: Layer,
        before: int | None,
    ) -> Flow:
        """One more step of a layer."""
        if before is None or cell != layer.cell:
            raise refused(term.node, f"is no further step of {layer.name}: {EXPECTED}")
        row = before - 1 if layer.backwards else before + 1
        start = gates[ORDERS[cell][0]].row
        states = [gate.state for gate in gates.values()] + ([] if h is None else [h])
        for state in states:
            if not isinstance(state, Flow) or (state.stage, state.row) != (layer.stage, before):
                raise refused(term.node, f"does not go on from the step before: {EXPECTED}")
        if h is not None and (not isinstance(h, Flow) or h.affine is not None):
            raise refused(term.node, f"does not go on from the step before: {EXPECTED}")
        first = next(iter(layer.first.values())).row
        same = same_stage(start.stage, first.stage) and start.time == first.time
        if start.row != row or not same or layer.nonlinearity not in (None, term.op):
            raise refused(
                term.node, f"does not read the row after that of {layer.name}: {EXPECTED}"
            )
        _check_rows(term, gates, start, layer.first[ORDERS[cell][0]].weight.shape[0])
        self._check_weights(term, gates, layer)
        layer.steps += 1
        return _state(layer, start, row, layer.steps)

    def _check_weights(self, term: Term, gates: dict[str, Gate], layer: Layer) -> None:
        """The same as in the first step; what was folded away there is taken from the second."""
        for key, gate in gates.items():
            first = layer.first[key]
            recurrent, before = gate.recurrent, first.recurrent
            same = torch.equal(gate.weight, first.weight) and recurrent is not None
            if before is None and first.folded is None:
                # The first state was folded into the bias: if it was zeros, the sums are equal.
                same = same and torch.equal(gate.bias, first.bias)
            else:
                same = same and all(map(torch.equal, gate.biases, first.biases))
            if before is not None and recurrent is not None:
                same = same and torch.equal(recurrent, before)
            if not same:
                raise refused(
                    term.node,
                    f"differs from the first step of {layer.name} in its weights or its initial"
                    f" state: {EXPECTED}",
                )
        if not layer.complete:
            size = gates[ORDERS[layer.cell][0]].weight.shape[0]
            layer.first = gates
            layer.complete = True
            (content,) = layer.stage.layers
            content.tensors.update(_tensors(layer.name, layer.cell, gates, size))


def folded_state(term: Term, state: Known | Repeated) -> Tensor:
    """What a state adds that was folded into a constant: [H], the same for the whole batch."""
    size = int(state.array.shape[-1]) if state.array.ndim else 1
    row = constant_row(state, size)
    if row is None:
        raise refused(term.node, f"begins with a state that differs within the batch: {EXPECTED}")
    return tensor_of(term.node, row).double()


def _check_rows(term: Term, gates: Mapping[str, Gate], start: Flow, size: int) -> None:
    """All gates read the same row, and are of the same size."""
    for gate in gates.values():
        row = gate.row
        same = (row.stage, row.row, row.time) == (start.stage, start.row, start.time)
        square = gate.recurrent is None or gate.recurrent.shape == (size, size)
        if not same or row.activation is not None or gate.weight.shape[0] != size or not square:
            raise refused(term.node, f"its gates do not all read the same row: {EXPECTED}")
        flat = isinstance(gate.state, Flow) and gate.state.activation is not None
        if flat or row.axes[-1] != row.features:
            raise refused(term.node, f"its gates do not all read the same row: {EXPECTED}")


def _tensors(name: str, cell: str, gates: Mapping[str, Gate], size: int) -> dict[str, Tensor]:
    order = ORDERS[cell]
    none = torch.zeros(size, size, dtype=torch.float64)
    recurrent = [gates[key].recurrent for key in order]
    found = {
        "weight_input": torch.cat([gates[key].weight for key in order]),
        "weight_recurrent": torch.cat([none if each is None else each for each in recurrent]),
        "bias": torch.cat([gates[key].bias for key in order]),
    }
    if cell == "gru":
        own, of_h = gates["n"].biases
        found["bias"][-size:] = own
        found["bias_recurrent"] = of_h
    return {key: folding.rounded(name, tensor) for key, tensor in found.items()}


def _state(layer: Layer, row: Flow, number: int | None, steps: int = 1) -> Flow:
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
