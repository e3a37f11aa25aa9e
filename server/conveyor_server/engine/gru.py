"""The GRU layer, its reset gate before or after the product.

`conveyor_models.cells` states the equations.
"""

import torch
from torch import Tensor

from conveyor_models import GruWeights
from conveyor_server.engine.feeds import Feed
from conveyor_server.engine.functions import CANDIDATE, GATE, Functions, columns_of, from_half_
from conveyor_server.engine.packing import pad_blocks, pad_vector, padded, spread
from conveyor_server.engine.products import ProductFamily
from conveyor_server.engine.trace import Tap


class GruKernel:
    """One layer. Its carry is h. See `layer.Kernel`."""

    def __init__(self, weights: GruWeights, feed: Feed, family: ProductFamily) -> None:
        """Packs the weights."""
        size = weights.recurrent.shape[1]
        self.carry = ((size, padded(size)),)
        self._functions = Functions(weights.function)
        gates, candidate = slice(0, 2 * size), slice(2 * size, 3 * size)
        self._gates = feed.sums(
            weights.input[gates],
            weights.recurrent[gates],
            weights.bias[gates],
            self.carry,
            (GATE, GATE),
        )
        wx, wh = weights.input[candidate], weights.recurrent[candidate]
        bias = weights.bias[candidate]
        self._after = weights.bias_recurrent is not None
        if weights.bias_recurrent is None:
            self._candidate = feed.sums(wx, wh, bias, self.carry, (CANDIDATE,))
        else:
            self._read = feed.input_sums(wx, bias, (CANDIDATE,))
            self._recurrent = family.product(
                pad_blocks(spread(wh, self.carry), (CANDIDATE,)),
                pad_vector(weights.bias_recurrent, (CANDIDATE,)),
            )

    def step(self, x: Tensor, carry: list[Tensor], tap: Tap | None) -> list[Tensor]:
        """See `Kernel.step`."""
        (h,) = carry
        if self._functions.plain:
            r, z = columns_of(self._gates.logistic(x, h), 2)
        else:
            r, z = columns_of(self._functions.gate_(self._gates.linear(x, h)), 2)
        if self._after:
            sums = torch.addcmul(self._read(x), r, self._recurrent.linear(h))
        else:
            sums = self._candidate.linear(x, r * h)
        n = from_half_(self._functions.half_candidate_(sums))
        h = torch.addcmul(n, z, h - n)  # z h + (1 - z) n
        if tap is not None:
            tap.see(r=r, z=z, n=n, h=h)
        return [h]
