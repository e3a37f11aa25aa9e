"""What a watched session is fed with, a step at a time: rows of CSV, a text, or its own outputs."""

import asyncio
from typing import Protocol

import numpy as np

from conveyor_client._nouns import FloatArray, Int32Array, ModelInfo
from conveyor_client.cli._columns import Columns, find_columns
from conveyor_client.cli._recording import Row, probabilities
from conveyor_client.cli._source import Source


class FeedRefused(Exception):
    """The model does not take what it should be fed with; the message says why."""


class Feed(Protocol):
    """Where inputs come from."""

    async def next(self, output: FloatArray | None) -> Row | None:
        """Finds the next input.

        Args:
            output: What the step before gave; None before the first.

        Returns:
            One step: an int32 of shape () or float32 of shape (D,); None at the end.
        """
        ...


class Lines:
    """Rows of a CSV file or of the standard input."""

    def __init__(self, model: ModelInfo, lines: Source) -> None:
        self._model = model
        self._lines = lines
        self._columns: Columns | None = None

    async def next(self, output: FloatArray | None) -> Row | None:
        """See `Feed.next`.

        Raises:
            RowsRefused: A line is no row of the model's.
        """
        line = await self._lines.take(1)
        if line and self._columns is None:
            self._columns = find_columns(line[0], self._model)
            if self._columns.is_header:
                line = await self._lines.take(1)
        if not line or self._columns is None:
            return None
        row: Row = self._columns.rows(line)
        return row.reshape(row.shape[1:])


class Text:
    """A text, letter by letter; then, if wanted, what the model makes of it, fed back.

    Args:
        model: Takes tokens with labels.
        text: At least one character.
        goes_on: Whether outputs are fed back when the text is over.
        temperature: 0 takes the likeliest token; 1 draws from the model's own distribution.
        seed: The same seed draws the same tokens.

    Raises:
        FeedRefused: The model takes no text, or its outputs say nothing of what comes next.
        TokenOutOfRange: A character is not in the vocabulary.
    """

    def __init__(
        self,
        model: ModelInfo,
        text: str,
        *,
        goes_on: bool = False,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> None:
        if not model.input.is_tokens:
            raise FeedRefused(f"{model.name} takes features, not text; feed it rows with --csv")
        if not model.input.labels:
            raise FeedRefused(
                f"the tokens of {model.name} have no labels, so it takes no text; use --csv"
            )
        if not text:
            raise FeedRefused("the text is empty; give at least one character")
        if goes_on and model.output.row_elements != model.input.vocabulary_size:
            raise FeedRefused(
                f"the outputs of {model.name} are not tokens, so it cannot go on alone"
            )
        self._model = model
        self._tokens: Int32Array = model.input.encode(text)
        self._next = 0
        self._goes_on = goes_on
        self._temperature = temperature
        self._random = np.random.default_rng(seed)

    async def next(self, output: FloatArray | None) -> Row | None:
        """See `Feed.next`."""
        if self._next < len(self._tokens):
            self._next += 1
            return self._tokens[self._next - 1 : self._next].reshape(())
        if not self._goes_on or output is None:
            return None
        return np.array(self._draw(output), dtype=np.int32)

    def _draw(self, output: FloatArray) -> int:
        if self._temperature <= 0.0:
            return int(np.argmax(output))
        wanted = probabilities(self._model, output)
        logits = output.astype(np.float64)
        if wanted is not None:
            logits = np.log(np.maximum(wanted.astype(np.float64), 1e-30))
        weights = np.exp((logits - logits.max()) / self._temperature)
        return int(self._random.choice(len(weights), p=weights / weights.sum()))


class Pace:
    """At most so many steps in a second, from the first one on; 0 is as fast as possible."""

    def __init__(self, steps_per_second: float) -> None:
        self._seconds = 1.0 / steps_per_second if steps_per_second > 0 else 0.0
        self._due = 0.0

    async def wait(self) -> None:
        """Waits until the next step is due."""
        if not self._seconds:
            return
        now = asyncio.get_running_loop().time()
        self._due = max(self._due, now)  # what was late stays late: no burst follows a wait
        await asyncio.sleep(self._due - now)
        self._due += self._seconds
