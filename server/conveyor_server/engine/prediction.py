"""Whole sequences, through models with layers that run from the end.

One pass after another: each direction of each layer over all steps, then the readout. A pass is
stepped by the same kernels as a session, and may be left off after any step.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias, cast

import torch
from torch import Tensor

from conveyor_models import Bundle, ModelSpec, cell_weights, layer_tensors
from conveyor_server.engine.failures import computing
from conveyor_server.engine.feeds import RowsFeed
from conveyor_server.engine.layer import Kernel, initial_carry, make_kernel, run_packed
from conveyor_server.engine.packing import Columns
from conveyor_server.engine.products import ProductFamily
from conveyor_server.engine.readout import Readout
from conveyor_server.errors import SessionQuarantined

Guard: TypeAlias = Callable[[], AbstractContextManager[None]]
"""Makes the mode in which a slice is computed."""


@dataclass(frozen=True, slots=True, eq=False)
class _Direction:
    """One layer in one direction."""

    kernel: Kernel
    initial: list[Tensor]
    """For each part of the carry, [width]."""
    backwards: bool


class SequenceRunner:
    """One model. Only ever one sequence in a batch: its steps cannot wait for those of others.

    Attributes:
        family: The kind of products it computes with.
    """

    def __init__(
        self,
        bundle: Bundle,
        device: torch.device,
        family: ProductFamily,
        guard: Guard | None = None,
    ) -> None:
        """Packs the weights for `device`."""
        spec = bundle.spec
        self._guard = guard or partial(computing, device)
        weights = {name: tensor.to(device) for name, tensor in bundle.weights.items()}
        self.family = family
        self._device = device
        self._rows_multiple = family.rows_multiple
        self._lookup = weights.get("embedding.weight")
        size = spec.layer_input_sizes[0]
        columns: Columns = ((size, size),)
        self._layers: list[list[_Direction]] = []
        for number in range(len(spec.layers)):
            self._layers.append(_pack(spec, weights, number, columns, family))
            columns = [each.kernel.carry[0] for each in self._layers[-1]]
        self._readout = Readout(spec, weights, columns, family)

    def begin(self, rows: bytes, length: int, outputs: int) -> SequencePrediction:
        """See `port.Engine.predict`."""
        dtype = torch.float32 if self._lookup is None else torch.int32
        with self._guard():
            x = torch.frombuffer(bytearray(rows), dtype=dtype).to(self._device)
            x = x.view(length, -1) if self._lookup is None else self._lookup.index_select(0, x)
            return SequencePrediction(self._work(x, outputs), self._guard)

    def _work(self, x: Tensor, outputs: int) -> Generator[None, int, bytes]:
        """All passes; yields whenever it has taken as many steps as it was sent."""
        left = yield
        for layer in self._layers:
            passed: list[Tensor] = []
            for direction in layer:
                y, left = yield from self._pass(direction, x, left)
                passed.append(y)
            x = torch.cat(passed, dim=1)
        wanted = x[len(x) - outputs :]
        rows: list[Tensor] = []
        while wanted.shape[0]:
            left = left or (yield)
            behind = -min(left, len(wanted)) % self._rows_multiple
            part = wanted[:left]
            rows.append(self._readout(_behind(part, behind))[: len(part)])
            wanted, left = wanted[left:], left - len(part)
        return torch.cat(rows).cpu().numpy().tobytes() if rows else b""

    def _pass(
        self, direction: _Direction, x: Tensor, left: int
    ) -> Generator[None, int, tuple[Tensor, int]]:
        """One direction of a layer: x [length, ...] -> outputs, and what is left of the slice."""
        x = _behind(x.flip(0) if direction.backwards else x, self._rows_multiple)
        carry = [part.repeat(self._rows_multiple, 1) for part in direction.initial]
        rows: list[Tensor] = []
        done, length = 0, len(x) - self._rows_multiple
        while done < length:
            left = left or (yield)
            steps = min(left, length - done)
            part = x[done : done + steps - 1 + self._rows_multiple]
            y, carry = run_packed(
                lambda x, carry, _: _with_output(direction.kernel.step(x, carry, None)),
                part,
                [1] * steps,
                carry,
                self._rows_multiple,
            )
            carry = [_behind(each, self._rows_multiple - 1) for each in carry]
            rows.append(y[:steps])
            done, left = done + steps, left - steps
        y = torch.cat(rows)
        if not bool(y.isfinite().all()):
            raise SessionQuarantined(
                "the sequence drives the model's state to NaN or infinity; look at its values"
            )
        return (y.flip(0) if direction.backwards else y), left


class SequencePrediction:
    """Implements `port.Prediction`."""

    def __init__(self, work: Generator[None, int, bytes], guard: Guard) -> None:
        """`work` as of `SequenceRunner`."""
        self._work = work
        self._guard = guard
        next(work)

    def advance(self, steps_max: int) -> bytes | None:
        """See `port.Prediction.advance`."""
        assert steps_max >= 1, steps_max
        with self._guard():
            try:
                self._work.send(steps_max)
            except StopIteration as done:
                return cast("bytes", done.value)
        return None


def _behind(rows: Tensor, count: int) -> Tensor:
    """rows [n, ...] with so many rows of zeros behind."""
    return torch.cat((rows, rows.new_zeros(count, *rows.shape[1:])))


def _with_output(carry: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    return carry[0], carry


def _pack(
    spec: ModelSpec,
    weights: Mapping[str, Tensor],
    number: int,
    columns: Columns,
    family: ProductFamily,
) -> list[_Direction]:
    layer = spec.layers[number]
    directions: list[_Direction] = []
    for prefix in layer.directions:
        tensors = layer_tensors(weights, number, prefix)
        kernel = make_kernel(cell_weights(layer, tensors), RowsFeed(columns, family), family)
        initial = initial_carry(layer, tensors, kernel.carry)
        backwards = bool(prefix) or layer.direction == "reverse"
        directions.append(_Direction(kernel, initial, backwards))
    return directions
