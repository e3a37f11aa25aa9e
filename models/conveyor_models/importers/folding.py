"""Affine maps between the layers of a network, folded into the layers beside them.

Means and deviations, batch normalisation in evaluation mode and a linear layer behind another one
are affine maps of a row: y = A x + b. A bundle has no place for them, but the layer that reads y is
linear in it, so A and b become part of its weights. Products are computed in float64 and rounded to
float32 once; nothing else differs from the original network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from conveyor_models.importers.common import ImportedLayer, exact_float32, refused
from conveyor_models.spec import WEIGHT_VALUES_MAX

_DIRECTIONS = ("", "reverse.")
OFFSET_MAX: Final = 1024
"""Of what is added to a scaled feature, and of a mean in deviations. Folding moves the difference
between an input and its mean into float32 sums: a mean as many deviations from 0 as this costs
2^-14 of a deviation."""


@dataclass(frozen=True, slots=True, eq=False)
class Affine:
    """y = weight x + bias.

    A `weight` of [size] stands for a diagonal matrix: one factor for each feature.
    """

    name: str
    """What the file calls it, for messages."""
    weight: Tensor
    """[outputs, inputs], or [size] for a factor per feature; float64."""
    bias: Tensor
    """[outputs]; float64."""

    @property
    def input_size(self) -> int:
        """Features read."""
        return self.weight.shape[-1]

    @property
    def output_size(self) -> int:
        """Features written."""
        return self.weight.shape[0]

    @property
    def moves(self) -> bool:
        """Whether it only chooses and places features, so that no number is rounded."""
        if self.weight.dim() == 1:
            return bool((self.weight == 1).all() and (self.bias == 0).all())
        plain = ((self.weight == 0) | (self.weight == 1)).all()
        single = (self.weight != 0).sum(1) == 1
        return bool(plain and single.all() and (self.bias == 0).all())

    def after(self, first: Affine) -> Affine:
        """The one map that does `first` and then this one.

        Raises:
            UnsupportedModuleError: it does not read what `first` writes, or is too large.
        """
        _check_chain(first, self.name, self.input_size)
        if self.weight.dim() == 2 and first.weight.dim() == 2:
            _check_values(self.name, self.output_size * first.input_size)
        if self.weight.dim() == 2:
            weight = _times(self.weight, first.weight)
            bias = self.weight @ first.bias + self.bias
        else:
            rows = self.weight[:, None] if first.weight.dim() == 2 else self.weight
            weight, bias = rows * first.weight, self.weight * first.bias + self.bias
        return Affine(f"{first.name}, {self.name}", weight, bias)

    def apply(self, rows: Tensor) -> Tensor:
        """The map on rows of features: [..., inputs] -> [..., outputs], in float64."""
        product = rows.double() @ self.weight.T if self.weight.dim() == 2 else rows * self.weight
        return product + self.bias

    def as_linear(self) -> tuple[Tensor, Tensor]:
        """Weight [outputs, inputs] and bias [outputs] of a linear layer, as float32.

        Raises:
            UnsupportedModuleError: a value is not finite in float32, or it is too large.
        """
        weight = self.weight
        if weight.dim() == 1:
            _check_values(self.name, weight.shape[0] ** 2)
            weight = torch.diag(weight)
        return rounded(self.name, weight), rounded(self.name, self.bias)


def linear(name: str, weight: Tensor, bias: Tensor | None) -> Affine:
    """A linear layer as an affine map.

    Args:
        name: of the layer, for messages.
        weight: [outputs, inputs].
        bias: [outputs], or none.
    """
    whole = weight.detach().double()
    return Affine(name, whole, whole.new_zeros(whole.shape[0]) if bias is None else bias.double())


def scale(name: str, factor: Tensor, offset: Tensor) -> Affine:
    """y = factor x + offset, feature by feature; both [size]."""
    return Affine(name, factor.detach().double(), offset.detach().double())


def batch_norm(
    name: str,
    mean: Tensor,
    variance: Tensor,
    epsilon: float,
    gamma: Tensor | None,
    beta: Tensor | None,
) -> Affine:
    """Batch normalisation in evaluation mode: gamma (x - mean) / sqrt(variance + epsilon) + beta.

    Args:
        name: of the layer, for messages.
        mean: the running mean, [size].
        variance: the running variance, [size].
        epsilon: what keeps the root from 0.
        gamma: [size], or none for 1.
        beta: [size], or none for 0.

    Raises:
        UnsupportedModuleError: variance + epsilon is not positive, or a mean is too far from 0.
    """
    inner = variance.double() + epsilon
    if not bool((inner > 0).all()):
        raise refused(name, f"variance + {epsilon} is not positive")
    # Before gamma, which could hide how many deviations a mean is from 0.
    check_offsets(scale(name, inner.rsqrt(), -mean.double() * inner.rsqrt()))
    factor = inner.rsqrt() if gamma is None else gamma.double() / inner.sqrt()
    offset = -mean.double() * factor
    return scale(name, factor, offset if beta is None else offset + beta.double())


def selection(name: str, places: Sequence[int], size: int) -> Affine:
    """Some of `size` features, in the order of `places`."""
    _check_values(name, len(places) * size)
    weight = torch.zeros(len(places), size, dtype=torch.float64)
    weight[torch.arange(len(places)), torch.tensor(list(places), dtype=torch.int64)] = 1
    return Affine(name, weight, weight.new_zeros(len(places)))


def stacked(maps: Sequence[Affine]) -> Affine:
    """Several maps of the same row, their outputs one after the other.

    Raises:
        UnsupportedModuleError: they read rows of different lengths, or are too large.
    """
    return _of_same_row(maps, torch.cat)


def summed(maps: Sequence[Affine]) -> Affine:
    """Several maps of the same row, their outputs added.

    Raises:
        UnsupportedModuleError: their rows differ in length, or are too large.
    """
    sizes = {each.output_size for each in maps}
    if len(sizes) != 1:
        raise refused(maps[0].name, f"adds rows of {sorted(sizes)} numbers")
    return _of_same_row(maps, lambda parts: torch.stack(parts).sum(0))


def _of_same_row(maps: Sequence[Affine], put: Callable[[list[Tensor]], Tensor]) -> Affine:
    for each in maps:
        if each.input_size != maps[0].input_size:
            raise refused(each.name, f"reads {each.input_size} numbers, not {maps[0].input_size}")
    _check_values(maps[0].name, maps[0].input_size * sum(each.output_size for each in maps))
    weights = [each.weight if each.weight.dim() == 2 else each.weight.diag() for each in maps]
    name = maps[0].name if len(maps) == 1 else f"{maps[0].name} and {len(maps) - 1} more"
    return Affine(name, put(weights), put([each.bias for each in maps]))


def check_offsets(affine: Affine) -> None:
    """Refuses factors and offsets that would lose digits once they are part of float32 weights.

    Raises:
        UnsupportedModuleError: an offset is more than `OFFSET_MAX`, in units of what comes out.
    """
    far = int(affine.bias.abs().argmax())
    offset = float(affine.bias[far])
    if affine.weight.dim() == 1 and abs(offset) > OFFSET_MAX:
        raise refused(
            affine.name,
            f"adds {offset:.6g} to feature {far}, expected at most {OFFSET_MAX}: folding it into"
            " float32 weights would lose digits; subtract means from the inputs instead, or leave"
            " out a feature that never changes",
        )


def into_layer(affine: Affine, layer: ImportedLayer) -> ImportedLayer:
    """A recurrent layer that reads what the map reads, in both its directions.

    W (A x + b) + c is (W A) x + (W b + c). The carry is not touched, so initial states, masks of
    peepholes and the reset gate keep their meaning.

    Raises:
        UnsupportedModuleError: the layer reads another number of features, or digits would be lost.
    """
    _check_chain(affine, layer.name, layer.input_size)
    check_offsets(affine)
    tensors = dict(layer.tensors)
    for way in _DIRECTIONS:
        if f"{way}weight_input" not in tensors:
            continue
        folded = linear(layer.name, tensors[f"{way}weight_input"], tensors[f"{way}bias"]).after(
            affine
        )
        tensors[f"{way}weight_input"], tensors[f"{way}bias"] = folded.as_linear()
    return replace(layer, tensors=tensors)


def into_embedding(table: Tensor, affine: Affine) -> Tensor:
    """The table [V, E] whose rows have passed through the map: [V, outputs].

    Raises:
        UnsupportedModuleError: the map reads another number of features, or the table is too large.
    """
    if table.shape[1] != affine.input_size:
        raise refused(affine.name, f"reads {affine.input_size} numbers, not {table.shape[1]}")
    _check_values(affine.name, table.shape[0] * affine.output_size)
    return rounded(affine.name, affine.apply(table))


def chained(maps: Sequence[Affine]) -> Affine:
    """Several maps, the first one first, as one.

    Raises:
        UnsupportedModuleError: one does not read what the one before writes.
    """
    whole = maps[0]
    for each in maps[1:]:
        whole = each.after(whole)
    return whole


def note_of(affine: Affine, into: str) -> str:
    """What somebody who imports the model should know of a fold."""
    return (
        f"{affine.name} folded into {into}: the same function, rounded to float32 once in another"
        " place"
    )


def rounded(name: str, tensor: Tensor) -> Tensor:
    """The nearest float32 values.

    Raises:
        UnsupportedModuleError: one of them is not finite.
    """
    return exact_float32(name, tensor.float())


def _times(left: Tensor, right: Tensor) -> Tensor:
    return left @ right if right.dim() == 2 else left * right


def _check_chain(first: Affine, name: str, reads: int) -> None:
    if first.output_size != reads:
        raise refused(name, f"reads {reads} numbers, and {first.name} gives {first.output_size}")


def _check_values(name: str, values: int) -> None:
    if values > WEIGHT_VALUES_MAX:
        raise refused(name, f"folds to {values} values, expected at most {WEIGHT_VALUES_MAX}")
