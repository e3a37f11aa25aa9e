"""The layers of a model that can be streamed, and its attention, over a packed batch."""

from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from conveyor_models import ModelSpec, attention_weights, cell_weights, layer_tensors
from conveyor_server.engine.attention import Attention
from conveyor_server.engine.feeds import RowsFeed, TableFeed
from conveyor_server.engine.layer import Kernel, Step, initial_carry, make_kernel, run_packed
from conveyor_server.engine.memories import HeldMemory, Memories
from conveyor_server.engine.packing import Columns
from conveyor_server.engine.products import ProductFamily
from conveyor_server.engine.trace import Tap


class Stack:
    """Everything between an input row and the readout.

    Attributes:
        lookup: What stands for each token, [tokens, ...]; None for features.
        carry: Size and width of each part of the carry, those of the lowest layer first.
        hidden: Which of those parts are a layer's h.
        initial: What each part is at first, [width].
        columns: Of a row that `run` puts out.
        memories: What sessions attend over; None without attention.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: Mapping[str, Tensor],
        family: ProductFamily,
        device: torch.device,
    ) -> None:
        """Packs the weights, which are on `device`."""
        self._rows_multiple = family.rows_multiple
        self._attention: Attention | None = None
        self._read_by_head = False
        self.memories: Memories | None = None
        self.lookup = weights.get("embedding.weight")
        size = spec.layer_input_sizes[0]
        columns: Columns = ((size, size),)
        if spec.attention is not None:
            of_attention = attention_weights(spec.attention, weights)
            hidden = spec.layers[-1].hidden_size
            self._attention = Attention(of_attention, hidden, family)
            self._read_by_head = spec.attention.head
            self.memories = Memories(of_attention, family, device)
            size -= spec.attention.memory_size
            columns = ((size, size), self._attention.columns)
        self._kernels: list[Kernel] = []
        self.initial: list[Tensor] = []
        for number in range(len(spec.layers)):
            kernel = self._pack(spec, weights, number, columns, family)
            self._kernels.append(kernel)
            self.initial += initial_carry(
                spec.layers[number], layer_tensors(weights, number, ""), kernel.carry
            )
            columns = kernel.carry[:1]
        self.carry = [part for kernel in self._kernels for part in kernel.carry]
        ends = accumulate(len(kernel.carry) for kernel in self._kernels)
        self.hidden = [0, *ends][:-1]
        self.columns = columns
        if self._attention is not None and self._read_by_head:
            self.columns = (*columns, self._attention.columns)

    def _pack(
        self,
        spec: ModelSpec,
        weights: Mapping[str, Tensor],
        number: int,
        columns: Columns,
        family: ProductFamily,
    ) -> Kernel:
        layer = spec.layers[number]
        of_layer = cell_weights(layer, layer_tensors(weights, number, ""))
        embedding = self.lookup
        if number or embedding is None or self._attention is not None:
            return make_kernel(of_layer, RowsFeed(columns, family), family)
        if not TableFeed.suits(len(embedding), len(layer.gates), layer.size):
            return make_kernel(of_layer, RowsFeed(columns, family), family)
        feed = TableFeed(embedding, family)
        kernel = make_kernel(of_layer, feed, family)
        self.lookup = feed.table
        return kernel

    def run(
        self,
        x: Tensor,
        counts: Sequence[int],
        carry: list[Tensor],
        memories: Sequence[HeldMemory],
        tap: Tap | None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Steps through a packed batch; see `run_packed`.

        Args:
            x: What the first layer reads of the input.
            counts: n_t, as in `ragged.Layout`.
            carry: Of each work, longest first.
            memories: Of each work, longest first; empty without attention.
            tap: Shown what goes on, if there is one.
        """
        if self._attention is not None:
            step = self._attending(self._attention, memories, tap)
            return run_packed(step, x, counts, carry, self._rows_multiple)
        # One layer after another: its weights stay in the cache for all of its times.
        after: list[Tensor] = []
        for number, kernel in enumerate(self._kernels):
            parts = carry[len(after) : len(after) + len(kernel.carry)]
            step = _single(kernel, number, tap)
            x, parts = run_packed(step, x, counts, parts, self._rows_multiple)
            after += parts
        return x, after

    def _attending(
        self, attention: Attention, memories: Sequence[HeldMemory], tap: Tap | None
    ) -> Step:
        """A step of everything: what is read depends on the top layer's h of the step before."""
        batch = attention.gather(memories)
        top = self.hidden[-1]
        steps = [_single(kernel, number, tap) for number, kernel in enumerate(self._kernels)]

        def step(x: Tensor, carry: list[Tensor], count: int) -> tuple[Tensor, list[Tensor]]:
            z = batch.read(carry[top], count, None if tap is None else tap.over(0, count))
            y = torch.cat((x, z), dim=1)
            after: list[Tensor] = []
            for kernel, layer_step in zip(self._kernels, steps, strict=True):
                parts = carry[len(after) : len(after) + len(kernel.carry)]
                y, parts = layer_step(y, parts, count)
                after += parts
            return (torch.cat((y, z), dim=1) if self._read_by_head else y), after

        return step


def _single(kernel: Kernel, number: int, tap: Tap | None) -> Step:
    def step(x: Tensor, carry: list[Tensor], count: int) -> tuple[Tensor, list[Tensor]]:
        parts = kernel.step(x, carry, None if tap is None else tap.over(number, count))
        return parts[0], parts

    return step
