"""Where a recurrent node of ONNX begins and ends: its initial state, and the lengths of sequences.

A session of a bundle begins with zeros or with what the bundle holds, and steps every row that it
gets. So an initial state has to be a constant, or an input of its own of which numbers are only
moved about: that one is the session's carry. What the graph computes is refused, for nothing would
compute it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from conveyor_models.errors import UnsupportedModuleError
from conveyor_models.importers.common import kind_of, listed, refused, tensor_of
from conveyor_models.importers.onnx_shapes import Length
from conveyor_models.importers.onnx_values import (
    Array,
    Counts,
    Flow,
    Known,
    Lengths,
    Refused,
    Repeated,
    Value,
    sources_of,
)

_EXPECTED = "expected zeros, a constant, or an input of the graph that is used for nothing else"


def initial_tensors(
    name: str,
    values: dict[str, Value | None],
    sizes: tuple[int, int, int],
    batch_first: bool,
) -> dict[str, Tensor]:
    """What every session begins with, in one direction; nothing where that is zeros.

    Args:
        name: of the node.
        values: its inputs, by the part of the carry.
        sizes: the direction, how many there are, and units.
        batch_first: whether a state is [B, D, H], and not [D, B, H].
    """
    way, ways, size = sizes
    rows = {
        part: _row(name, f"initial_{part}", value, (ways, size), batch_first)
        for part, value in values.items()
    }
    if all(each is None or not each.any() for each in rows.values()):
        return {}
    none = np.zeros((ways, size), np.float32)
    return {
        f"initial_{part}": tensor_of(f"{name}: initial_{part}", (none if row is None else row)[way])
        for part, row in rows.items()
    }


def _row(
    name: str, what: str, value: Value | None, shape: tuple[int, int], batch_first: bool
) -> Array | None:
    """[D, H], the same for every sequence of a batch; None for zeros."""
    if not isinstance(value, Known | Repeated):
        return None  # `outside` has seen to it
    array = value.array
    if array.ndim != 3 or array.dtype.kind != "f":
        raise refused(name, does_not_fit(what, array))
    if batch_first:
        array = array.swapaxes(0, 1)  # [D, B, H]
    if not (array == array[:, :1]).all():
        raise refused(name, f"{what} differs within the batch")
    try:
        return np.array(np.broadcast_to(array[:, 0], shape))
    except ValueError as error:
        raise refused(name, does_not_fit(what, array)) from error


def does_not_fit(what: str, array: Array) -> str:
    """Why a tensor of a recurrent node is refused."""
    return f"{what}: {kind_of(array.dtype)} of shape {list(array.shape)[:8]}, which does not fit"


def outside(name: str, what: str, value: Value | None, rows_from: str) -> str | None:
    """A note on a state that comes from outside, or none for a constant.

    Args:
        name: of the node.
        what: initial_h or initial_c.
        value: what the graph gives it.
        rows_from: the input whose rows flow on.

    Raises:
        UnsupportedModuleError: the graph computes it.
    """
    if value is None or isinstance(value, Known | Repeated):
        return None
    sources = sources_of(value)
    if sources is None:
        raise refused(name, f"{what} is computed inside the graph{_how(value)}: {_EXPECTED}")
    if sources.states:
        raise refused(
            name,
            f"{what} is the state that {listed(sorted(sources.states))} ended with: {_EXPECTED}",
        )
    if rows_from in sources.inputs:
        raise refused(
            name, f"{what} is cut from {rows_from}, whose rows are the model's input: {_EXPECTED}"
        )
    return f"{name}: {what} is given from outside, so a session begins with zeros"


def _how(value: Value) -> str:
    match value:
        case Flow():
            last = value.computed or value.stage.node
            return f", by {last} from {value.stage.origin}"
        case Refused():
            return f" ({value.error})"
        case _:
            return ""


def full_length(value: Value | None, length: Length) -> bool:
    """Whether it says of every sequence that it is that long."""
    match value:
        case Known():
            array: Any = value.array
            return length.known is not None and bool((array == length.known).all())
        case Lengths():
            return all(each == length for each in value.of)
        case Counts():
            return value.length == length
        case Repeated():
            return length.known is not None and bool((value.array == length.known).all())
        case _:
            return value is None


def lengths_note(name: str, value: Value | None, length: Length, rows_from: str) -> str | None:
    """A note on lengths that come from outside, or none where every sequence is a whole one.

    Raises:
        UnsupportedModuleError: they end sequences early, or may do so.
    """
    if full_length(value, length):
        return None
    if isinstance(value, Known | Repeated):
        raise refused(
            name, "sequence_lens is a constant, so every sequence would end there: leave it out"
        )
    sources = None if value is None else sources_of(value)
    if sources is None or sources.states or rows_from in sources.inputs:
        raise _computed_lengths(name, value)
    return (
        f"{name}: sequence_lens is given from outside; the bundle steps every row that it gets, so"
        " send those that a sequence has"
    )


def _computed_lengths(name: str, value: Value | None) -> UnsupportedModuleError:
    how = "" if value is None else _how(value)
    return refused(
        name,
        f"sequence_lens is computed inside the graph{how}: expected the length of the whole"
        " sequence, or an input of the graph",
    )
