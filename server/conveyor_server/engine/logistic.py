"""The logistic function, the same bits for a number wherever it lies in a tensor.

The library computes it in whole vectors, and what is left over at the end by a scalar loop that
gives other last bits. With several threads there is such an end wherever one thread's share of a
large tensor meets the next one's, so that where it falls depends on the size of the batch. Of all
the element-wise functions that the kernels use it is the only one whose two loops differ.
"""

from typing import Final

import torch
from torch import Tensor

SHARE: Final = 32_768
"""Numbers up to which the library keeps to one thread; also the least that it gives to each."""


def logistic_(x: Tensor) -> Tensor:
    """s(x), in place; rows, or the whole of x, are made of whole vectors."""
    if x.numel() <= SHARE or not x.is_cpu:
        return x.sigmoid_()
    if x.is_contiguous():
        # All threads have a whole share each, as often as there is enough for that.
        numbers = x.view(-1)
        shared = SHARE * torch.get_num_threads()
        even = numbers.numel() // shared * shared
        for piece in torch.split(numbers[:even], shared):
            piece.sigmoid_()
        for piece in torch.split(numbers[even:], SHARE):
            piece.sigmoid_()
    else:
        for rows in torch.split(x, max(1, SHARE // x.shape[1])):
            rows.sigmoid_()
    return x
