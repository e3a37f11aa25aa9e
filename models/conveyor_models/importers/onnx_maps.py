"""Affine maps on what flows, and flows that meet again.

A row passes any number of affine maps between two stages of a bundle. They are kept as one, which
is folded into the layer that reads it, or is the head. Flows that meet (laid side by side, added,
or two outputs) have to be maps of the same row, so that together they are one map of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from conveyor_models.importers import folding
from conveyor_models.importers.common import ImportedLayer, refused
from conveyor_models.importers.folding import Affine
from conveyor_models.importers.onnx_node import Node
from conveyor_models.importers.onnx_shapes import Length
from conveyor_models.importers.onnx_values import (
    Atom,
    Axis,
    Flow,
    Row,
    Stage,
    axis_of,
    last_row,
)

MAPS_MAX: Final = 64
"""Between two stages."""
NAME_CHARACTERS: Final = 80


def short(name: str) -> str:
    """A node's name, for names that are made of several."""
    return name[:NAME_CHARACTERS]


def with_features(node: Node, flow: Flow, place: int) -> Flow:
    """The flow, with its features along an axis; which axis of an input that is, its use says."""
    if flow.axes[place] == flow.features:
        return flow
    open_still = flow.raw and flow.affine is None and flow.row is None and not flow.tokens
    if not open_still:
        raise node.refused("along another axis than that of the features")
    return replace(flow, features=flow.axes[place])


def mapped(
    node: Node, flow: Flow, affine: Affine, *, biased: bool = False, changes: bool = True
) -> Flow:
    """The flow after a map of its rows; its axes stay as they are.

    Args:
        node: for messages and its budget.
        flow: what is mapped.
        affine: the map.
        biased: whether it may add something.
        changes: whether it does more than to choose and place numbers.
    """
    if flow.activation is not None:
        raise node.refused(f"after {flow.activation}, with which a bundle ends")
    if flow.tokens:
        raise node.refused("of tokens, which can only be looked up in an embedding")
    if flow.maps == MAPS_MAX:
        raise node.refused(f"more than {MAPS_MAX} linear maps in a row")
    whole = affine
    if flow.affine is not None:
        node.multiply(_products(affine, flow.affine))
        if changes and affine.weight.dim() == 2:
            folding.check_offsets(flow.affine)
        whole = affine.after(flow.affine)
    computed = flow.computed or (node.name if changes else None)
    found = replace(
        flow,
        affine=whole,
        maps=flow.maps + 1,
        biased=flow.biased or biased,
        computed=computed,
        final=flow.final and not changes,
    )
    return found if changes else _simplified(found)


def _products(second: Affine, first: Affine) -> int:
    if second.weight.dim() == 1 or first.weight.dim() == 1:
        return max(second.weight.numel(), first.weight.numel())
    return second.output_size * second.input_size * first.input_size


def selected(node: Node, flow: Flow, places: Sequence[int]) -> Flow:
    """Some numbers of a row. The caller sees to the axes."""
    size = flow.size
    if size is None:
        raise node.refused("of features whose number the file does not state")
    node.spend((len(places), size))
    affine = folding.selection(short(node.name), places, size)
    return mapped(node, flow, affine, changes=False)


def _simplified(flow: Flow) -> Flow:
    """Without a map that changes nothing, or as one direction of a bidirectional layer."""
    affine = flow.affine
    if affine is None or affine.weight.dim() == 1 or flow.computed is not None:
        return flow
    if _is_identity(affine.weight):
        return replace(flow, affine=None, maps=0)
    if len(flow.stage.layers) != 2:
        return flow
    size = flow.stage.layers[0].output_size
    halves = affine.weight[:, :size], affine.weight[:, size:]
    for way, (own, other) in enumerate((halves, halves[::-1])):
        if _is_identity(own) and not bool(other.any()):
            row: Row | None = (last_row(flow.time), 0)[way] if flow.row == "ends" else flow.row
            stage = replace(flow.stage, content=(flow.stage.layers[way],))
            return replace(flow, stage=stage, affine=None, maps=0, row=row)
    return flow


def _is_identity(weight: Tensor) -> bool:
    size = weight.shape[0]
    return weight.shape[1] == size and torch.equal(weight, torch.eye(size, dtype=weight.dtype))


# --- Flows that meet -----------------------------------------------------------------------------


def joined(node: Node, flows: Sequence[Flow]) -> Flow:
    """Rows laid side by side; the last axis but for its features is that of the first flow."""
    sizes = [flow.size for flow in flows]
    whole = [size for size in sizes if size is not None]
    if len(whole) != len(flows):
        raise node.refused("of features whose number the file does not state")
    found = _met(node, flows, folding.stacked)
    features: Axis = axis_of(Atom(f"{node.name}.joined", Length.of(sum(whole))))
    if len(flows) == 2 and whole[0] == whole[1]:
        features = (Atom(f"{node.name}.ways", Length.of(2)), *flows[0].features)
    return replace(_simplified(found), features=features)


