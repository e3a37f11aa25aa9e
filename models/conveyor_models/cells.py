"""The recurrent cells, written to be read.

This is the definition of what a model computes. The server's kernels are faster and are compared
with it. A cell is a function `(weights, carry, x) -> (carry, y)` of one step, in whatever dtype its
tensors have: in float64 it is the reference that errors are measured against.

Letters for dims: B sessions in the batch, I values read, H length of c, P length of h (H where it
is not projected).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class LstmCarry:
    """What one LSTM layer carries from step to step."""

    h: Tensor
    """[B, P]"""
    c: Tensor
    """[B, H]"""


@dataclass(frozen=True, slots=True, eq=False)
class LstmWeights:
    """The weights of one LSTM layer. The 4H rows are the gates i, f, g, o, each of H rows."""

    input: Tensor
    """[4H, I]"""
    recurrent: Tensor
    """[4H, P]"""
    bias: Tensor
    """[4H]"""
    projection: Tensor | None = None
    """[P, H], or None where h is not projected"""


def lstm_cell(weights: LstmWeights, carry: LstmCarry, x: Tensor) -> tuple[LstmCarry, Tensor]:
    """One step of an LSTM with forget gate, optionally with a projected h.

        i = s(Wxi x + Whi h + bi)      what of the candidate is let in
        f = s(Wxf x + Whf h + bf)      what of the cell state is kept
        g = tanh(Wxg x + Whg h + bg)   candidate
        o = s(Wxo x + Who h + bo)      what of the cell state is shown
        c' = f * c + i * g
        h' = o * tanh(c')              with a projection: h' = Wp (o * tanh(c'))

    s is the logistic sigmoid and * works element by element.

    Args:
        weights: the layer's weights.
        carry: h and c after the step before.
        x: this step's input, [B, I].

    Returns:
        The new carry, and the output y [B, P], which is the new h.

    Source: Hochreiter & Schmidhuber 1997; the forget gate is from Gers et al. 2000, the projection
    from Sak et al. 2014.
    """
    gates = x @ weights.input.T + carry.h @ weights.recurrent.T + weights.bias  # [B, 4H]
    i, f, g, o = gates.chunk(4, dim=-1)  # each [B, H]
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    c = f * carry.c + i * g  # [B, H]
    h = o * torch.tanh(c)  # [B, H]
    if weights.projection is not None:
        h = h @ weights.projection.T  # [B, P]
    return LstmCarry(h, c), h
