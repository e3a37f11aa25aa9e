"""The LSTM layer, with or without peepholes, coupling and projection.

`conveyor_models.cells` states the equations; `engine.cells` computes what is element by element.
"""

from torch import Tensor

from conveyor_models import LstmWeights
from conveyor_server.engine.cells import Peepholes, make_cells
from conveyor_server.engine.feeds import Feed
from conveyor_server.engine.functions import CANDIDATE, GATE, columns_of, keep_infinite_
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
        self._sums = feed.sums(
            weights.input, weights.recurrent, weights.bias, self.carry[:1], scales
        )
        peepholes = Peepholes(
            _padded(weights.peephole_input),
            _padded(weights.peephole_forget),
            _padded(weights.peephole_output),
        )
        self._cells = make_cells(
            weights.function, padded(size), family, peepholes, coupled=weights.coupled
        )
        self._projection = _projection(weights.projection, family)

    def step(self, x: Tensor, carry: list[Tensor], tap: Tap | None) -> list[Tensor]:
        """See `Kernel.step`."""
        h, c = carry
        sums = self._sums(x, h)
        h, c = self._cells.lstm(sums, c, keep=tap is not None)
        if self._projection is not None:
            h = keep_infinite_(self._projection.linear(h), carry[0])
        if tap is not None:
            *i, f, g, o = columns_of(sums, self._blocks)
            tap.see(i=i[0] if i else 1 - f, f=f, g=g, o=o, c=c, h=h)
        return [h, c]


def _padded(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else pad_vector(weight)


def _projection(weight: Tensor | None, family: ProductFamily) -> Product | None:
    if weight is None:
        return None
    hidden, size = weight.shape
    wide = weight.new_zeros(padded(hidden), padded(size))
    wide[:hidden] = spread(weight, [(size, padded(size))])
    return family.product(wide, None)