def added(node: Node, flows: Sequence[Flow]) -> Flow:
    """Rows added to each other."""
    of_one_input(node.name, flows)
    if any(flow.axes != flows[0].axes for flow in flows):
        same_axes = [flow.axes[:-1] for flow in flows]
        if any(each != same_axes[0] for each in same_axes) or any(
            flow.axes[-1] != flow.features for flow in flows
        ):
            raise node.refused("of rows that lie along other axes")
    return replace(_met(node, flows, folding.summed), computed=node.name, final=False)


def _met(node: Node, flows: Sequence[Flow], put: Callable[[Sequence[Affine]], Affine]) -> Flow:
    stage, row, maps = common(node.name, flows)
    for each in maps:
        node.spend((each.output_size, each.input_size))
    first = flows[0]
    return replace(
        first,
        stage=stage,
        row=row,
        affine=put(maps),
        maps=max(flow.maps for flow in flows) + 1,
        biased=any(flow.biased for flow in flows),
        final=all(flow.final for flow in flows),
        computed=next((flow.computed for flow in flows if flow.computed), None),
    )


def of_one_input(name: str, flows: Sequence[Flow]) -> None:
    """Refuses rows that come from several inputs of the graph."""
    origins = sorted({flow.stage.origin for flow in flows})
    if len(origins) > 1:
        raise refused(
            name, f"joins two inputs, {origins[0]} and {origins[1]}: a bundle reads one row a step"
        )


def common(name: str, flows: Sequence[Flow]) -> tuple[Stage, Row | None, list[Affine]]:
    """The stage of which all flows are maps, the row of it that they are, and the maps.

    Raises:
        UnsupportedModuleError: they are not maps of the same row.
    """
    first = flows[0]
    of_one_input(name, flows)
    if any(flow.activation is not None or flow.tokens for flow in flows):
        raise refused(name, "joins tokens, or what has passed the last activation")
    stage = first.stage
    one = all(flow.stage is stage for flow in flows)
    layers = None if one else _two_directions(name, flows)
    if any((flow.time, flow.flipped) != (first.time, first.flipped) for flow in flows):
        raise refused(name, "joins rows of different steps")
    if layers is None:
        if any(flow.row != first.row for flow in flows):
            raise refused(name, "joins rows of different steps")
        return stage, first.row, [flow.affine or _identity(name, flow) for flow in flows]
    stage = Stage("layer", first.stage.node, stage.before, stage.affine, layers)
    widened = [_widened(flow, layers, name) for flow in flows]
    return stage, _common_row(name, flows, layers), widened


def _identity(name: str, flow: Flow) -> Affine:
    size = flow.size
    if size is None:
        raise refused(name, "joins features whose number the file does not state")
    return folding.scale(short(flow.stage.node), torch.ones(size), torch.zeros(size))


def _two_directions(name: str, flows: Sequence[Flow]) -> tuple[ImportedLayer, ImportedLayer]:
    """Forward and reverse, of layers that read the same rows."""
    first = flows[0].stage
    found: list[ImportedLayer] = []
    for flow in flows:
        stage = flow.stage
        apart = stage.before is not first.before or stage.affine is not first.affine
        if not stage.layers or apart:
            names = f"{first.node} and {stage.node}"
            raise refused(name, f"joins two paths, {names}: a bundle is one stack of layers")
        found += [layer for layer in stage.layers if not any(layer is each for each in found)]
    ways = {layer.table.get("direction", "forward"): layer for layer in found}
    if len(found) != 2 or set(ways) != {"forward", "reverse"}:
        names = ", ".join(layer.name for layer in found[:4])
        raise refused(name, f"joins {names}, which are not one layer forward and one in reverse")
    return ways["forward"], ways["reverse"]


def _widened(flow: Flow, layers: tuple[ImportedLayer, ImportedLayer], name: str) -> Affine:
    """The flow's map, of the row of both directions."""
    affine = flow.affine or _identity(name, flow)
    if len(flow.stage.layers) == 2:
        return affine
    weight = affine.weight if affine.weight.dim() == 2 else affine.weight.diag()
    forward = flow.stage.layers[0] is layers[0]
    nothing = weight.new_zeros(weight.shape[0], layers[1 if forward else 0].output_size)
    sides = (weight, nothing) if forward else (nothing, weight)
    return Affine(affine.name, torch.cat(sides, 1), affine.bias)


def _common_row(
    name: str, flows: Sequence[Flow], layers: tuple[ImportedLayer, ImportedLayer]
) -> Row | None:
    rows = {flow.row for flow in flows}
    if len(rows) == 1:
        return flows[0].row
    for flow in flows:
        if flow.row not in _ends(flow, layers[0]):
            raise refused(name, "joins rows of different steps")
    return "ends"


def _ends(flow: Flow, forward: ImportedLayer) -> tuple[Row, ...]:
    """The row in which a direction ends; of written-out steps also by their number."""
    if len(flow.stage.layers) == 2:
        return ("ends",)
    if flow.stage.layers[0] is forward:
        return (last_row(flow.time), (flow.steps or 0) - 1)
    return (0, -(flow.steps or 0))
