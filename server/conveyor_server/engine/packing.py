"""How weights and rows are laid out for the kernels.

Sizes are rounded up to `LANE` units of zero weight, so that every element-wise kernel runs in whole
vectors: its scalar remainder loop gives other last bits, and where the remainder falls depends on
the number of rows. The added units of every cell are exactly 0 for ever: all their sums are 0, so
a gate is s(0) = 0.5, a candidate 2 * 0.5 - 1 = 0, and 0 is what becomes of a state of 0.
"""

from collections.abc import Sequence
from typing import Final, TypeAlias

from torch import Tensor

LANE: Final = 32
"""Twice the widest vector (16 floats with AVX-512).

That is what the element-wise kernels take in one turn.
"""

Columns: TypeAlias = Sequence[tuple[int, int]]
"""What a row consists of: for each piece its size, and its width with padding behind."""


def padded(size: int) -> int:
    """`size` rounded up to whole lanes."""
    return round_up(size, LANE)


def round_up(rows: int, multiple: int) -> int:
    """`rows` rounded up to a multiple."""
    return -(-rows // multiple) * multiple


def spread(weight: Tensor, columns: Columns) -> Tensor:
    """Puts a weight's columns where the pieces of a row are: [out, sizes] -> [out, widths]."""
    wide = weight.new_zeros(weight.shape[0], sum(width for _, width in columns))
    start = offset = 0
    for size, width in columns:
        wide[:, offset : offset + size] = weight[:, start : start + size]
        start, offset = start + size, offset + width
    assert start == weight.shape[1], (start, weight.shape)
    return wide


def pad_blocks(weight: Tensor, scales: Sequence[float]) -> Tensor:
    """Pads each gate's block of rows for itself: [gates * size, in] -> [gates * width, in].

    Args:
        weight: Blocks of equal size, one after another.
        scales: For each block what it is multiplied by; powers of two are exact.
    """
    blocks = weight.reshape(len(scales), -1, weight.shape[1])  # [gates, size, in]
    wide = weight.new_zeros(len(scales), padded(blocks.shape[1]), weight.shape[1])
    for number, scale in enumerate(scales):
        wide[number, : blocks.shape[1]] = blocks[number] * scale
    return wide.flatten(0, 1)


def pad_vector(vector: Tensor, scales: Sequence[float] = (1,)) -> Tensor:
    """`pad_blocks` of a bias, a peephole or a carry: [gates * size] -> [gates * width]."""
    return pad_blocks(vector.unsqueeze(1), scales).squeeze(1).contiguous()
