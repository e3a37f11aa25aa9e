"""One model, packed for the device, run over ragged batches."""

import math
from collections.abc import Sequence
from typing import Final, cast

import torch
from torch import Tensor

from conveyor_models import Bundle
from conveyor_models.cells import LstmWeights
from conveyor_server.core import ELEMENT_BYTES
from conveyor_server.engine.lstm import (
    JoinedGates,
    LstmLayer,
    TabulatedGates,
    padded,
    round_up,
)
from conveyor_server.engine.memories import Memories
from conveyor_server.engine.port import Done, Work
from conveyor_server.engine.products import Product, ProductFamily
from conveyor_server.engine.ragged import Index, Layout, lay_out
from conveyor_server.engine.state_pool import StatePool

TOKEN_TABLE_BYTES_MAX: Final = 64 * 2**20
"""The largest table of the tokens' parts of the first layer's gates.

A token's part is looked up where the table is no larger than this, and else computed.
"""


class ModelRunner:
    """Runs batches of one model on its state pool."""

    def __init__(
        self, bundle: Bundle, slots: int, device: torch.device, family: ProductFamily
    ) -> None:
        """Packs the weights for `device` and allocates the pool."""
        spec = bundle.spec
        weights = {name: tensor.to(device) for name, tensor in bundle.weights.items()}
        self.family = family
        self._device = device
        self._tokens = spec.input.kind == "tokens"
        self._input_size = spec.input_size
        self._lookup: Tensor | None = weights.get("embedding.weight")
        first = _layer_weights(weights, 0)
        if self._lookup is None or _too_large(first, self._lookup):
            gates = JoinedGates(first, spec.layer_input_sizes[0], family)
        else:
            gates = TabulatedGates(first, self._lookup, family)
            self._lookup = gates.table
        self._layers = [LstmLayer(first, gates, family)]
        for number in range(1, len(spec.layers)):
            of_layer = _layer_weights(weights, number)
            gates = JoinedGates(of_layer, self._layers[-1].output_width, family)
            self._layers.append(LstmLayer(of_layer, gates, family))
        self._activation = spec.output.activation
        self._output_size = spec.output_size
        self._head = None
        if "head.weight" in weights:
            self._head = _build_head(weights, self._layers[-1].output_width, family)
        row_size = 1 if spec.attention is None else spec.attention.memory_size
        self.memories = Memories(row_size, device)
        self.pool = StatePool(
            sizes=[size for layer in self._layers for size in (layer.output_size, layer.cell_size)],
            widths=[w for layer in self._layers for w in (layer.output_width, layer.cell_width)],
            slots=slots,
            device=device,
        )

    def run(self, works: Sequence[Work]) -> list[Done]:
        """See `Engine.run`.

        The pool is written last, once the results are in the host's memory, so an exception before
        that has changed nothing.
        """
        layout = lay_out(works)
        multiple = self.family.rows_multiple
        padding = round_up(len(works), multiple) - len(works)
        index = torch.tensor(layout.slots + [0] * padding, device=self._device)
        carries = self.pool.gather(index)
        rows, after = self._run_layers(self._inputs(works, layout), layout, carries)
        outputs = self._outputs(rows, layout)
        finite = self._finite(after)
        done = self._split(outputs, layout, finite)
        if finite is None:
            self.pool.scatter(index[: len(works)], after)
        else:
            kept = finite.nonzero().squeeze(1)
            self.pool.scatter(index[kept], [part[kept] for part in after])
        return done

    def _inputs(self, works: Sequence[Work], layout: Layout) -> Tensor:
        """What the first layer reads, in packed order, padding rows behind."""
        payload = bytearray().join([work.rows for work in works])
        rows_padded = round_up(
            layout.rows if layout.gather is None else layout.rows + self.family.rows_multiple,
            self.family.rows_multiple,
        )
        payload.extend(bytes((rows_padded - layout.rows) * self._input_size * ELEMENT_BYTES))
        dtype = torch.int32 if self._tokens else torch.float32
        x = torch.frombuffer(payload, dtype=dtype).to(self._device)
        if not self._tokens:
            x = x.view(rows_padded, self._input_size)
        if layout.gather is not None:
            x = torch.cat((x.index_select(0, self._index(layout.gather)), x[layout.rows :]))
        return x if self._lookup is None else self._lookup.index_select(0, x)

    def _run_layers(
        self, x: Tensor, layout: Layout, carries: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Runs one layer after another.

        Returns the top layer's outputs in packed order, and the new carry parts, longest work
        first.
        """
        works = len(layout.slots)
        last = None if layout.last is None else self._index(layout.last)
        after: list[Tensor] = []
        for number, layer in enumerate(self._layers):
            h, c = carries[2 * number], carries[2 * number + 1]
            x, c = layer.run(x, layout.counts, h, c)
            after += [x[:works] if last is None else x.index_select(0, last), c]
        return x, after

    def _outputs(self, rows: Tensor, layout: Layout) -> Tensor:
        """The wanted output rows in the caller's order, [wanted, output size]."""
        wanted = layout.rows
        if layout.wanted is not None:
            wanted = len(layout.wanted)
            if not wanted:
                return rows[:0, : self._output_size]
            # At least two rows for the head's product, and a multiple.
            index = self._index(layout.wanted)
            padding = round_up(wanted, self.family.rows_multiple) - wanted
            rows = rows.index_select(0, torch.cat((index, index.new_zeros(padding))))
        y = rows if self._head is None else self._head.linear(rows)
        match self._activation:
            case "softmax":
                y = y[:, : self._output_size].softmax(dim=1)
            case "log_softmax":
                y = y[:, : self._output_size].log_softmax(dim=1)
            case "sigmoid":
                y = y.sigmoid()
            case _:
                assert self._activation == "none", self._activation
        return y[:wanted, : self._output_size]

    def _finite(self, after: list[Tensor]) -> Tensor | None:
        """None if every new carry is finite, else which works' are, [works], longest first."""
        # A sum is finite only if every term is; the opposite does not hold, so a suspect batch is
        # looked at closely. The h of each layer tells for its c too: |c| grows by at most 1 a step,
        # so c can turn into NaN but not into infinity, and h = o * tanh(c) is then NaN as well.
        if math.isfinite(sum(float(h.sum()) for h in after[::2])):
            return None
        finite = torch.stack([part.isfinite().all(dim=1) for part in after]).all(dim=0)
        return None if bool(finite.all()) else finite

    def _split(self, outputs: Tensor, layout: Layout, finite: Tensor | None) -> list[Done]:
        packed = outputs.contiguous().cpu().numpy().tobytes()
        row_bytes = self._output_size * ELEMENT_BYTES
        done: list[Done] = []
        offset = 0
        for count in layout.wanted_counts:
            end = offset + count * row_bytes
            done.append(Done(packed[offset:end]))
            offset = end
        if finite is not None:
            order = layout.order or range(len(done))
            flags = cast(list[bool], finite.numpy(force=True).tolist())
            for position, kept in zip(order, flags, strict=True):
                done[position].finite = kept
        return done

    def _index(self, index: Index) -> Tensor:
        tensor = torch.from_numpy(index)  # pyright: ignore[reportUnknownMemberType]  torch's types
        return tensor.to(self._device)


def _layer_weights(weights: dict[str, Tensor], number: int) -> LstmWeights:
    return LstmWeights(
        input=weights[f"layers.{number}.weight_input"],
        recurrent=weights[f"layers.{number}.weight_recurrent"],
        bias=weights[f"layers.{number}.bias"],
        projection=weights.get(f"layers.{number}.weight_projection"),
    )


def _too_large(first: LstmWeights, embedding: Tensor) -> bool:
    return TabulatedGates.table_bytes(first, embedding) > TOKEN_TABLE_BYTES_MAX


def _build_head(weights: dict[str, Tensor], input_width: int, family: ProductFamily) -> Product:
    # Padded like a layer. For the logistic function the reason is that of `engine.lstm`; for the
    # product it is that a library's kernels for 5 to 7 columns give a row other bits in another
    # place of the same block.
    weight, bias = weights["head.weight"], weights.get("head.bias")
    rows, columns = weight.shape
    width = padded(rows)
    wide = weight.new_zeros(width, input_width)
    wide[:rows, :columns] = weight
    wide_bias = None
    if bias is not None:
        wide_bias = bias.new_zeros(width)
        wide_bias[:rows] = bias
    return family.product(wide, wide_bias)
