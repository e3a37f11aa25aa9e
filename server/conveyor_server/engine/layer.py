"""A layer's kernel, whatever its cell, and a packed batch stepped through one or several."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from conveyor_models import CellWeights, GruWeights, LstmWeights, RecurrentLayer, RnnWeights
from conveyor_server.engine.feeds import Feed
from conveyor_server.engine.gru import GruKernel
from conveyor_server.engine.lstm import LstmKernel
from conveyor_server.engine.packing import Columns, pad_vector, round_up
from conveyor_server.engine.products import ProductFamily
from conveyor_server.engine.rnn import RnnKernel
from conveyor_server.engine.trace import Tap


class Kernel(Protocol):
    """One layer in one direction, its weights packed for a family of products."""

    @property
    def carry(self) -> Columns:
        """Size and width of each part of the carry; h, which is the output, is the first."""
        ...

    def step(self, x: Tensor, carry: list[Tensor], tap: Tap | None) -> list[Tensor]:
        """One step of each row.

        Args:
            x: What the layer's feed reads, [rows, ...].
            carry: Each part [rows, width]; not written to.
            tap: Shown the gates, if there is one.

        Returns:
            The new carry, in new memory.
        """
        ...


def make_kernel(weights: CellWeights, feed: Feed, family: ProductFamily) -> Kernel:
    """Packs a layer."""
    match weights:
        case LstmWeights():
            return LstmKernel(weights, feed, family)
        case GruWeights():
            return GruKernel(weights, feed, family)
        case RnnWeights():
            return RnnKernel(weights, feed, family)


def initial_carry(
    layer: RecurrentLayer, tensors: Mapping[str, Tensor], carry: Columns
) -> list[Tensor]:
    """What a layer begins with, for each part of its kernel's carry [width].

    `tensors` of one direction, as the kernel's weights were made of.
    """
    like = tensors["bias"]
    return [
        pad_vector(tensors[f"initial_{name}"]) if layer.initial_state else like.new_zeros(width)
        for name, (_, width) in zip(layer.carry_names, carry, strict=True)
    ]


Step: TypeAlias = Callable[[Tensor, list[Tensor], int], tuple[Tensor, list[Tensor]]]
"""x [rows, ...], the carry's parts [rows, width] and how many of the rows are no padding ->
outputs [rows, output width] and the new carry."""


def run_packed(
    step: Step, x: Tensor, counts: Sequence[int], carry: list[Tensor], rows_multiple: int
) -> tuple[Tensor, list[Tensor]]:
    """Steps through a packed batch.

    Args:
        step: What is done each time.
        x: In packed order, then rows of padding, [rows + padding, ...].
        counts: n_t, as in `ragged.Layout`.
        carry: For each part a row for each work, longest first, padded to a multiple of rows.
        rows_multiple: What the number of rows in each step is rounded up to.

    Returns:
        The outputs in packed order with padding rows behind, and each part of the carry after each
        work's last step, longest first, without padding.
    """
    if len(counts) == 1:
        y, carry = step(x, carry, counts[0])
        return y, [part[: counts[0]] for part in carry]
    outputs: Tensor | None = None
    ended: list[list[Tensor]] = []
    offset = 0
    for time, count in enumerate(counts):
        rows = round_up(count, rows_multiple)
        y, carry = step(x[offset : offset + rows], [part[:rows] for part in carry], count)
        if outputs is None:
            outputs = y.new_empty(x.shape[0], y.shape[1])
        # Rows beyond `count` are padding; the next step's outputs overwrite them.
        outputs[offset : offset + rows] = y
        offset += count
        remaining = counts[time + 1] if time + 1 < len(counts) else 0
        if remaining < count:
            ended.append([part[remaining:count] for part in carry])
    assert outputs is not None
    if len(ended) == 1:
        return outputs, ended[0]
    return outputs, [torch.cat(parts) for parts in zip(*reversed(ended), strict=True)]
