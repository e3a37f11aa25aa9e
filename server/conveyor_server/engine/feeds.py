"""What a layer reads, and how it comes by the sums Wx x + Wh h + b of its gates.

There are two ways, and a layer's kernel need not know which it has. Rows are multiplied together
with h, [x; h] by [Wx Wh], since below a few dozen sessions a step costs what its calls cost. Of a
token Wx x + b is looked up, and only h is multiplied.
"""

from collections.abc import Sequence
from typing import Final, Protocol

import torch
from torch import Tensor

from conveyor_server.core import ELEMENT_BYTES
from conveyor_server.engine.packing import Columns, pad_blocks, pad_vector, padded, spread
from conveyor_server.engine.products import ProductFamily

TABLE_BYTES_MAX: Final = 64 * 2**20
"""The largest table of the tokens' parts of the first layer's gates.

A token's part is looked up where the table is no larger than this, and else computed.
"""


class Sums(Protocol):
    """The sums of some of a layer's gates."""

    def __call__(self, x: Tensor, h: Tensor) -> Tensor:
        """What the layer reads [rows, ...], h [rows, hidden width] -> [rows, gates * width].

        In new memory.
        """
        ...


class InputSums(Protocol):
    """`Sums` without h."""

    def __call__(self, x: Tensor) -> Tensor:
        """What the layer reads [rows, ...] -> Wx x + b, [rows, gates * width]."""
        ...


class Feed(Protocol):
    """Makes sums for a layer. Weights are those of whole blocks, as the bundle has them."""

    def sums(
        self, wx: Tensor, wh: Tensor, bias: Tensor, hidden: Columns, scales: Sequence[float]
    ) -> Sums:
        """wx [blocks, in], wh [blocks, hidden], bias [blocks]; `scales` as in `pad_blocks`."""
        ...

    def input_sums(self, wx: Tensor, bias: Tensor, scales: Sequence[float]) -> InputSums:
        """The same without h."""
        ...


class RowsFeed:
    """Features, embeddings, what was read from a memory, and the layer below."""

    def __init__(self, columns: Columns, family: ProductFamily) -> None:
        """`columns` of a row that is read."""
        self._columns = columns
        self._family = family

    def sums(
        self, wx: Tensor, wh: Tensor, bias: Tensor, hidden: Columns, scales: Sequence[float]
    ) -> Sums:
        """See `Feed.sums`."""
        joined = spread(torch.cat((wx, wh), dim=1), (*self._columns, *hidden))
        product = self._family.product(pad_blocks(joined, scales), pad_vector(bias, scales))
        return lambda x, h: product.linear(torch.cat((x, h), dim=1))

    def input_sums(self, wx: Tensor, bias: Tensor, scales: Sequence[float]) -> InputSums:
        """See `Feed.input_sums`."""
        wide = pad_blocks(spread(wx, self._columns), scales)
        return self._family.product(wide, pad_vector(bias, scales)).linear


class TableFeed:
    """Tokens. What the layer reads is then a row of `table`."""

    def __init__(self, embedding: Tensor, family: ProductFamily) -> None:
        """embedding [tokens, size]."""
        self._embedding = embedding
        self._family = family
        self._parts: list[Tensor] = []
        self._width = 0

    @staticmethod
    def suits(tokens: int, gates: int, size: int) -> bool:
        """Whether the table of a layer of so many gates and units is small enough."""
        return tokens * gates * padded(size) * ELEMENT_BYTES <= TABLE_BYTES_MAX

    @property
    def table(self) -> Tensor:
        """Wx x + b of each token, for all that was asked for, [tokens, gates * width]."""
        return torch.cat(self._parts, dim=1)

    def sums(
        self, wx: Tensor, wh: Tensor, bias: Tensor, hidden: Columns, scales: Sequence[float]
    ) -> Sums:
        """See `Feed.sums`."""
        part = self._add(wx, bias, scales)
        recurrent = self._family.product(pad_blocks(spread(wh, hidden), scales), None)
        # Contiguous as a rule: most layers ask for one part, the whole row.
        return lambda x, h: recurrent.accumulate(h, x[:, part].contiguous())

    def input_sums(self, wx: Tensor, bias: Tensor, scales: Sequence[float]) -> InputSums:
        """See `Feed.input_sums`."""
        part = self._add(wx, bias, scales)
        return lambda x: x[:, part].contiguous()

    def _add(self, wx: Tensor, bias: Tensor, scales: Sequence[float]) -> slice:
        product = self._family.product(pad_blocks(wx, scales), pad_vector(bias, scales))
        tokens, size = self._embedding.shape
        behind = self._embedding.new_zeros(-tokens % self._family.rows_multiple, size)
        self._parts.append(product.linear(torch.cat((self._embedding, behind)))[:tokens])
        start, self._width = self._width, self._width + self._parts[-1].shape[1]
        return slice(start, self._width)
