"""From the top of the stack to outputs: the head and the last function."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from conveyor_models import ModelSpec
from conveyor_server.engine.logistic import logistic_
from conveyor_server.engine.packing import Columns, pad_blocks, pad_vector, padded, spread
from conveyor_server.engine.products import Product, ProductFamily


class Readout:
    """One model's.

    Attributes:
        size: Numbers in an output row.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: Mapping[str, Tensor],
        columns: Columns,
        family: ProductFamily,
    ) -> None:
        """`columns` of a row at the top of the stack."""
        self.size = spec.output_size
        self._activation = spec.output.activation
        self._head: Product | None = None
        self._columns = columns
        if spec.head is not None:
            # Padded like a layer. For the logistic function the reason is that of
            # `engine.packing`; for the product it is that a library's kernels for 5 to 7 columns
            # give a row other bits in another place of the same block.
            bias = weights.get("head.bias")
            self._head = family.product(
                pad_blocks(spread(weights["head.weight"], columns), (1,)),
                None if bias is None else pad_vector(bias),
            )
            self._columns = ((self.size, padded(self.size)),)

    def __call__(self, rows: Tensor) -> Tensor:
        """rows [n, width], n a multiple of the product's -> outputs [n, size]."""
        y = rows if self._head is None else self._head.linear(rows)
        if self._activation == "sigmoid":
            y = logistic_(y.clone())
        y = _without_padding(y, self._columns)
        match self._activation:
            case "softmax" | "log_softmax":
                wide = y if y.is_cpu else whole_lanes(y)
                e = wide.softmax(dim=1) if self._activation == "softmax" else wide.log_softmax(1)
                return e[:, : self.size]
            case _:
                return y


def whole_lanes(logits: Tensor) -> Tensor:
    """logits [n, size] -> [n, padded size], -inf behind, which no sum or maximum shows.

    The CUDA kernels for many classes read a row in vectors from the first aligned address on, and
    add its terms in an order that depends on where that is. So every row has to begin at one.
    """
    size = logits.shape[1]
    return functional.pad(logits, (0, padded(size) - size), value=-torch.inf)


def _without_padding(rows: Tensor, columns: Columns) -> Tensor:
    pieces: list[Tensor] = []
    offset = 0
    for size, width in columns:
        pieces.append(rows[:, offset : offset + size])
        offset += width
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
