"""The GRU layer, its reset gate before or after the product.

`conveyor_models.cells` states the equations.
"""

from torch import Tensor

from conveyor_models import GruWeights
from conveyor_server.engine.cells import make_cells
from conveyor_server.engine.feeds import Feed
from conveyor_server.engine.functions import CANDIDATE, GATE, columns_of
from conveyor_server.engine.packing import pad_blocks, pad_vector, padded, spread
from conveyor_server.engine.products import ProductFamily
from conveyor_server.engine.trace import Tap


class GruKernel:
    """One layer. Its carry is h. See `layer.Kernel`."""

    def __init__(self, weights: GruWeights, feed: Feed, family: ProductFamily) -> None:
        """Packs the weights."""
        size = weights.recurrent.shape[1]
        self.carry = ((size, padded(size)),)
        self._cells = make_cells(weights.function, padded(size), family)
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
        gates = self._gates(x, h)
        if self._after:
            n = self._recurrent.linear(h)
            h = self._cells.gru_after(gates, self._read(x), n, h)
        else:
            n = self._candidate(x, self._cells.gru_seen(gates, h))
            h = self._cells.gru_before(gates, n, h)
        if tap is not None:
            r, z = columns_of(gates, 2)
            tap.see(r=r, z=z, n=n, h=h)
        return [h]
