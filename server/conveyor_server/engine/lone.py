"""Products with a kernel of their own for a single row, and compiled cells.

A library's product takes 10 us before it multiplies anything, and with a single row it is another
sum than with two. `compiled.lone_product` has no such start, and adds the terms in the order in
which the library does: panels of the input, of a length that depends on the input's. Which length
that is, is found out when a weight is packed, by comparing bits.
"""

from __future__ import annotations

import importlib.util
from types import ModuleType
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from conveyor_server.core import ELEMENT_BYTES
from conveyor_server.engine.packing import round_up
from conveyor_server.engine.products import Prepacked, PrepackedFamily

WEIGHT_BYTES_MAX: Final = 16 * 2**20
"""Weights above it are not packed a second time: reading them takes as long with any kernel."""
_CHAINS: Final = (512, 1024, 2**40)
"""Lengths of panels that oneDNN was seen to use."""
_ROWS_COMPARED: Final = 3


def compiled_kernels() -> ModuleType | None:
    """The module `engine.compiled`, or None where numba is not installed."""
    if importlib.util.find_spec("numba") is None:
        return None
    from conveyor_server.engine import compiled  # noqa: PLC0415  takes half a second

    return compiled


class CompiledFamily(PrepackedFamily):
    """oneDNN for two rows and more, `compiled` for one and for cells."""

    name = "onednn-prepacked, compiled"
    compiled = True

    def __init__(self, threads: int) -> None:
        """`threads` that an engine call may use."""
        super().__init__(threads)
        if threads == 1:
            self.rows_multiple = 1

    @staticmethod
    def available() -> bool:
        """Whether torch has the products and numba is there."""
        return PrepackedFamily.available() and compiled_kernels() is not None

    def product(self, weight: Tensor, bias: Tensor | None) -> LonePrepacked:
        """See `ProductFamily.product`."""
        return LonePrepacked(weight, bias)


class LonePrepacked(Prepacked):
    """oneDNN linear with a prepacked weight, and the kernel for one row."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight [out, in], bias [out]; float32 on the CPU."""
        # A bias of zeros, so that both ways end with an addition.
        super().__init__(weight, weight.new_zeros(len(weight)) if bias is None else bias)
        self._out = len(weight)
        kernels = compiled_kernels()
        assert kernels is not None
        self._kernel = kernels.lone_product
        self._width = round_up(self._out, kernels.BLOCK)
        self._zeros = np.zeros(self._width, np.float32)
        self._added = self._zeros
        if bias is not None:
            self._added = np.pad(bias.numpy(), (0, self._width - self._out))
        self._chain = 0  # one row is computed as two
        if weight.numel() * ELEMENT_BYTES <= WEIGHT_BYTES_MAX:
            self._blocks = _blocks_of(weight, self._width, kernels.BLOCK)
            self._chain = self._find_chain(weight.shape[1])

    @property
    def has_lone_kernel(self) -> bool:
        """Whether a single row is computed as such."""
        return self._chain > 0

    def linear(self, x: Tensor) -> Tensor:
        """See `Product.linear`."""
        if len(x) > 1:
            return super().linear(x)
        return self._one(x, self._added) if self._chain else super().linear(_twice(x))[:1]

    def accumulate(self, x: Tensor, y: Tensor) -> Tensor:
        """See `Product.accumulate`."""
        if len(x) > 1:
            return super().accumulate(x, y)
        if not self._chain:
            return super().accumulate(_twice(x), _twice(y))[:1]
        if self._width == self._out:
            return self._one(x, y[0].numpy())
        return self._one(x, np.pad(y[0].numpy(), (0, self._width - self._out)))

    def _one(self, x: Tensor, added: npt.NDArray[np.float32]) -> Tensor:
        y = torch.empty(1, self._width)
        self._kernel(x[0].numpy(), self._blocks, self._chain, added, y[0].numpy())
        return y if self._width == self._out else y[:, : self._out].contiguous()

    def _find_chain(self, size: int) -> int:
        """The panels' length, or 0 if none gives the library's bits."""
        x = torch.randn(_ROWS_COMPARED, size, generator=torch.Generator().manual_seed(size))
        expected = super().linear(x)
        for chain in _CHAINS:
            self._chain = chain
            if all(
                self._one(row[None], self._added)[0].equal(y)
                for row, y in zip(x, expected, strict=True)
            ):
                return chain
        return 0


def _blocks_of(weight: Tensor, width: int, block: int) -> npt.NDArray[np.float32]:
    """[out, in] -> [blocks, in, block], columns of zeros behind."""
    wide = weight.new_zeros(width, weight.shape[1])
    wide[: len(weight)] = weight
    return np.ascontiguousarray(wide.view(-1, block, weight.shape[1]).transpose(1, 2).numpy())


def _twice(row: Tensor) -> Tensor:
    return row.expand(2, -1).contiguous()
