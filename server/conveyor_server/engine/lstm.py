"""The LSTM layer over a ragged batch.

`conveyor_models.cells` states the equations; this computes them fast. Three things differ from the
plain statement, none of them in what is computed:

* tanh(x) = 2 s(2x) - 1, with the 2 folded into the candidate's weights, so that one logistic
  function over all four gates does. It is several times faster than tanh on CPUs without Intel's
  vector library, and a doubling is exact.
* Input and h are multiplied together, [x; h] by [Wx Wh], and the logistic function is part of the
  product: below a few dozen sessions a step costs what its calls cost, so there are few.
* Sizes are rounded up to `LANE` units of zero weight, so that every element-wise kernel runs in
  whole vectors: its scalar remainder loop gives other last bits, and where the remainder falls
  depends on the number of rows. The added units are exactly 0 for ever:
  c' = 0.5 * 0 + 0.5 * (2 * 0.5 - 1) = 0 and h' = 0.5 * (2 * 0.5 - 1) = 0.
"""

from typing import Final, Protocol

import torch
from torch import Tensor

from conveyor_models.cells import LstmWeights
from conveyor_server.core import ELEMENT_BYTES
from conveyor_server.engine.products import ProductFamily

LANE: Final = 32
"""Twice the widest vector (16 floats with AVX-512).

That is what the element-wise kernels take in one turn.
"""


def padded(size: int) -> int:
    """`size` rounded up to whole lanes."""
    return -(-size // LANE) * LANE


def round_up(rows: int, multiple: int) -> int:
    """`rows` rounded up to a multiple."""
    return -(-rows // multiple) * multiple


class Gates(Protocol):
    """How a layer comes by its gates: s(Wx x + Wh h + b), the candidate's part doubled before."""

    def __call__(self, x: Tensor, h: Tensor) -> Tensor:
        """x [rows, input width], h [rows, output width] -> i, f, g, o [rows, 4 cell widths]."""
        ...


class JoinedGates:
    """Gates of features, of embeddings and of the layer below."""

    def __init__(self, weights: LstmWeights, input_width: int, family: ProductFamily) -> None:
        """`input_width`: columns of x; those beyond the weights' are zero."""
        cells = padded(weights.bias.shape[0] // 4)
        joined = torch.cat(
            (
                _by_gate(weights.input, input_width, cells),
                _by_gate(weights.recurrent, padded(weights.recurrent.shape[1]), cells),
            ),
            dim=1,
        )
        self._product = family.product(joined, _bias_by_gate(weights.bias, cells))

    def __call__(self, x: Tensor, h: Tensor) -> Tensor:
        """See `Gates`."""
        return self._product.logistic(torch.cat((x, h), dim=1))


class TabulatedGates:
    """Gates of tokens: x is the token's own Wx x + b, looked up, and only h is multiplied.

    Attributes:
        table: Wx x + b for each token, [vocabulary, 4 cell widths].
    """

    def __init__(self, weights: LstmWeights, embedding: Tensor, family: ProductFamily) -> None:
        """embedding [vocabulary, size]."""
        tokens, size = embedding.shape
        cells = padded(weights.bias.shape[0] // 4)
        bias = _bias_by_gate(weights.bias, cells)
        product = family.product(_by_gate(weights.input, size, cells), bias)
        rows = round_up(tokens, family.rows_multiple)
        x = torch.cat((embedding, embedding.new_zeros(rows - tokens, size)))
        self.table = product.linear(x)[:tokens].contiguous()
        width = padded(weights.recurrent.shape[1])
        self._recurrent = family.product(_by_gate(weights.recurrent, width, cells), None)

    @staticmethod
    def table_bytes(weights: LstmWeights, embedding: Tensor) -> int:
        """What the table would take."""
        return embedding.shape[0] * 4 * padded(weights.bias.shape[0] // 4) * ELEMENT_BYTES

    def __call__(self, x: Tensor, h: Tensor) -> Tensor:
        """See `Gates`."""
        return self._recurrent.accumulate(h, x).sigmoid_()


class LstmLayer:
    """One layer, its weights packed for a family of products.

    Attributes:
        output_size, output_width: Of h, without and with padding.
        cell_size, cell_width: Of c, likewise.
    """

    def __init__(self, weights: LstmWeights, gates: Gates, family: ProductFamily) -> None:
        """`gates`: made of the same weights."""
        size = weights.bias.shape[0] // 4
        self.cell_size, self.cell_width = size, padded(size)
        projection = weights.projection
        self.output_size = size if projection is None else projection.shape[0]
        self.output_width = padded(self.output_size)
        self._rows_multiple = family.rows_multiple
        self._gates = gates
        self._projection = None
        if projection is not None:
            wide = projection.new_zeros(self.output_width, self.cell_width)
            wide[: projection.shape[0], :size] = projection
            self._projection = family.product(wide, None)

    def run(self, x: Tensor, counts: list[int], h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Steps through a packed batch.

        Args:
            x: What the gates read, packed, then rows of padding, [rows + padding, input width].
            counts: n_t, as in `ragged.Layout`.
            h: Carry of each work, longest first, padded to a multiple of rows,
                [works + padding, output width].
            c: Likewise, [works + padding, cell width].

        Returns:
            The outputs in packed order with padding rows behind, [rows + padding, output width],
            and c after each work's last step, longest first, [works, cell width].
        """
        if len(counts) == 1:
            h, c = self._step(x, h, c)
            return h, c[: counts[0]]
        outputs = h.new_empty(x.shape[0], self.output_width)
        ended: list[Tensor] = []
        offset = 0
        for time, count in enumerate(counts):
            rows = round_up(count, self._rows_multiple)
            h, c = self._step(x[offset : offset + rows], h[:rows], c[:rows])
            # Rows beyond `count` are padding; the next step's outputs overwrite them.
            outputs[offset : offset + rows] = h
            offset += count
            remaining = counts[time + 1] if time + 1 < len(counts) else 0
            if remaining < count:
                ended.append(c[remaining:count])
        return outputs, torch.cat(ended[::-1]) if len(ended) > 1 else ended[0]

    def _step(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """One step of each row.

        x [rows, input width], h [rows, outputs], c [rows, cells] -> h', c'.
        """
        i, f, g, o = self._gates(x, h).chunk(4, dim=1)
        # c' = f c + i (2 g - 1) = f c - i + 2 i g; doublings are exact.
        c = (f * c).sub_(i).addcmul_(i, g, value=2)
        # h' = o (2 s(2 c') - 1) = 2 o s(2 c') - o
        shown = (c + c).sigmoid_().mul_(o)
        h = shown.add_(shown).sub_(o)
        return (h if self._projection is None else self._projection.linear(h)), c


def _by_gate(weight: Tensor, width: int, cell_width: int) -> Tensor:
    """Packs a weight: [4 cells, in] -> [4 padded cells, width].

    Each gate is padded with zeros for itself; the candidate, the third, is doubled.
    """
    gates = weight.reshape(4, -1, weight.shape[1])  # [4, cells, in]
    wide = weight.new_zeros(4, cell_width, width)
    wide[:, : gates.shape[1], : gates.shape[2]] = gates
    wide[2] *= 2
    return wide.flatten(0, 1)


def _bias_by_gate(bias: Tensor, cell_width: int) -> Tensor:
    return _by_gate(bias.unsqueeze(1), 1, cell_width).squeeze(1).contiguous()
