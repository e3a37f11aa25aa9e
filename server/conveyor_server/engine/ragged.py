"""Where each step of a ragged batch lies.

Works of different lengths run together over time without padding steps: sorted by falling length,
the works still running at time t are the first n_t, and the rows of a tensor packed in time order
are

    t = 0: work 0, 1, .. n_0 - 1;  t = 1: work 0, 1, .. n_1 - 1;  ...

as in `torch.nn.utils.rnn.PackedSequence`. Payloads arrive, and results leave, in session order
instead: all steps of the first work, then of the second.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from conveyor_server.engine.port import Work

Index = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Layout:
    """The layout of one batch.

    Attributes:
        slots: Slot of each work, longest first.
        order: Position in the caller's list of each work, longest first; None if that is the
            caller's own order.
        counts: n_t for each time t.
        rows: Steps in all.
        gather: For each row in time order its row in session order; None if the two orders are the
            same.
        wanted: For each wanted output, in the caller's order, its row (time order); None if every
            row in order.
        wanted_counts: Wanted outputs of each work, in the caller's order.
    """

    slots: list[int]
    order: list[int] | None
    counts: list[int]
    rows: int
    gather: Index | None
    wanted: Index | None
    wanted_counts: list[int]


def lay_out(works: Sequence[Work]) -> Layout:
    """Lays out a batch of at least one work."""
    if all(work.length == 1 for work in works):
        return _lay_out_single_steps(works)
    lengths = np.array([work.length for work in works], dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    sorted_lengths = lengths[order]
    times = int(sorted_lengths[0])
    # n_t: how many works are longer than t.
    counts = np.searchsorted(-sorted_lengths, -np.arange(times), side="left")
    offsets = np.concatenate(([0], np.cumsum(counts)))
    starts = np.concatenate(([0], np.cumsum(lengths)))[:-1]
    gather = np.concatenate([starts[order[:count]] + t for t, count in enumerate(counts)])
    rank = np.empty_like(order)
    rank[order] = np.arange(len(works))
    wanted = [
        offsets[work.length - work.outputs : work.length] + rank[position]
        for position, work in enumerate(works)
        if work.outputs
    ]
    positions: list[int] = order.tolist()
    return Layout(
        slots=[works[position].slot for position in positions],
        order=positions,
        counts=counts.tolist(),
        rows=int(offsets[-1]),
        gather=gather,
        wanted=np.concatenate(wanted) if wanted else np.empty(0, dtype=np.int64),
        wanted_counts=[work.outputs for work in works],
    )


def _lay_out_single_steps(works: Sequence[Work]) -> Layout:
    # The usual batch of live streams: all orders coincide, and nothing has to be computed.
    wanted_counts = [work.outputs for work in works]
    every = all(wanted_counts)
    return Layout(
        slots=[work.slot for work in works],
        order=None,
        counts=[len(works)],
        rows=len(works),
        gather=None,
        wanted=None if every else np.flatnonzero(np.array(wanted_counts)),
        wanted_counts=wanted_counts,
    )
