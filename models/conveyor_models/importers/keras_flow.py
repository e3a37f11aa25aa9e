"""Rows on their way through a Keras model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from conveyor_models.importers.common import ImportedLayer, ImportedModel, refused, two_ways
from conveyor_models.importers.folding import Affine, chained, into_layer, note_of, scale
from conveyor_models.spec import WEIGHT_VALUES_MAX

_ELEMENTWISE = ("none", "sigmoid")


@dataclass(frozen=True, slots=True, eq=False)
class Flow:
    """What a layer reads: which layers the rows have been through."""

    origin: str
    """The input."""
    size: int | None
    """Features of a row; None for tokens, and where it is not stated."""
    embedding: Tensor | None = None
    layers: tuple[ImportedLayer, ...] = ()
    """Recurrent ones, bottom first."""
    maps: tuple[Affine, ...] = ()
    """What the rows have been through since the last of them."""
    biased: bool = False
    """Whether one of the maps has a bias."""
    activation: str = "none"
    ended: str = ""
    """The layer with that activation; nothing can follow it."""
    flipped: str = ""
    """The layer since which the rows come from the last to the first."""
    row: str = ""
    """Which row is left of them, "first" or "last"; empty where all are."""
    row_of: str = ""
    """The layer that left it."""

    def mapped(self, affine: Affine, *, biased: bool = True) -> Flow:
        """The rows after an affine map."""
        size = affine.output_size
        return replace(self, maps=(*self.maps, affine), biased=self.biased or biased, size=size)

    def through(self, layer: ImportedLayer, notes: list[str]) -> Flow:
        """The rows after a recurrent layer, which takes the maps before it into its weights."""
        if self.maps:
            affine = chained(self.maps)
            layer = into_layer(affine, layer)
            notes.append(note_of(affine, layer.name))
        return replace(
            self, layers=(*self.layers, layer), maps=(), biased=False, size=layer.output_size
        )

    def stack(self) -> tuple[object, ...]:
        """What two flows have in common that differ in affine maps and activations alone."""
        every = (self.embedding, *self.layers)
        return (self.origin, self.row, bool(self.flipped), *map(id, every))


def side_by_side(name: str, parts: Sequence[str], flows: Sequence[Flow]) -> Flow:
    """The features of several flows as one row.

    Args:
        name: of what puts them side by side, for messages.
        parts: their names.
        flows: at least one.

    Raises:
        UnsupportedModuleError: they are no affine maps of the rows of one stack, nor the two
            directions of a bidirectional layer.
    """
    first = flows[0]
    if len(flows) == 1:
        return first
    both = " and ".join(parts[:2])
    if any(flow.stack() != first.stack() for flow in flows):
        directions = _directions(name, flows)
        if directions is not None:
            return directions
        raise refused(
            name, f"{both} come from different layers; a bundle is one stack of recurrent layers"
        )
    if any(flow.activation != first.activation for flow in flows):
        raise refused(name, f"{both} have different activations; a bundle has one")
    if first.activation not in _ELEMENTWISE:
        raise refused(
            name, f"{first.activation} of {both} apart is not {first.activation} of them together"
        )
    whole = [
        chained(flow.maps) if flow.maps else _unchanged(part, flow)
        for part, flow in zip(parts, flows, strict=True)
    ]
    reads = whole[0].input_size
    if reads * sum(each.output_size for each in whole) > WEIGHT_VALUES_MAX:
        raise refused(name, f"has more than {WEIGHT_VALUES_MAX} weights")
    weight = torch.cat([_matrix(each) for each in whole])
    bias = torch.cat([each.bias for each in whole])
    affine = Affine(", ".join(each.name for each in whole), weight, bias)
    return replace(first, maps=(affine,), biased=any(flow.biased for flow in flows), size=len(bias))


def model_of(flow: Flow, notes: list[str]) -> ImportedModel:
    """The model that puts these rows out.

    Raises:
        UnsupportedModuleError: they come in the wrong order, or went through no recurrent layer.
    """
    if not flow.layers:
        raise refused("model", "holds no LSTM, GRU or SimpleRNN")
    if flow.flipped:
        raise refused(flow.flipped, "go_backwards: its rows would come out in reverse order")
    if flow.row:
        notes.append(
            f"{flow.row_of} gives the {flow.row} step's row; the bundle gives every step's"
        )
    model = ImportedModel(
        layers=[*flow.layers],
        embedding=flow.embedding,
        activation=flow.activation,
        notes=notes,
    )
    if flow.maps:
        affine = chained(flow.maps)
        model.head, bias = affine.as_linear()
        model.head_bias = bias if flow.biased else None
        if len(flow.maps) > 1:
            notes.append(note_of(affine, "the head"))
    return model


def _directions(name: str, flows: Sequence[Flow]) -> Flow | None:
    """[h forward ; h reverse] of two layers that read the same rows: one bidirectional layer."""
    if len(flows) != 2 or any(
        flow.maps or flow.ended or flow.row or flow.flipped or not flow.layers for flow in flows
    ):
        return None
    below, other = (replace(flow, layers=flow.layers[:-1]) for flow in flows)
    forward, reverse = (flow.layers[-1] for flow in flows)
    ways = [layer.table.get("direction", "forward") for layer in (forward, reverse)]
    if below.stack() != other.stack() or ways != ["forward", "reverse"]:
        return None
    layer = two_ways(forward, reverse, name)
    return replace(below, layers=(*below.layers, layer), size=layer.output_size)


def _unchanged(name: str, flow: Flow) -> Affine:
    if flow.size is None:
        raise refused(name, "the size of its rows is not stated")
    return scale(name, torch.ones(flow.size), torch.zeros(flow.size))


def _matrix(affine: Affine) -> Tensor:
    return torch.diag(affine.weight) if affine.weight.dim() == 1 else affine.weight
