"""Which mistakes there are, and in which models each can be made.

A mistake is the name of something that `reference` and `reference_cells` get wrong on request.
"""

from __future__ import annotations

from collections.abc import Iterator

from conveyor_models import ModelSpec
from conveyor_models.layers import GatedLayer, GruLayer, LstmLayer, RecurrentLayer, RnnLayer
from tests.fidelity.reference_cells import SWAPS


def applicable(spec: ModelSpec) -> tuple[str, ...]:
    """The mistakes that can be made in a model. At least two rows of memory, three steps."""
    found = dict.fromkeys(mistake for layer in spec.layers for mistake in _of_layer(layer))
    found |= dict.fromkeys(_of_attention(spec))
    found |= dict.fromkeys(_of_network(spec))
    return tuple(found)


def _of_layer(layer: RecurrentLayer) -> Iterator[str]:
    yield "bias dropped"
    yield "carry forgotten"
    if layer.initial_state:
        yield "initial state ignored"
    if layer.clip is not None:
        yield "clip ignored"
    if layer.direction != "forward":
        yield "direction not reversed"
        yield "outputs left in reverse"
    if layer.direction == "bidirectional":
        yield "halves swapped"
        yield "one direction's weights for both"
    if isinstance(layer, GatedLayer):
        yield from _of_gates(layer)
    match layer:
        case RnnLayer():
            yield "relu and tanh exchanged"
            yield "no nonlinearity"
        case LstmLayer():
            yield from _of_lstm(layer)
        case GruLayer():
            yield from _of_gru(layer)
        case _:
            raise AssertionError(layer)


def _of_gates(layer: GatedLayer) -> Iterator[str]:
    yield from (swap for swap, pair in SWAPS.items() if set(pair) <= set(layer.gates))
    yield "candidate without tanh"
    yield "candidate of half the slope"
    yield "logistic and hard sigmoid exchanged"
    if layer.clip is not None:
        yield "candidate not clipped"
    if layer.gate_activation == "hard_sigmoid":
        yield "slope of the hard sigmoid wrong"
        if layer.clip is None or layer.clip * layer.hard_sigmoid_slope > 0.5:
            yield "hard sigmoid without its lower limit"


def _of_lstm(layer: LstmLayer) -> Iterator[str]:
    yield "old c shown"
    yield "c shown without tanh"
    yield from (f"peephole of {gate[0]} dropped" for gate in layer.peepholes)
    if layer.peepholes:
        yield "peepholes see h"
    if "output" in layer.peepholes:
        yield "peephole of o sees the old c"
    if {"input", "forget"} <= set(layer.peepholes):
        yield "peepholes of i and f swapped"
    if layer.coupled:
        yield "coupled i is f"
        yield "coupled i and f swapped"
    if layer.projection is not None:
        yield "projection omitted"
        if layer.projection > 1:
            yield "projection transposed"


def _of_gru(layer: GruLayer) -> Iterator[str]:
    yield "z and 1 - z swapped"
    yield "reset omitted"
    if layer.reset == "after":
        yield "recurrent bias of n dropped"
        yield "recurrent bias of n outside r"
    if layer.size > 1:  # products of one number commute
        yield "reset before and after exchanged"


def _of_attention(spec: ModelSpec) -> Iterator[str]:
    if spec.attention is None:
        return
    yield "softmax over padding rows"
    yield "keys without bias"
    yield "score without tanh"
    yield "all rows weighted alike"
    yield "rows in reverse"
    yield "z not fed to the stack"
    yield "[z ; x] fed"
    yield "asked by the h before"
    yield "asked by the new h"
    if len(spec.layers) > 1:
        yield "asked by the bottom layer"
    if spec.attention.gate:
        yield "attention gate omitted"
    if spec.attention.head:
        yield "z not fed to the head"


def _of_network(spec: ModelSpec) -> Iterator[str]:
    if len(spec.layers) > 1 and _interchangeable(spec):
        yield "layer order swapped"
    if spec.head is not None and spec.head.bias:
        yield "head bias dropped"
    if spec.output.activation != "none":
        yield "activation omitted"


def _interchangeable(spec: ModelSpec) -> bool:
    """Whether the layers fit in the opposite order."""
    sizes = spec.layer_input_sizes
    return sizes == sizes[::-1] and all(
        layer.output_size == size for layer, size in zip(spec.layers, sizes, strict=True)
    )
