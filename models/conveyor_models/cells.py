"""The recurrent cells, written to be read.

This is the definition of what a model computes. The server's kernels are faster and are compared
with it. A cell is a function `(weights, carry, x) -> (carry, y)` of one step, in whatever dtype its
tensors have: in float64 it is the reference that errors are measured against.

Letters for dims: B sessions in the batch, I values read, H units, P length of h (H where it is not
projected).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class GateFunction:
    """What turns a gate's sum into its activation.

    The default is the logistic function.
    """

    slope: float | None = None
    """Of the hard sigmoid clamp(slope * x + 0.5, 0, 1), which then takes its place."""
    clip: float | None = None
    """What goes into any function, also the candidate's, is held between -clip and clip."""

    def gate(self, x: Tensor) -> Tensor:
        """The activation of a gate, element by element."""
        x = self.clipped(x)
        return x.sigmoid() if self.slope is None else (self.slope * x + 0.5).clamp(0, 1)

    def candidate(self, x: Tensor) -> Tensor:
        """The activation of what may enter the state."""
        return self.clipped(x).tanh()

    def clipped(self, x: Tensor) -> Tensor:
        """x, held between the limits if there are any."""
        return x if self.clip is None else x.clamp(-self.clip, self.clip)


LOGISTIC: Final = GateFunction()

# --- LSTM ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class LstmCarry:
    """What one LSTM layer carries from step to step."""

    h: Tensor
    """[B, P]"""
    c: Tensor
    """[B, H]"""


@dataclass(frozen=True, slots=True, eq=False)
class LstmWeights:
    """The weights of one LSTM layer.

    The rows are the gates i, f, g, o, each of H rows; those of a coupled layer are f, g, o.
    """

    input: Tensor
    """[4H, I], coupled [3H, I]"""
    recurrent: Tensor
    """[4H, P], coupled [3H, P]"""
    bias: Tensor
    """[4H], coupled [3H]"""
    projection: Tensor | None = None
    """[P, H], or None where h is not projected"""
    peephole_input: Tensor | None = None
    """[H], or None where i does not see c; the same for the two below"""
    peephole_forget: Tensor | None = None
    peephole_output: Tensor | None = None
    coupled: bool = False
    function: GateFunction = field(default=LOGISTIC)


def lstm_cell(weights: LstmWeights, carry: LstmCarry, x: Tensor) -> tuple[LstmCarry, Tensor]:
    """One step of an LSTM with forget gate.

        i = s(Wxi x + Whi h + pi * c + bi)    what of the candidate is let in; coupled: 1 - f
        f = s(Wxf x + Whf h + pf * c + bf)    what of the cell state is kept
        g = tanh(Wxg x + Whg h + bg)          candidate
        c' = f * c + i * g
        o = s(Wxo x + Who h + po * c' + bo)   what of the cell state is shown
        h' = o * tanh(c')                     with a projection: h' = Wp (o * tanh(c'))

    s is the logistic sigmoid and * works element by element. Each peephole p is there or not.

    Args:
        weights: the layer's weights.
        carry: h and c after the step before.
        x: this step's input, [B, I].

    Returns:
        The new carry, and the output y [B, P], which is the new h.

    Source: Hochreiter & Schmidhuber 1997; the forget gate is from Gers et al. 2000, peepholes from
    Gers & Schmidhuber 2000, the projection from Sak et al. 2014, coupling from Greff et al. 2015.
    """
    carry, y, _ = traced_lstm_cell(weights, carry, x)
    return carry, y


def traced_lstm_cell(
    weights: LstmWeights, carry: LstmCarry, x: Tensor
) -> tuple[LstmCarry, Tensor, dict[str, Tensor]]:
    """`lstm_cell`, and the activations of i, f, g and o, each [B, H]."""
    s = weights.function
    sums = x @ weights.input.T + carry.h @ weights.recurrent.T + weights.bias  # [B, 4H] or [B, 3H]
    *i, f, g, o = sums.chunk(3 if weights.coupled else 4, dim=-1)  # each [B, H]
    f = s.gate(_seen(f, weights.peephole_forget, carry.c))
    i = 1 - f if weights.coupled else s.gate(_seen(i[0], weights.peephole_input, carry.c))
    g = s.candidate(g)
    c = f * carry.c + i * g  # [B, H]
    o = s.gate(_seen(o, weights.peephole_output, c))
    h = o * torch.tanh(c)  # [B, H]
    if weights.projection is not None:
        h = h @ weights.projection.T  # [B, P]
    return LstmCarry(h, c), h, {"i": i, "f": f, "g": g, "o": o}


