"""Follows an ONNX graph from its input to its output.

Every node that the output depends on is looked at once, in order. `onnx_plumbing` knows those that
move numbers about, `onnx_cells` the recurrent ones, and `onnx_flows` those that make up the rest of
a network; at the end the stages passed are put together. Any other operator is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Final, cast

import numpy as np

from conveyor_models.importers.common import (
    ImportedLayer,
    ImportedModel,
    listed,
    refused,
    tensor_of,
)
from conveyor_models.importers.onnx_cells import GATES, CellNode, cell_layer
from conveyor_models.importers.onnx_flows import ACTIVATIONS, FLOWS, activation, constant, flow_of
from conveyor_models.importers.onnx_plumbing import PLUMBING, Node
from conveyor_models.importers.onnx_tensors import array_of
from conveyor_models.importers.onnx_values import (
    Array,
    Atom,
    Axis,
    Carried,
    Flow,
    Known,
    Length,
    Stage,
    Value,
)

_NEXT: Final = {
    "input": ("embedding", "layer"),
    "embedding": ("layer",),
    "layer": ("layer", "matrix", "activation"),
    "matrix": ("bias", "activation"),
    "bias": ("activation",),
    "activation": (),
}
"""What may follow what, in a model that a bundle can express."""


class Graph:
    """One graph and what is known of its wires.

    Args:
        onnx: the package.
        graph: the GraphProto.
        opset: of ONNX's own operators.
        constants: the initializers.
    """

    def __init__(self, onnx: Any, graph: Any, opset: int, constants: Mapping[str, Array]) -> None:
        self._onnx = onnx
        self._graph = graph
        self._opset = opset
        self._notes: list[str] = []
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
        outputs = [(each.name, self._value(each.name)) for each in self._graph.output]
        flows = [(name, value) for name, value in outputs if isinstance(value, Flow)]
        whole = [(name, value) for name, value in flows if not value.last]
        found = whole or flows
        if len(found) != 1:
            raise refused(
                listed([name for name, _ in outputs]), "expected exactly one output of rows"
            )
        passed = _stages(found[0][1])
        for name, value in flows:
            if value.stage not in passed:
                raise refused(name, f"is not on the way to {found[0][0]}, which is an output too")
        return self._assembled(*found[0])

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
        label = next((name for name in proto.output if name), "")
        node = Node(
            name=proto.name or label,
            op=proto.op_type,
            attributes={each.name: self._attribute(proto, each) for each in proto.attribute},
            outputs=tuple(proto.output),
            opset=self._opset,
        )
        if proto.domain not in ("", "ai.onnx"):
            raise refused(node.name, f"operator {node.op} of {proto.domain} is not supported")
        inputs = [self._value(name) if name else None for name in proto.input]
        for name, value in zip(node.outputs, self._outputs(node, inputs), strict=False):
            if name:
                self._values[name] = value

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
        flows = [each for each in inputs if isinstance(each, Flow)]
        if node.op in GATES:
            return self._cell(node, inputs)
        if node.op == "Constant":
            return [constant(node)]
        if node.op in ACTIVATIONS:
            return [activation(node, flow_of(node, inputs))]
        if node.op in FLOWS and flows:
            found = FLOWS[node.op](node, inputs)
            if found is not None:
                return found
        if node.op not in PLUMBING:
            raise refused(node.name, f"operator {node.op} is not supported")
        return PLUMBING[node.op](node, inputs)

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
            atoms.append(Atom(own, Length(size) if size > 0 else Length(1, (own,))))
        return Flow(
            Stage("input", name, content=str(dtype)),
            axes=tuple((atom,) for atom in atoms),
            features=(atoms[-1],) if atoms else (),
            tokens=np.dtype(dtype).kind in "iu",
        )

    # --- Recurrent nodes -------------------------------------------------------------------------

    def _cell(self, node: Node, inputs: list[Value | None]) -> list[Value]:
        cell = CellNode(node.name, node.op, node.attributes, tuple(inputs))
        x = inputs[0]
        if not isinstance(x, Flow) or x.tokens or x.last or x.way is not None:
            raise refused(node.name, f"{node.op}: X is not what flows from the input")
        if len(x.axes) != 3 or x.axes[2] != x.features:
            raise refused(node.name, f"{node.op}: the axes of X are not time, batch and features")
        time, batch = (x.axes[1], x.axes[0]) if cell.batch_first else (x.axes[0], x.axes[1])
        if len(time) != 1 or x.time not in (None, time[0]):
            raise refused(node.name, f"{node.op}: X has its time along another axis than before")
        layer, notes = cell_layer(cell)
        self._notes += notes
        stage = Stage("layer", node.name, x.stage, layer)
        units = Atom(f"{node.name}.units", Length(layer.tensors["weight_recurrent"].shape[1]))
        ways: Axis = () if cell.ways == 1 else (Atom(f"{node.name}.ways", Length(2)),)
        axes = (batch, time, ways, (units,)) if cell.batch_first else (time, ways, batch, (units,))
        y = Flow(stage, axes, features=(*ways, units), time=time[0])
        forward = cell.direction == "forward" and not cell.batch_first
        last = replace(y, axes=(batch, (units,)), last=True)
        rows = (last,) if forward else (None,) * (0 if cell.batch_first else cell.ways)
        nothing = (None,) * len(rows)
        return [y, Carried(node.name, rows), Carried(node.name, nothing)]

    # --- The whole -------------------------------------------------------------------------------

    def _assembled(self, name: str, flow: Flow) -> ImportedModel:
        atoms = {atom for axis in flow.axes for atom in axis}
        if flow.way is not None or not flow.axes or flow.axes[-1] != flow.features:
            raise refused(name, "its last axis is not that of the features")
        if not flow.last and flow.time is not None and flow.time not in atoms:
            raise refused(name, "has lost the axis of time")
        stages = _stages(flow)
        model = ImportedModel(notes=self._notes)
        for before, after in zip([None, *stages], stages, strict=False):
            if before is not None and after.kind not in _NEXT[before.kind]:
                raise refused(after.node, f"{after.kind} after {before.kind} ({before.node})")
            _add_stage(model, after)
        if not model.layers:
            raise refused(name, "no recurrent node on the way from the input")
        if stages[0].content != "float32" and model.embedding is None:
            raise refused(stages[0].node, f"is of type {stages[0].content}, expected float32")
        if flow.last:
            model.notes.append(f"{name} is the last step's row; the bundle gives every step's")
        return model


def _stages(flow: Flow) -> list[Stage]:
    """What was passed, from the input on."""
    stages: list[Stage] = []
    stage: Stage | None = flow.stage
    while stage is not None:
        stages.append(stage)
        stage = stage.before
    return stages[::-1]


def _add_stage(model: ImportedModel, stage: Stage) -> None:
    content = stage.content
    match stage.kind:
        case "embedding":
            model.embedding = tensor_of(stage.node, cast("Array", content))
        case "layer":
            model.layers.append(cast("ImportedLayer", content))
        case "matrix":
            model.head = tensor_of(stage.node, cast("Array", content))
        case "bias":
            model.head_bias = tensor_of(stage.node, cast("Array", content))
        case "activation":
            model.activation = cast("str", content)
        case _:
            pass
