"""The plain recurrent layer; `conveyor_models.cells` states the equations."""

from torch import Tensor

from conveyor_models import RnnWeights
from conveyor_server.engine.cells import make_cells
from conveyor_server.engine.feeds import Feed
from conveyor_server.engine.functions import CANDIDATE, GATE, keep_infinite_
from conveyor_server.engine.packing import padded
from conveyor_server.engine.products import ProductFamily
from conveyor_server.engine.trace import Tap


class RnnKernel:
    """One layer. Its carry is h. See `layer.Kernel`."""

    def __init__(self, weights: RnnWeights, feed: Feed, family: ProductFamily) -> None:
        """Packs the weights."""
        size = weights.bias.shape[0]
        self.carry = ((size, padded(size)),)
        self._cells = make_cells(weights.function, padded(size), family)
        self._tanh = weights.nonlinearity == "tanh"
        scales = (CANDIDATE if self._tanh else GATE,)
        self._sums = feed.sums(weights.input, weights.recurrent, weights.bias, self.carry, scales)

    def step(self, x: Tensor, carry: list[Tensor], tap: Tap | None) -> list[Tensor]:
        """See `Kernel.step`."""
        sums = self._sums(x, carry[0])
        if self._tanh:
            h = self._cells.tanh(sums)
        else:
            h = keep_infinite_(self._cells.relu(sums), carry[0])
        if tap is not None:
            tap.see(h=h)
        return [h]
