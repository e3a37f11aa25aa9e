"""The functions of gates and candidates, in place.

tanh(x) = 2 s(2x) - 1, with the 2 folded into the candidate's weights, so that the logistic function
does for both. It is several times faster than tanh on CPUs without Intel's vector library, and a
doubling is exact.
"""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from conveyor_models import GateFunction
from conveyor_server.engine.logistic import logistic_

GATE: Final = 1.0
"""What a gate's sums are multiplied by; see `pad_blocks`."""
CANDIDATE: Final = 2.0
"""The same for what goes through tanh."""


class Functions:
    """A layer's `GateFunction`.

    Attributes:
        plain: Whether a gate is the logistic function of its sum and nothing else.
    """

    def __init__(self, function: GateFunction) -> None:
        """Of one layer."""
        self._slope = function.slope
        self._clip = function.clip
        self.plain = self._slope is None and self._clip is None

    def gate_(self, sums: Tensor) -> Tensor:
        """Sums -> activations of gates."""
        self.clip_(sums, GATE)
        if self._slope is None:
            return logistic_(sums)
        return sums.mul_(self._slope).add_(0.5).clamp_(0, 1)

    def half_candidate_(self, sums: Tensor) -> Tensor:
        """Doubled sums -> (1 + candidate) / 2."""
        return logistic_(self.clip_(sums, CANDIDATE))

    def clip_(self, sums: Tensor, scale: float) -> Tensor:
        """Holds sums that were multiplied by `scale` between the limits, if there are any."""
        return sums if self._clip is None else sums.clamp_(-scale * self._clip, scale * self._clip)


def from_half_(half: Tensor) -> Tensor:
    """(1 + tanh) / 2 -> tanh."""
    return half.mul_(2).sub_(1)


def keep_infinite_(h: Tensor, before: Tensor) -> Tensor:
    """Makes an h that follows an infinite one NaN, and leaves any other as it is.

    Else an h without bounds could overflow and be finite again at the end of a chunk, and what
    becomes of a session would depend on how its input was cut.
    """
    return h.add_(before, alpha=0)  # 0 times infinity is NaN


def columns_of(x: Tensor, blocks: int) -> Sequence[Tensor]:
    """[rows, blocks * width] -> so many [rows, width]."""
    return torch.chunk(x, blocks, dim=1)
