"""The plain recurrent layer; `conveyor_models.cells` states the equations."""

from torch import Tensor

from conveyor_models import RnnWeights
from conveyor_server.engine.feeds import Feed
from conveyor_server.engine.functions import CANDIDATE, GATE, Functions, from_half_
from conveyor_server.engine.packing import padded
from conveyor_server.engine.trace import Tap


class RnnKernel:
    """One layer. Its carry is h. See `layer.Kernel`."""

    def __init__(self, weights: RnnWeights, feed: Feed) -> None:
        """Packs the weights."""
        size = weights.bias.shape[0]
        self.carry = ((size, padded(size)),)
        self._functions = Functions(weights.function)
        self._tanh = weights.nonlinearity == "tanh"
        scales = (CANDIDATE if self._tanh else GATE,)
        self._sums = feed.sums(weights.input, weights.recurrent, weights.bias, self.carry, scales)

    def step(self, x: Tensor, carry: list[Tensor], tap: Tap | None) -> list[Tensor]:
        """See `Kernel.step`."""
        if not self._tanh:
            h = self._functions.clip_(self._sums.linear(x, carry[0]), GATE).relu_()
        elif self._functions.plain:
            h = from_half_(self._sums.logistic(x, carry[0]))
        else:
            h = from_half_(self._functions.half_candidate_(self._sums.linear(x, carry[0])))
        if tap is not None:
            tap.see(h=h)
        return [h]
