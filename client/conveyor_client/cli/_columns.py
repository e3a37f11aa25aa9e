"""Which fields of a CSV line are a model's inputs, and what numbers they hold."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from conveyor_client._named import match
from conveyor_client._nouns import ModelInfo
from conveyor_client._rows import input_names
from conveyor_client.cli._source import Line, RowsRefused

Rows = npt.NDArray[np.float32] | npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Columns:
    """Where a line holds the model's inputs.

    Attributes:
        picked: The field of each input, in the model's order.
        fields: What a line must have in all: no more and no less, lest inputs are mixed up unseen.
        is_header: Whether the line it was found by holds names rather than a row.
    """

    model: ModelInfo
    picked: list[int]
    fields: int
    is_header: bool

    def rows(self, lines: list[Line]) -> Rows:
        """Converts lines.

        Args:
            lines: At least one.

        Returns:
            float32 of shape (K, row elements), or int32 of shape (K,) for tokens.

        Raises:
            RowsRefused: Says which line and which field is wrong.
        """
        for line in lines:
            if len(line.fields) != self.fields:
                raise RowsRefused(
                    f"line {line.number}: {_count(len(line.fields))}, expected {self.fields}"
                )
        if self.model.input.is_tokens:
            return np.array([self._token(line) for line in lines], dtype=np.int32)
        with np.errstate(over="ignore"):  # an overflow becomes infinite, which is refused
            rows = np.array([self._features(line) for line in lines], dtype=np.float32)
        for number, column in np.argwhere(~np.isfinite(rows))[:1]:
            line = lines[int(number)]
            text = line.fields[self.picked[int(column)]]
            raise RowsRefused(f"line {line.number}: {text!r} is not a finite float32")
        return rows

    def _features(self, line: Line) -> list[float]:
        try:
            return [float(line.fields[column]) for column in self.picked]
        except ValueError:
            wrong = next(c for c in self.picked if not _is_number(line.fields[c]))
        raise RowsRefused(f"line {line.number}: {line.fields[wrong]!r} is not a number")

    def _token(self, line: Line) -> int:
        text, below = line.fields[self.picked[0]], self.model.input.vocabulary_size
        try:
            token = int(text)
        except ValueError:
            raise RowsRefused(f"line {line.number}: {text!r} is not an integer") from None
        if not 0 <= token < below:
            raise RowsRefused(f"line {line.number}: {token} is not a token from 0 to {below - 1}")
        return token


def find_columns(first: Line, model: ModelInfo) -> Columns:
    """Tells a header from a row, and finds the model's inputs.

    A first line with a number in it is a row, unless it names every input.

    Args:
        first: The first line.
        model: Its inputs are looked for.

    Raises:
        RowsRefused: It is a header in which an input is missing or named twice.
    """
    names = [field.strip() for field in first.fields]
    wanted = input_names(model)
    in_order = list(range(model.input.row_elements))
    numbers = sum(map(_is_number, names))
    named = bool(wanted) and set(wanted) <= set(names)
    if numbers == len(names) or (numbers and not named):
        return Columns(model, in_order, len(in_order), is_header=False)
    if not wanted or (model.input.is_tokens and len(names) == 1):
        # The names say nothing, their number does.
        if len(names) != len(in_order):
            raise RowsRefused(
                f"line {first.number}: {_count(len(names))}, expected {len(in_order)}"
            )
        return Columns(model, in_order, len(in_order), is_header=True)
    found = match(names, wanted)  # other columns may stand beside them in a file
    if found.missing:
        raise RowsRefused(
            f"the header has no column {', '.join(found.missing)};"
            f" {model.name} takes {', '.join(wanted)}"
        )
    if found.duplicate:
        raise RowsRefused(f"the header has column {', '.join(found.duplicate)} more than once")
    return Columns(model, found.positions, len(names), is_header=True)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _count(fields: int) -> str:
    return "1 field" if fields == 1 else f"{fields} fields"
