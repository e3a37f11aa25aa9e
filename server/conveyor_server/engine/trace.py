"""What goes on inside a batch, for the works that asked to see it.

A tap is shown tensors that the kernels have anyway and copies rows of them, so that it changes no
bit of what they compute. Summaries are made from those rows on the host.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from conveyor_models import Layer
from conveyor_server.core import GateTrace, LayerTrace, Trace, TraceMode
from conveyor_server.engine.port import Work
from conveyor_server.engine.ragged import Layout

LOW = 0.1
"""Activations below it are counted in a summary."""
HIGH = 0.9
"""And those above it."""

Rows = npt.NDArray[np.float32]


class Tap:
    """Sees one batch.

    Ranks are positions of works in the batch, longest first; at each time the works still running
    are the first so many of them.
    """

    def __init__(self, ranks: Sequence[int], device: torch.device) -> None:
        """`ranks` of the works that are traced, ascending."""
        self._ranks = list(ranks)
        self._index = torch.tensor(self._ranks, device=device)
        self._layer = 0
        self._active = 0
        self._seen: dict[tuple[int, str], list[Tensor]] = {}
        self._attention: dict[int, list[Tensor]] = {rank: [] for rank in ranks}

    def over(self, layer: int, count: int) -> Tap | None:
        """Turns to a layer at a time at which `count` works are running.

        Returns itself, or None if no traced one is among them.
        """
        self._layer, self._active = layer, bisect_left(self._ranks, count)
        return self if self._active else None

    def see(self, **values: Tensor) -> None:
        """Takes activations by name, each [rows, width]."""
        for name, value in values.items():
            rows = value.index_select(0, self._index[: self._active])
            self._seen.setdefault((self._layer, name), []).append(rows)

    def see_weights(self, ranks: Sequence[int], lengths: Sequence[int], weights: Tensor) -> None:
        """Takes attention weights [works, width] of works with memories of these lengths."""
        for rank, length, row in zip(ranks, lengths, weights, strict=True):
            if rank in self._attention:
                self._attention[rank].append(row[:length].clone())

    def traces(
        self, works: Sequence[Work], layout: Layout, layers: Sequence[Layer]
    ) -> dict[int, Trace]:
        """What was seen.

        Args:
            works: The batch.
            layout: How it lay.
            layers: Of the model.

        Returns:
            The trace of each traced work, by its position in `works`.
        """
        active = [bisect_left(self._ranks, count) for count in layout.counts]
        starts = [0, *accumulate(active)]
        seen = {key: _host(torch.cat(rows)) for key, rows in self._seen.items()}
        found: dict[int, Trace] = {}
        for place, rank in enumerate(self._ranks):
            position = rank if layout.order is None else layout.order[rank]
            work = works[position]
            rows = np.array([starts[time] + place for time in range(work.length)])
            weights = self._attention[rank]
            found[position] = Trace(
                work.trace,
                work.length,
                tuple(
                    _layer_trace(number, each, seen, rows, work.trace)
                    for number, each in enumerate(layers)
                ),
                _host(torch.stack(weights)).tobytes() if weights else b"",
                len(weights[0]) if weights else 0,
            )
        return found


def _layer_trace(
    number: int,
    layer: Layer,
    seen: Mapping[tuple[int, str], Rows],
    rows: npt.NDArray[Any],
    mode: TraceMode,
) -> LayerTrace:
    gates: list[GateTrace] = []
    for name in layer.traced:
        units = layer.hidden_size if name == "h" else layer.size
        values = np.ascontiguousarray(seen[number, name][rows, :units])
        kept = values if mode is TraceMode.FULL else summarise(values)
        gates.append(GateTrace(name, units, kept.tobytes()))
    return LayerTrace(number, layer.cell, tuple(gates))


def summarise(values: Rows) -> Rows:
    """[steps, units] -> mean, minimum, maximum, share below `LOW`, share above `HIGH`, [steps, 5].

    Each row for itself, so that it does not depend on how many there are.
    """
    columns = (
        values.mean(axis=1, dtype=np.float64),
        values.min(axis=1),
        values.max(axis=1),
        (values < LOW).mean(axis=1),
        (values > HIGH).mean(axis=1),
    )
    return np.stack(columns, axis=1).astype(np.float32)


def _host(values: Tensor) -> Rows:
    return values.numpy(force=True)
