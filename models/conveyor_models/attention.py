"""Additive soft attention over a memory, written to be read.

Letters for dims: B sessions in the batch, M rows of memory, A numbers in a row, S length of the
vectors compared, P length of the top layer's h.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class AttentionWeights:
    """The weights of the attention."""

    query: Tensor
    """Wa, [S, P]"""
    memory: Tensor
    """Ua, [S, A]"""
    bias: Tensor
    """ba, [S]"""
    score: Tensor
    """v, [S]"""
    gate: Tensor | None = None
    """Wb, [P], or None where what was read is not scaled"""
    bias_gate: Tensor | None = None
    """bb, [1]"""


@dataclass(frozen=True, slots=True, eq=False)
class Memory:
    """What a batch of sessions attends over."""

    rows: Tensor
    """a, [B, M, A]; rows beyond a session's own are ignored, but finite"""
    keys: Tensor
    """Ua a, [B, M, S]: computed once, when the memory arrives"""
    lengths: Tensor
    """Rows that exist, [B]"""


def attention_memory(
    weights: AttentionWeights, rows: Tensor, lengths: Tensor | None = None
) -> Memory:
    """Prepares memories.

    Args:
        weights: the attention's weights.
        rows: [B, M, A].
        lengths: how many rows of each session exist, [B], at least 1; all of them if not given.
    """
    if lengths is None:
        lengths = torch.full(rows.shape[:1], rows.shape[1])
    return Memory(rows, rows @ weights.memory.T, lengths)


def attend(weights: AttentionWeights, memory: Memory, h: Tensor) -> tuple[Tensor, Tensor]:
    """What a step reads from the memory.

        e_m = v . tanh(Wa h + Ua a_m + ba)
        w = softmax(e) over the rows that exist
        z = sum_m w_m a_m                          with a gate: z = s(Wb . h + bb) * sum_m w_m a_m

    Args:
        weights: the attention's weights.
        memory: from `attention_memory`.
        h: of the top layer after the step before, [B, P].

    Returns:
        z [B, A] and w [B, M], which is 0 beyond a session's own rows.

    Source: Bahdanau et al. 2014; the gate is from Xu et al. 2015.
    """
    query = h @ weights.query.T + weights.bias  # [B, S]
    e = (query[:, None] + memory.keys).tanh() @ weights.score  # [B, M]
    absent = torch.arange(e.shape[1]) >= memory.lengths[:, None]  # [B, M]
    w = e.masked_fill(absent, -torch.inf).softmax(dim=-1)
    z = (w[:, :, None] * memory.rows).sum(dim=1)  # [B, A]
    if weights.gate is not None and weights.bias_gate is not None:
        z = (h @ weights.gate + weights.bias_gate).sigmoid()[:, None] * z
    return z, w
