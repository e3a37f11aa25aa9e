"""One model, packed for the device, run over ragged batches."""

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from conveyor_models import Bundle
from conveyor_server.core import ELEMENT_BYTES
from conveyor_server.engine.memories import HeldMemory, Memories
from conveyor_server.engine.packing import round_up
from conveyor_server.engine.port import Done, Work
from conveyor_server.engine.products import ProductFamily
from conveyor_server.engine.ragged import Index, Layout, lay_out
from conveyor_server.engine.readout import Readout
from conveyor_server.engine.stack import Stack
from conveyor_server.engine.state_pool import StatePool
from conveyor_server.engine.trace import Tap


class ModelRunner:
    """Runs batches of one model on its state pool.

    Attributes:
        family: The kind of products it computes with.
        pool: Carries by slot.
    """

    def __init__(
        self, bundle: Bundle, slots: int, device: torch.device, family: ProductFamily
    ) -> None:
        """Packs the weights for `device` and allocates the pool."""
        spec = bundle.spec
        weights = {name: tensor.to(device) for name, tensor in bundle.weights.items()}
        self.family = family
        self._device = device
        self._spec = spec
        self._tokens = spec.input.kind == "tokens"
        self._stack = Stack(spec, weights, family, device)
        self._readout = Readout(spec, weights, self._stack.columns, family)
        self.pool = StatePool(self._stack.carry, self._stack.initial, slots, device)

    @property
    def memories(self) -> Memories:
        """What sessions attend over."""
        assert self._stack.memories is not None, "the model has no attention"
        return self._stack.memories

    def run(self, works: Sequence[Work]) -> list[Done]:
        """See `Engine.run`.

        The pool is written last, once the results are in the host's memory, so an exception before
        that has changed nothing. A device tells of a fault only when it is waited for, so nothing
        is returned before the writes are through: no answer goes out whose carry was not kept.
        """
        layout = lay_out(works)
        carries = self.pool.gather(layout.slots, -len(works) % self.family.rows_multiple)
        tap = self._tap(works, layout)
        rows, after = self._run_layers(works, layout, carries, tap)
        outputs = self._outputs(rows, layout)
        finite = self._finite(after)
        done = self._split(outputs, layout, finite)
        if tap is not None:
            self._add_traces(done, works, layout, tap)
        if finite is None:
            self.pool.scatter(layout.slots, after)
        else:
            slots = [slot for slot, kept in zip(layout.slots, _flags(finite), strict=True) if kept]
            if slots:
                self.pool.scatter(slots, [part[finite] for part in after])
        self._await_device()
        return done

    def _await_device(self) -> None:
        """Returns once all that was launched is done, or raises what became of it."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def _tap(self, works: Sequence[Work], layout: Layout) -> Tap | None:
        if not any(work.trace for work in works):
            return None
        order = layout.order or range(len(works))
        return Tap(
            [rank for rank, position in enumerate(order) if works[position].trace], self._device
        )

    def _run_layers(
        self, works: Sequence[Work], layout: Layout, carries: list[Tensor], tap: Tap | None
    ) -> tuple[Tensor, list[Tensor]]:
        """Returns what is at the top, in packed order, and the new carry, longest work first."""
        memories: list[HeldMemory] = []
        if self._stack.memories is not None:
            order = layout.order or range(len(works))
            memories = [self._stack.memories[works[position].memory] for position in order]
        x = self._inputs(works, layout)
        return self._stack.run(x, layout.counts, carries, memories, tap)

    def _inputs(self, works: Sequence[Work], layout: Layout) -> Tensor:
        """What the first layer reads, in packed order, padding rows behind."""
        payload = bytearray().join([work.rows for work in works])
        size = self._spec.input_size
        rows_padded = round_up(
            layout.rows if layout.gather is None else layout.rows + self.family.rows_multiple,
            self.family.rows_multiple,
        )
        payload.extend(bytes((rows_padded - layout.rows) * size * ELEMENT_BYTES))
        dtype = torch.int32 if self._tokens else torch.float32
        x = torch.frombuffer(payload, dtype=dtype).to(self._device)
        if not self._tokens:
            x = x.view(rows_padded, size)
        if layout.gather is not None:
            x = torch.cat((x.index_select(0, self._index(layout.gather)), x[layout.rows :]))
        lookup = self._stack.lookup
        return x if lookup is None else lookup.index_select(0, x)

    def _outputs(self, rows: Tensor, layout: Layout) -> Tensor:
        """The wanted output rows in the caller's order, [wanted, output size]."""
        wanted = layout.rows
        if layout.wanted is not None:
            wanted = len(layout.wanted)
            if not wanted:
                return rows[:0, :0]
            # At least two rows for the head's product, and a multiple.
            index = self._index(layout.wanted)
            padding = round_up(wanted, self.family.rows_multiple) - wanted
            rows = rows.index_select(0, torch.cat((index, index.new_zeros(padding))))
        return self._readout(rows)[:wanted]

    def _finite(self, after: list[Tensor]) -> Tensor | None:
        """None if every new carry is finite, else which works' are, [works], longest first."""
        # A sum is finite only if every term is; the opposite does not hold, so a suspect batch is
        # looked at closely. The h of each layer tells for its c too: |c| grows by at most 1 a step,
        # so c can turn into NaN but not into infinity, and h = o * tanh(c) is then NaN as well.
        if math.isfinite(sum(float(after[part].sum()) for part in self._stack.hidden)):
            return None
        finite = torch.stack([part.isfinite().all(dim=1) for part in after]).all(dim=0)
        return None if bool(finite.all()) else finite

    def _split(self, outputs: Tensor, layout: Layout, finite: Tensor | None) -> list[Done]:
        packed = outputs.contiguous().cpu().numpy().tobytes()
        row_bytes = self._readout.size * ELEMENT_BYTES
        done: list[Done] = []
        offset = 0
        for count in layout.wanted_counts:
            end = offset + count * row_bytes
            done.append(Done(packed[offset:end]))
            offset = end
        if finite is not None:
            order = layout.order or range(len(done))
            for position, kept in zip(order, _flags(finite), strict=True):
                done[position].finite = kept
        return done

    def _add_traces(
        self, done: list[Done], works: Sequence[Work], layout: Layout, tap: Tap
    ) -> None:
        for position, trace in tap.traces(works, layout, self._spec.layers).items():
            done[position].trace = trace

    def _index(self, index: Index) -> Tensor:
        tensor = torch.from_numpy(index)  # pyright: ignore[reportUnknownMemberType]  torch's types
        return tensor.to(self._device)


def _flags(finite: Tensor) -> list[bool]:
    return cast("list[bool]", finite.numpy(force=True).tolist())
