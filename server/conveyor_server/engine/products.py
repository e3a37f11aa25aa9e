"""Matrix products whose rows do not depend on how many rows there are.

A BLAS picks its kernel by the shape of the whole product, so a row's bits change with its
neighbours' number: `addmm` does so for small batches. The kinds of product here do not, given
rows in the multiple each asks for:

* `Prepacked` (CPU): oneDNN with a weight reordered once, in one blocked layout whatever the
  batch. Its rows are bit-equal from two rows up, and it is more than twice as fast as `addmm`.
  `engine.lone` adds a way for a single row.
* `Blocked` (anywhere): the library's own product over blocks of one fixed number of rows, so that
  only one shape ever occurs.

Neither is taken on trust: `engine.probe` compares bits on the machine that serves.
"""

from typing import Final, Protocol

import torch
from torch import Tensor

BLOCK_ROWS: Final = 32


class Product(Protocol):
    """y = x W^T + b for one weight."""

    def linear(self, x: Tensor) -> Tensor:
        """x [rows, in] -> [rows, out], the bias added."""
        ...

    def accumulate(self, x: Tensor, y: Tensor) -> Tensor:
        """x [rows, in], y [rows, out] -> y + x W^T in new memory; no bias."""
        ...


class ProductFamily(Protocol):
    """Makes products of one kind."""

    name: str
    rows_multiple: int
    """Callers pad the number of rows to a multiple of this."""
    compiled: bool
    """Whether the element-wise part is to be done by `compiled_cells`."""

    def product(self, weight: Tensor, bias: Tensor | None) -> Product:
        """weight [out, in], bias [out]."""
        ...


class Prepacked:
    """oneDNN linear with a prepacked weight."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight [out, in], bias [out]; float32 on the CPU."""
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
        self._bias = bias
        self._linear = torch.ops.mkldnn._linear_pointwise.default
        self._binary = torch.ops.mkldnn._linear_pointwise.binary

    def linear(self, x: Tensor) -> Tensor:
        """See `Product.linear`."""
        return self._linear(x, self._weight, self._bias, "none", [], "")

    def accumulate(self, x: Tensor, y: Tensor) -> Tensor:
        """See `Product.accumulate`."""
        return self._binary(x, y, self._weight, None, "add")


class PrepackedFamily:
    """Products for CPUs with oneDNN."""

    name = "onednn-prepacked"
    compiled = False

    def __init__(self, threads: int) -> None:
        """`threads` that an engine call may use."""
        # Two rows, because a single one takes another kernel. And a multiple of the threads, so
        # that the library can give each of them whole rows; where it does not, `engine.logistic`
        # sees to the one element-wise function whose bits would show it.
        self.rows_multiple = max(2, threads)

    @staticmethod
    def available() -> bool:
        """Whether this build of torch has them."""
        return torch.backends.mkldnn.is_available() and hasattr(
            torch.ops.mkldnn, "_reorder_linear_weight"
        )

    def product(self, weight: Tensor, bias: Tensor | None) -> Product:
        """See `ProductFamily.product`."""
        return Prepacked(weight, bias)


class Blocked:
    """The library's product over blocks of `BLOCK_ROWS` rows."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight [out, in], bias [out]."""
        self._weight_t = weight.t().contiguous()
        self._bias = bias

    def linear(self, x: Tensor) -> Tensor:
        """See `Product.linear`."""
        y = torch.empty(x.shape[0], self._weight_t.shape[1], device=x.device, dtype=x.dtype)
        for x_block, y_block in zip(_blocks(x), _blocks(y), strict=True):
            torch.mm(x_block, self._weight_t, out=y_block)
        return y if self._bias is None else y.add_(self._bias)

    def accumulate(self, x: Tensor, y: Tensor) -> Tensor:
        """See `Product.accumulate`."""
        product = torch.empty(x.shape[0], self._weight_t.shape[1], device=x.device, dtype=x.dtype)
        for x_block, block in zip(_blocks(x), _blocks(product), strict=True):
            torch.mm(x_block, self._weight_t, out=block)
        return product.add_(y)


class BlockedFamily:
    """Products for CUDA devices, and for CPUs without prepacked ones that pass the probe."""

    name = "fixed-blocks"
    compiled = False
    rows_multiple = BLOCK_ROWS

    def product(self, weight: Tensor, bias: Tensor | None) -> Product:
        """See `ProductFamily.product`."""
        return Blocked(weight, bias)


def _blocks(rows: Tensor) -> tuple[Tensor, ...]:
    return torch.split(rows, BLOCK_ROWS)
