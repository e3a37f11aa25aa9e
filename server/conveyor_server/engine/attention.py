"""Additive attention over the memories of a ragged batch.

`conveyor_models.attention` states the equations. A session's bits may not depend on its neighbours,
nor on the lengths of their memories, so:

* Works are taken together whose memories have the same width, a power of two; not more of them
  than a processor's cache holds, and large memories each for itself, without a copy.
* Sums over rows and over columns are folded in halves, element by element: an order that is fixed
  whatever else is in the batch, on any device. What does not count is an exact zero.
* The logistic function stands in for tanh, see `engine.functions`. v . tanh(u) is then
  2 v . s(2u) less the sum of v, which moves every row alike and falls out of the softmax.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from conveyor_models import AttentionWeights
from conveyor_server.engine.functions import CANDIDATE
from conveyor_server.engine.logistic import logistic_
from conveyor_server.engine.memories import HeldMemory
from conveyor_server.engine.packing import pad_blocks, pad_vector, padded, spread
from conveyor_server.engine.products import Product, ProductFamily
from conveyor_server.engine.trace import Tap

GROUP_NUMBERS_MAX: Final = 2**18
"""Of the keys, or of the rows, of the memories that are taken together: 1 MiB."""
GROUP_NUMBERS_MAX_CUDA: Final = 2**24
"""The same where a call costs more than what it computes."""


@dataclass(frozen=True, slots=True, eq=False)
class _Group:
    """Works whose memories have one width, longest first."""

    ranks: list[int]
    lengths: list[int]
    index: Tensor
    """`ranks`, on the device."""
    keys: Tensor
    """[works, width, attention width]"""
    rows: Tensor
    """[works, width, memory width]"""
    absent: Tensor
    """0 where a row counts and -inf where it does not, [works, width]."""


class Attention:
    """One model's attention, its weights packed."""

    def __init__(self, weights: AttentionWeights, hidden_size: int, family: ProductFamily) -> None:
        """`hidden_size`: of the top layer's h."""
        size = weights.memory.shape[1]
        hidden = ((hidden_size, padded(hidden_size)),)
        self.columns = (size, padded(size))
        """Of what is read."""
        self._query = family.product(
            pad_blocks(spread(weights.query, hidden), (CANDIDATE,)),
            pad_vector(weights.bias, (CANDIDATE,)),
        )
        self._score = pad_vector(weights.score) * 2
        self._gate: Product | None = None
        if weights.gate is not None and weights.bias_gate is not None:
            # The same number in every column, as z has them.
            row = spread(weights.gate[None], hidden)
            width = self.columns[1]
            bias = weights.bias_gate.expand(width).contiguous()
            self._gate = family.product(row.expand(width, -1).contiguous(), bias)

    def gather(self, memories: Sequence[HeldMemory]) -> MemoryBatch:
        """Brings the memories of a batch together, that of the longest work first."""
        device = self._score.device
        by_width: dict[int, list[int]] = {}
        for rank, memory in enumerate(memories):
            by_width.setdefault(memory.width, []).append(rank)
        numbers_max = GROUP_NUMBERS_MAX_CUDA if self._score.is_cuda else GROUP_NUMBERS_MAX
        columns = max(len(self._score), self.columns[1])
        groups: list[_Group] = []
        for width, ranks in by_width.items():
            together = max(1, numbers_max // (width * columns))
            for start in range(0, len(ranks), together):
                part = ranks[start : start + together]
                groups.append(_group(part, [memories[rank] for rank in part], device))
        return MemoryBatch(self, groups)

    def query(self, h: Tensor) -> Tensor:
        """h [rows, hidden width] -> 2 (Wa h + ba), [rows, attention width]."""
        return self._query.linear(h)

    def weigh(self, query: Tensor, keys: Tensor, absent: Tensor) -> Tensor:
        """query [n, S], keys [n, M, S], absent [n, M] -> softmax of the scores, [n, M]."""
        seen = logistic_(query[:, None] + keys).mul_(self._score)
        e = _fold(seen, 2).add_(absent)
        e = e.sub_(e.amax(dim=1, keepdim=True)).exp_()
        return e.div_(_fold(e, 1)[:, None])

    def scale(self, z: Tensor, h: Tensor) -> Tensor:
        """z, scaled by the gate where there is one."""
        return z if self._gate is None else z * logistic_(self._gate.linear(h))


def _group(ranks: list[int], held: Sequence[HeldMemory], device: torch.device) -> _Group:
    lengths = [memory.length for memory in held]
    ends = torch.tensor(lengths, device=device)
    beyond = torch.arange(held[0].width, device=device) >= ends[:, None]
    return _Group(
        ranks,
        lengths,
        torch.tensor(ranks, device=device),
        _stacked([memory.keys for memory in held]),
        _stacked([memory.rows for memory in held]),
        torch.zeros(beyond.shape, device=device).masked_fill_(beyond, -torch.inf),
    )


def _stacked(tensors: list[Tensor]) -> Tensor:
    """One on top of the other; a single one is not copied."""
    return tensors[0][None] if len(tensors) == 1 else torch.stack(tensors)


class MemoryBatch:
    """The memories of a batch, ready to be attended over at each of its times."""

    def __init__(self, attention: Attention, groups: Sequence[_Group]) -> None:
        """See `Attention.gather`."""
        self._attention = attention
        self._groups = groups

    def read(self, h: Tensor, count: int, tap: Tap | None) -> Tensor:
        """What a step reads.

        Args:
            h: Of the top layer after the step before, [rows, hidden width].
            count: How many of the rows are no padding.
            tap: Shown the weights, if there is one.

        Returns:
            z [rows, memory width]; zero for padding.
        """
        attention = self._attention
        z = h.new_zeros(h.shape[0], attention.columns[1])
        query = attention.query(h)
        for group in self._groups:
            running = sum(rank < count for rank in group.ranks)
            if not running:
                continue
            index = group.index[:running]
            w = attention.weigh(
                query.index_select(0, index), group.keys[:running], group.absent[:running]
            )
            if tap is not None:
                tap.see_weights(group.ranks[:running], group.lengths[:running], w)
            # Zero is added so that no -0 tells how often something was folded.
            read = _fold(w[:, :, None] * group.rows[:running], 1).add_(0.0)
            z.index_copy_(0, index, read)
        return attention.scale(z, h)


def _fold(x: Tensor, dim: int) -> Tensor:
    """Sums over a dimension in halves; an odd one out is added to the first."""
    while (size := x.shape[dim]) > 1:
        half = size // 2
        folded = x.narrow(dim, 0, half) + x.narrow(dim, half, half)
        if size % 2:
            folded.narrow(dim, 0, 1).add_(x.narrow(dim, size - 1, 1))
        x = folded
    return x.squeeze(dim)
