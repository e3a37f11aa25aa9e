"""Follows an ONNX graph from its input to its output.

Every node that the outputs depend on is looked at once, in order. `onnx_plumbing` and
`onnx_arithmetic` know what becomes of constants and shapes, `onnx_moves` what moves the rows that
flow, `onnx_flows` what computes with them, and `onnx_cells` the recurrent nodes; `onnx_heads` puts
together what was passed. Any other operator is refused by name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Final

import numpy as np

from conveyor_models.errors import UnsupportedModuleError
from conveyor_models.importers.common import ImportedModel, refused
from conveyor_models.importers.onnx_arithmetic import CONSTANTS
from conveyor_models.importers.onnx_cells import GATES, CellNode, cell_layers, cell_notes
from conveyor_models.importers.onnx_flows import FLOWS, constant, embedding
from conveyor_models.importers.onnx_heads import assembled
from conveyor_models.importers.onnx_maps import selected, with_features
from conveyor_models.importers.onnx_moves import MOVING, moved, sequence_at
from conveyor_models.importers.onnx_node import Budget, Node
from conveyor_models.importers.onnx_plumbing import PLUMBING
from conveyor_models.importers.onnx_shapes import ONE, Length
from conveyor_models.importers.onnx_steps import Layers
from conveyor_models.importers.onnx_tensors import array_of
from conveyor_models.importers.onnx_unrolled import Unrolled
from conveyor_models.importers.onnx_values import (
    Array,
    Atom,
    Axis,
    Flow,
    Known,
    Moved,
    Refused,
    Sequence,
    Stacked,
    Stage,
    Value,
    axis_length,
    axis_of,
    last_row,
)

_HOLDS: Final = (
    "a bundle holds an embedding, recurrent layers, one linear head and at the end softmax,"
    " log_softmax or sigmoid"
)


class Graph:
    """One graph and what is known of its wires.

    Args:
        onnx: the package.
        graph: the GraphProto.
        opset: of ONNX's own operators.
        constants: the initializers.
        producer: what wrote the file.
    """

    def __init__(
        self,
        onnx: Any,
        graph: Any,
        opset: int,
        constants: Mapping[str, Array],
        producer: str = "",
    ) -> None:
        self._onnx = onnx
        self._graph = graph
        self._opset = opset
        self._producer = producer
        held = sum(array.size for array in constants.values())
        self._budget = Budget.of_file(held)
        self._notes: list[str] = []
        self._unrolled = Unrolled(Layers(self._notes))
        self._values: dict[str, Value] = {name: Known(array) for name, array in constants.items()}
        for each in graph.input:
            if each.name not in constants:
                self._values[each.name] = self._input(each)

    def model(self) -> ImportedModel:
        """The network that the graph is.

        Raises:
            UnsupportedModuleError: it has something that a bundle cannot express.
        """
        for node in self._needed():
            self._follow(node)
        names = [each.name for each in self._graph.output]
        for name in names:
            # Which c belongs to which h is known once the h is.
            with contextlib.suppress(UnsupportedModuleError):
                self._output(name)
        outputs = [(name, self._output(name)) for name in names]
        found = assembled(outputs, self._notes)
        self._unrolled.check(frozenset(layer.name for layer in found.layers))
        return found

    def _output(self, name: str) -> Value:
        value = self._unrolled.read(self._value(name))
        assert value is not None
        return self._unrolled.final(value) if isinstance(value, Flow) else value

    # --- Walking ---------------------------------------------------------------------------------

    def _needed(self) -> Iterable[Any]:
        """The nodes that the outputs depend on, in the file's order."""
        wanted = {each.name for each in self._graph.output}
        needed: list[Any] = []
        for node in reversed(self._graph.node):
            if any(name and name in wanted for name in node.output):
                needed.append(node)
                wanted.update(node.input)
        return reversed(needed)

    def _follow(self, proto: Any) -> None:
        """A refusal counts where an output or a recurrent node depends on it."""
        try:
            found = self._outputs(*self._node(proto))
        except UnsupportedModuleError as error:
            found = [Refused(error)] * len(proto.output)
        for name, value in zip(proto.output, found, strict=False):
            if name:
                self._values[name] = value

    def _node(self, proto: Any) -> tuple[Node, list[Value | None]]:
        label = next((name for name in proto.output if name), "")
        name = proto.name or label
        if proto.domain not in ("", "ai.onnx"):
            raise refused(name, f"operator {proto.op_type} of {proto.domain} is not supported")
        node = Node(
            name=name,
            op=proto.op_type,
            attributes={each.name: self._attribute(proto, each) for each in proto.attribute},
            outputs=tuple(proto.output),
            opset=self._opset,
            budget=self._budget,
        )
        return node, [self._value(name) if name else None for name in proto.input]

    def _value(self, name: str) -> Value:
        if name not in self._values:
            raise refused(name, "is read and made by no node before")
        return self._values[name]

    def _attribute(self, proto: Any, attribute: Any) -> Any:
        kinds = self._onnx.AttributeProto
        if attribute.type in (kinds.GRAPH, kinds.GRAPHS) or attribute.ref_attr_name:
            raise refused(proto.name or proto.op_type, f"operator {proto.op_type} holds a graph")
        if attribute.type == kinds.TENSOR:
            return array_of(self._onnx, attribute.t, None, {})
        value = self._onnx.helper.get_attribute_value(attribute)
        if proto.op_type == "Cast" and attribute.name == "to":
            return self._onnx.helper.tensor_dtype_to_np_dtype(value)
        return value

    def _outputs(self, node: Node, inputs: list[Value | None]) -> list[Value]:
        if node.op in GATES:
            return self._cell(node, [self._unrolled.read(value) for value in inputs])
        for value in inputs:
            if isinstance(value, Refused):
                raise value.error
        if node.op == "Constant":
            return [constant(node)]
        part = self._unrolled.part(node, inputs)
        if part is not None:
            return part
        inputs = [self._unrolled.read(value) for value in inputs]
        moving = any(isinstance(each, Flow | Stacked | Moved | Sequence) for each in inputs)
        if node.op == "Shape" or not moving:
            table = PLUMBING if node.op in PLUMBING else CONSTANTS
        elif node.op == "Gather" and isinstance(inputs[0], Known):
            return embedding(node, inputs)
        elif node.op == "SequenceAt":
            return sequence_at(node, inputs)
        elif node.op in MOVING:
            return moved(node, inputs)
        else:
            table = FLOWS
        if node.op not in table:
            raise refused(node.name, f"operator {node.op} is not supported: {_HOLDS}")
        return table[node.op](node, inputs)

    def _input(self, info: Any) -> Flow:
        kind = info.type.tensor_type
        name = str(info.name)
        if not info.type.HasField("tensor_type"):
            raise refused(name, "an input that is no tensor")
        dtype = self._onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
        atoms: list[Atom] = []
        for place, dim in enumerate(kind.shape.dim):
            own = f"{name}[{place}]"
            size = dim.dim_value if dim.HasField("dim_value") else 0
            atoms.append(Atom(own, Length.of(size) if size > 0 else Length.unknown(own)))
        tokens = np.dtype(dtype).kind in "iu"
        return Flow(
            Stage("input", name, content=str(dtype)),
            axes=tuple(axis_of(atom) for atom in atoms),
            features=axis_of(atoms[-1]) if atoms and not tokens else (),
            tokens=tokens,
        )

    # --- Recurrent nodes -------------------------------------------------------------------------

    def _cell(self, node: Node, inputs: list[Value | None]) -> list[Value]:
        cell = CellNode(node.name, node.op, node.attributes, tuple(inputs))
        x = _rows_into(node, inputs[0] if inputs else None)
        time, batch = (x.axes[1], x.axes[0]) if cell.batch_first else (x.axes[0], x.axes[1])
        steps = _steps(node, x, time, batch)
        for note in cell_notes(cell, axis_length(time), x.stage.origin, self._producer):
            if note not in self._notes:
                self._notes.append(note)
        layers = cell_layers(cell)
        if steps in x.flipped:
            layers = [layer.turned for layer in layers]
        ways = axis_of(Atom(f"{node.name}.ways", Length.of(cell.ways)))
        units = axis_of(Atom(f"{node.name}.units", Length.of(layers[0].output_size)))
        axes = (batch, time, ways, units) if cell.batch_first else (time, ways, batch, units)
        forward_first = tuple(sorted(layers, key=lambda layer: "direction" in layer.table))
        y = Flow(
            Stage("layer", node.name, x.stage, x.affine, forward_first),
            axes,
            features=(*ways, *units),
            time=steps,
            flipped=x.flipped,
            steps=x.steps,
        )
        if forward_first[0] is not layers[0]:
            size = layers[0].output_size
            y = selected(node, y, [*range(size, 2 * size), *range(size)])
        h_axes = (batch, ways, units) if cell.batch_first else (ways, batch, units)
        end = 0 if "direction" in layers[0].table else last_row(steps)
        row = "ends" if cell.ways == 2 else end
        h = replace(y, axes=h_axes, row=row, final=True, flipped=y.flipped - {steps})
        return [y, h, Moved(states=frozenset({node.name}))]


def _rows_into(node: Node, x: Value | None) -> Flow:
    """What a recurrent node reads, with its features along the last of three axes."""
    if isinstance(x, Refused):
        raise x.error
    if isinstance(x, Moved) and x.why is not None:
        raise x.why
    if not isinstance(x, Flow) or x.tokens or x.row is not None or x.activation is not None:
        raise node.refused("X is not what flows from the input")
    if len(x.axes) != 3:
        raise node.refused(f"X has {len(x.axes)} axes, expected time, batch and features")
    return with_features(node, x, 2)


def _steps(node: Node, x: Flow, time: Axis, batch: Axis) -> Atom:
    """The axis of time, which is that of all recurrent nodes."""
    if len(time) > 1:
        raise node.refused("X has its time merged with another axis")
    steps = time[0] if time else Atom(f"{node.name}.step", ONE)
    single = x.time is not None and x.time.length == ONE == steps.length
    if x.time not in (None, steps) and not single:
        raise node.refused("X has its time along another axis than before")
    if any(atom in x.flipped for atom in batch):
        raise node.refused("X has its batch from the last to the first")
    return steps
