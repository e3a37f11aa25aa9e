"""What the outputs of an ONNX graph are in a bundle: the way from the input, and one head.

Several outputs are one head where all are maps of the same row: its rows stand below each other,
and a note says which are whose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from conveyor_models.importers import folding
from conveyor_models.importers.common import (
    ImportedLayer,
    ImportedModel,
    kind_of,
    listed,
    refused,
    tensor_of,
    two_ways,
)
from conveyor_models.importers.ends import ends_joined
from conveyor_models.importers.folding import Affine
from conveyor_models.importers.onnx_maps import common
from conveyor_models.importers.onnx_shapes import ONE
from conveyor_models.importers.onnx_values import (
    Flow,
    Refused,
    Row,
    Stage,
    Value,
    last_row,
    sources_of,
)

STACKED: Final = ("none", "sigmoid")
"""Functions that take each number by itself, so that several outputs can share one."""


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """The outputs that are rows."""

    names: tuple[str, ...]
    flows: tuple[Flow, ...]
    stage: Stage
    row: Row | None
    maps: tuple[Affine | None, ...]


def assembled(outputs: Sequence[tuple[str, Value]], notes: Sequence[str]) -> ImportedModel:
    """The network, of which these are the outputs.

    Args:
        outputs: with their names, in the graph's order.
        notes: what is known of it already.

    Raises:
        UnsupportedModuleError: a bundle cannot give all of them.
    """
    for _, value in outputs:
        if isinstance(value, Refused):
            raise value.error
    rows = _rows(outputs)
    stages = _stages(rows.stage)
    model = ImportedModel(notes=list(notes))
    _add_stages(model, stages, rows)
    if not model.layers:
        raise refused(rows.names[0], "no recurrent node on the way from the input")
    if stages[0].content != "float32" and model.embedding is None:
        kind = kind_of(np.dtype(str(stages[0].content)))
        raise refused(stages[0].node, f"takes {kind}, expected 32-bit floats")
    _add_head(model, rows)
    for name, flow in zip(rows.names, rows.flows, strict=True):
        model.notes += _notes_of_rows(name, flow, rows)
    model.notes += _dropped(outputs, rows, stages)
    return model


# --- Which outputs -------------------------------------------------------------------------------


def _rows(outputs: Sequence[tuple[str, Value]]) -> _Rows:
    flows = [(name, value) for name, value in outputs if isinstance(value, Flow)]
    # A final state is a session's carry, unless there is nothing else to put out.
    found = [(name, flow) for name, flow in flows if not flow.final]
    if not found and len(flows) == 1:
        found = flows
    if not found:
        raise refused(listed([name for name, _ in outputs]), "expected an output of rows")
    names, whole = zip(*found, strict=True)
    for name, flow in found:
        _check_layout(name, flow)
    if len(found) == 1:
        (flow,) = whole
        return _Rows(names, whole, flow.stage, flow.row, (flow.affine,))
    functions = {flow.activation or "none" for flow in whole}
    if len(functions) > 1 or not functions <= set(STACKED):
        raise refused(
            listed(names),
            f"several outputs with {' and '.join(sorted(functions))} at the end: a bundle has one"
            " head and one activation, so export one output, or all of them without an activation",
        )
    plain = [replace(flow, activation=None) for flow in whole]
    if any(flow.row != whole[0].row for flow in plain):
        raise refused(
            listed(names),
            "outputs of different steps: a bundle gives one row for each step, so export one of"
            " them",
        )
    stage, row, maps = common(listed(names), plain)
    return _Rows(names, whole, stage, row, tuple(maps))


def _check_layout(name: str, flow: Flow) -> None:
    """Every number of a row has to be there, in its order."""
    atoms = [atom for axis in flow.axes for atom in axis]
    if [atom for atom in atoms if atom in flow.features] != list(flow.features):
        raise refused(name, "has the numbers of a row in another order")
    gone = flow.time is not None and flow.time not in atoms and flow.time.length != ONE
    if flow.row is None and gone:
        raise refused(name, "has lost the axis of time")
    if any(atom in flow.flipped for atom in atoms):
        raise refused(
            name,
            "has its steps or its batch from the last to the first: turn them back before the"
            " output",
        )


def _dropped(
    outputs: Sequence[tuple[str, Value]], rows: _Rows, stages: Sequence[Stage]
) -> list[str]:
    """Notes on the outputs that are final states, which a session holds."""
    passed = frozenset[str]().union(*(stage.names for stage in stages))
    notes: list[str] = []
    for name, value in outputs:
        if name in rows.names:
            continue
        sources = sources_of(value)
        if sources is None or sources.inputs or not sources.states:
            why = getattr(sources, "why", None)
            more = "" if why is None else f" ({why})"
            raise refused(name, f"an output that is neither rows nor a final state{more}")
        apart = sorted(sources.states - passed)
        if apart:
            raise refused(
                name, f"is the state of {listed(apart)}, which is not on the way to {rows.names[0]}"
            )
        notes.append(f"{name} is a final state: the carry that a session keeps, and no output")
    return notes


def _notes_of_rows(name: str, flow: Flow, rows: _Rows) -> list[str]:
    notes: list[str] = []
    match flow.row:
        case None:
            pass
        case "ends" if any(each is not None for each in rows.maps):
            notes.append(f"{name} is the last step's row; the bundle gives every step's")
        case "ends":
            forward = rows.stage.layers[0].output_size
            notes.append(
                f"{name} is the first {forward} numbers of the last step's row and the others of"
                " the first step's; the bundle gives every step's"
            )
        case number if number == _last(flow):
            notes.append(f"{name} is the last step's row; the bundle gives every step's")
        case 0:
            notes.append(f"{name} is the first step's row; the bundle gives every step's")
        case number:
            raise refused(name, f"step {number}, that is neither the last nor the first one")
    if flow.steps is not None and (flow.time is None or flow.time.length.known is None):
        notes.append(
            f"{name} is written out for {flow.steps} steps; the bundle takes any number, and gives"
            " the same for that many"
        )
    if not flow.axes or flow.axes[-1] != flow.features:
        size = flow.size
        notes.append(
            f"{name} has the {size} numbers of a row along another axis than the last, or along"
            " several; the bundle gives them as one row, in the same order"
        )
    return notes


def _last(flow: Flow) -> int:
    """The last step; of steps that are written out, where only they say how many there are."""
    open_ended = flow.time is not None and flow.time.length.known is None
    if open_ended and flow.steps is not None and flow.row != last_row(flow.time):
        return flow.steps - 1
    return last_row(flow.time)


# --- The way -------------------------------------------------------------------------------------


def _stages(last: Stage) -> list[Stage]:
    """What was passed, from the input on."""
    stages: list[Stage] = []
    stage: Stage | None = last
    while stage is not None:
        stages.append(stage)
        stage = stage.before
    return stages[::-1]


def _add_stages(model: ImportedModel, stages: Sequence[Stage], rows: _Rows) -> None:
    for stage in stages[1:]:
        if stage.kind == "embedding":
            if model.layers or model.embedding is not None or stage.affine is not None:
                raise refused(stage.node, "an embedding after something else")
            model.embedding = tensor_of(stage.node, _table(stage))
            continue
        layer = _layer(stage)
        if stage.affine is not None:
            layer = folding.into_layer(stage.affine, layer)
            if not stage.affine.moves:
                model.notes.append(folding.note_of(stage.affine, layer.name))
        model.layers.append(layer)


def _table(stage: Stage):
    content = stage.content
    assert not isinstance(content, str | tuple)
    return content


def _layer(stage: Stage) -> ImportedLayer:
    if len(stage.layers) == 1:
        return stage.layers[0]
    forward, reverse = stage.layers
    return two_ways(forward, reverse, name=stage.node)


def _add_head(model: ImportedModel, rows: _Rows) -> None:
    model.activation = rows.flows[0].activation or "none"
    maps = [each for each in rows.maps if each is not None]
    if not maps:
        return
    whole = folding.stacked(maps)
    if rows.row == "ends":
        whole = _joined_ends(model, rows, whole)
    model.head, bias = whole.as_linear()
    biased = any(flow.biased for flow in rows.flows)
    model.head_bias = bias if biased else None
    if len(rows.names) > 1:
        start = 0
        for name, affine in zip(rows.names, maps, strict=True):
            end = start + affine.output_size
            last = end - 1
            which = (
                f"number {last} of a row is"
                if start == last
                else f"numbers {start} to {last} of a row are"
            )
            model.notes.append(f"{which} {name}")
            start = end
    folded = [flow.affine for flow in rows.flows if flow.maps > 1 and not _is_linear(flow)]
    model.notes += [
        folding.note_of(affine, "the head")
        for affine in folded
        if affine is not None and not affine.moves
    ]


def _joined_ends(model: ImportedModel, rows: _Rows, whole: Affine) -> Affine:
    """The head, on the last row of one more layer that brings the two last states together."""
    forward, reverse = rows.stage.layers
    found = ends_joined(f"{rows.stage.node} (ends)", (forward, reverse), whole)
    if found is None:
        raise refused(
            rows.names[0],
            f"{whole.name} reads the last state of each direction, which lie at the two ends of a"
            " sequence, and they are too many to be kept. Export the rows of every step"
            " instead (nn.LSTM's output and not its h_n)",
        )
    layer, head = found
    model.layers.append(layer)
    model.notes.append(
        f"{rows.names[0]} reads the last state of each direction: one more layer,"
        f" {layer.name}, keeps that of the first row for the last one"
    )
    return head


def _is_linear(flow: Flow) -> bool:
    """Whether its maps are a matrix and a bias, which are a head as they are."""
    return flow.maps == 2 and flow.biased
