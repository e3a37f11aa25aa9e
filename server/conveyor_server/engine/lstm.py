"""The LSTM layer, with or without peepholes, coupling and projection.

`conveyor_models.cells` states the equations; this computes them fast, see `engine.feeds` and
`engine.functions`.
"""

import torch
from torch import Tensor

from conveyor_models import LstmWeights
from conveyor_server.engine.feeds import Feed
from conveyor_server.engine.functions import CANDIDATE, GATE, Functions, columns_of, from_half_
from conveyor_server.engine.packing import pad_vector, padded, spread
from conveyor_server.engine.products import Product, ProductFamily
from conveyor_server.engine.trace import Tap


class LstmKernel:
    """One layer. Its carry is h and c. See `layer.Kernel`."""

    def __init__(self, weights: LstmWeights, feed: Feed, family: ProductFamily) -> None:
        """Packs the weights."""
        scales = (GATE, CANDIDATE, GATE) if weights.coupled else (GATE, GATE, CANDIDATE, GATE)
        size, hidden = weights.bias.shape[0] // len(scales), weights.recurrent.shape[1]
        self.carry = ((hidden, padded(hidden)), (size, padded(size)))
        self._blocks = len(scales)
        self._coupled = weights.coupled
        self._functions = Functions(weights.function)
        self._sums = feed.sums(
            weights.input, weights.recurrent, weights.bias, self.carry[:1], scales
        )
        self._peephole_input = _peephole(weights.peephole_input)
        self._peephole_forget = _peephole(weights.peephole_forget)
        self._peephole_output = _peephole(weights.peephole_output)
        peepholes = (self._peephole_input, self._peephole_forget, self._peephole_output)
        self._fused = self._functions.plain and all(each is None for each in peepholes)
        self._projection = _projection(weights.projection, family)

    def step(self, x: Tensor, carry: list[Tensor], tap: Tap | None) -> list[Tensor]:
        """See `Kernel.step`."""
        h, c = carry
        if self._fused:
            *i, f, g, o = columns_of(self._sums.logistic(x, h), self._blocks)
        else:
            *i, f, g, o = self._activated(self._sums.linear(x, h), c)
        if tap is not None:
            # The candidate's trace is made from what the kernel has, and changes none of it.
            tap.see(i=i[0] if i else 1 - f, f=f, g=from_half_(g.clone()))
        if self._coupled:
            g = from_half_(g)
            c = torch.addcmul(g, f, c - g)  # f c + (1 - f) g
        else:
            # c' = f c + i (2 g - 1) = f c - i + 2 i g; doublings are exact.
            c = (f * c).sub_(i[0]).addcmul_(i[0], g, value=2)
        if self._peephole_output is not None:
            o = self._functions.gate_(torch.addcmul(o, c, self._peephole_output))
        # h' = o (2 s(2 c') - 1) = 2 o s(2 c') - o
        shown = (c + c).sigmoid_().mul_(o)
        h = shown.add_(shown).sub_(o)
        if self._projection is not None:
            h = self._projection.linear(h)
        if tap is not None:
            tap.see(o=o, c=c, h=h)
        return [h, c]

    def _activated(self, sums: Tensor, c: Tensor) -> list[Tensor]:
        """Sums -> gates; an output gate that sees c' is left as its sum."""
        *i, f, g, o = columns_of(sums, self._blocks)
        if self._peephole_forget is not None:
            f.addcmul_(c, self._peephole_forget)
        if self._peephole_input is not None:
            i[0].addcmul_(c, self._peephole_input)
        functions, width = self._functions, c.shape[1]
        if functions.plain:
            sums[:, : len(i) * width + 2 * width].sigmoid_()
        else:
            functions.gate_(sums[:, : len(i) * width + width])
            functions.half_candidate_(g)
        if self._peephole_output is None:
            functions.gate_(o)
        return [*i, f, g, o]


def _peephole(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else pad_vector(weight)


def _projection(weight: Tensor | None, family: ProductFamily) -> Product | None:
    if weight is None:
        return None
    hidden, size = weight.shape
    wide = weight.new_zeros(padded(hidden), padded(size))
    wide[:hidden] = spread(weight, [(size, padded(size))])
    return family.product(wide, None)
