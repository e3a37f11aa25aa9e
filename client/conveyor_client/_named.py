"""Inputs that name their values: tables, records and mappings.

Names are compared with the model's labels, so the order in which they stand does not matter and a
wrong name is an error. Libraries of tables are recognised by what their objects look like; none of
them is needed.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

_PLAIN = (list, tuple)
_NAMES_SHOWN_MAX = 8
_NAME_CHARACTERS_MAX = 80


@dataclass(frozen=True, slots=True)
class Named:
    """Values with names.

    Attributes:
        noun: What a name belongs to, for messages.
        names: As they stand.
        value: The value, or the column of values, under the name at a position.
    """

    noun: str
    names: list[Hashable]
    value: Callable[[int], object]


@dataclass(frozen=True, slots=True)
class Match:
    """Names held against labels.

    Attributes:
        positions: For each label the position of its name; empty if one is missing or duplicate.
        missing: Labels that are not among the names.
        duplicate: Labels that are there more than once.
        unknown: Names that are no labels.
    """

    positions: list[int]
    missing: list[str]
    duplicate: list[str]
    unknown: list[Hashable]


def match(names: Sequence[Hashable], labels: Sequence[str]) -> Match:
    """Finds each label among the names."""
    found: dict[Hashable, list[int]] = {label: [] for label in labels}
    unknown: list[Hashable] = []
    for position, name in enumerate(names):
        if name in found:
            found[name].append(position)
        else:
            unknown.append(name)
    missing = [label for label in labels if not found[label]]
    duplicate = [label for label in labels if len(found[label]) > 1]
    positions = [] if missing or duplicate else [found[label][0] for label in labels]
    return Match(positions, missing, duplicate, unknown)


def named(inputs: object) -> Named | None:
    """The names in one step or one chunk of features.

    Understood are NumPy's structured arrays and records, mappings, named tuples, tables (whatever
    has `columns` or `column_names`) and series with an index. Columns that are numbered 0, 1, 2 ...
    have positions and no names, as pandas gives them to a table made of an array.

    Returns:
        The values with their names; None for inputs without.
    """
    values = cast("Any", inputs)
    if isinstance(inputs, np.ndarray | np.void):
        fields: tuple[str, ...] | None = values.dtype.names
        return None if fields is None else Named("field", [*fields], lambda at: values[fields[at]])
    if isinstance(inputs, Mapping):
        keys = cast("list[Hashable]", list(values))
        return Named("key", keys, lambda at: values[keys[at]])
    if isinstance(inputs, tuple):
        names = cast("tuple[str, ...] | None", getattr(values, "_fields", None))
        return None if names is None else Named("field", [*names], lambda at: values[at])
    columns = _columns(inputs)
    if columns is not None:
        if _numbered(columns):
            return None
        return Named("column", columns, lambda at: values[columns[at]])
    index = _index(inputs)
    if index is None or _numbered(index):
        return None
    array = np.asarray(values)
    return Named("index entry", index, lambda at: array[at])


def is_table(inputs: object) -> bool:
    """Whether inputs are columns, so that walking through them gives no rows."""
    if isinstance(inputs, np.ndarray):
        return cast("Any", inputs).dtype.names is not None
    return isinstance(inputs, Mapping) or _columns(inputs) is not None


def has_named_items(inputs: object) -> bool:
    """Whether inputs are a list with items that name their values."""
    if not isinstance(inputs, list | tuple) or not inputs:
        return False
    items = cast("Sequence[object]", inputs)
    if isinstance(items[0], int | float | np.number):
        return False  # one step; NumPy refuses it if something else follows
    return any(type(item) not in _PLAIN and named(item) is not None for item in items)


def listed(names: Iterable[Hashable]) -> str:
    """The first names, and how many more."""
    every = [str(name)[:_NAME_CHARACTERS_MAX] for name in names]
    more = len(every) - _NAMES_SHOWN_MAX
    return ", ".join(every[:_NAMES_SHOWN_MAX]) + (f" and {more} more" if more > 0 else "")


def _columns(inputs: object) -> list[Hashable] | None:
    """The names of a table's columns."""
    for attribute in ("column_names", "columns"):  # Arrow's `columns` are the values
        found = getattr(inputs, attribute, None)
        if isinstance(found, Iterable):
            return list(cast("Iterable[Hashable]", found))
    return None


def _index(inputs: object) -> list[Hashable] | None:
    """The index of a series; the method `index` of a list is none."""
    found = getattr(inputs, "index", None)
    if not isinstance(found, Iterable) or getattr(inputs, "ndim", 1) != 1:
        return None
    return list(cast("Iterable[Hashable]", found))


def _numbered(names: list[Hashable]) -> bool:
    return names == list(range(len(names)))