def _seen(x: Tensor, peephole: Tensor | None, c: Tensor) -> Tensor:
    return x if peephole is None else x + peephole * c


# --- GRU and plain RNN -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class HiddenCarry:
    """What a layer carries whose state is its output."""

    h: Tensor
    """[B, H]"""


@dataclass(frozen=True, slots=True, eq=False)
class GruWeights:
    """The weights of one GRU layer. The 3H rows are the gates r, z, n, each of H rows."""

    input: Tensor
    """[3H, I]"""
    recurrent: Tensor
    """[3H, H]"""
    bias: Tensor
    """[3H]"""
    bias_recurrent: Tensor | None = None
    """[H], of n; None: the reset gate works before the product."""
    function: GateFunction = field(default=LOGISTIC)


def gru_cell(weights: GruWeights, carry: HiddenCarry, x: Tensor) -> tuple[HiddenCarry, Tensor]:
    """One step of a GRU.

        r = s(Wxr x + Whr h + br)                     what of h the candidate sees
        z = s(Wxz x + Whz h + bz)                     what of h is kept
        n = tanh(Wxn x + bn + r * (Whn h + bhn))      candidate, reset after the product
        n = tanh(Wxn x + Whn (r * h) + bn)            candidate, reset before it
        h' = (1 - z) * n + z * h

    Args:
        weights: the layer's weights; with `bias_recurrent` the reset gate works after the product.
        carry: h after the step before.
        x: this step's input, [B, I].

    Returns:
        The new carry, and the output y [B, H], which is the new h.

    Source: Cho et al. 2014, with reset before; reset after is from cuDNN and PyTorch.
    """
    carry, y, _ = traced_gru_cell(weights, carry, x)
    return carry, y


def traced_gru_cell(
    weights: GruWeights, carry: HiddenCarry, x: Tensor
) -> tuple[HiddenCarry, Tensor, dict[str, Tensor]]:
    """`gru_cell`, and the activations of r, z and n, each [B, H]."""
    s, h = weights.function, carry.h
    xr, xz, xn = (x @ weights.input.T + weights.bias).chunk(3, dim=-1)  # each [B, H]
    wr, wz, wn = weights.recurrent.chunk(3)  # each [H, H]
    r = s.gate(xr + h @ wr.T)
    z = s.gate(xz + h @ wz.T)
    if weights.bias_recurrent is None:
        n = s.candidate(xn + (r * h) @ wn.T)
    else:
        n = s.candidate(xn + r * (h @ wn.T + weights.bias_recurrent))
    h = (1 - z) * n + z * h  # [B, H]
    return HiddenCarry(h), h, {"r": r, "z": z, "n": n}


@dataclass(frozen=True, slots=True, eq=False)
class RnnWeights:
    """The weights of one plain recurrent layer."""

    input: Tensor
    """[H, I]"""
    recurrent: Tensor
    """[H, H]"""
    bias: Tensor
    """[H]"""
    nonlinearity: Literal["tanh", "relu"] = "tanh"
    function: GateFunction = field(default=LOGISTIC)


def rnn_cell(weights: RnnWeights, carry: HiddenCarry, x: Tensor) -> tuple[HiddenCarry, Tensor]:
    """One step of a plain recurrent layer: h' = tanh(Wx x + Wh h + b), or relu in place of tanh.

    Args:
        weights: the layer's weights.
        carry: h after the step before.
        x: this step's input, [B, I].

    Returns:
        The new carry, and the output y [B, H], which is the new h.

    Source: Elman 1990.
    """
    total = x @ weights.input.T + carry.h @ weights.recurrent.T + weights.bias  # [B, H]
    total = weights.function.clipped(total)
    h = total.tanh() if weights.nonlinearity == "tanh" else total.relu()
    return HiddenCarry(h), h


LayerCarry: TypeAlias = LstmCarry | HiddenCarry
CellWeights: TypeAlias = LstmWeights | GruWeights | RnnWeights
