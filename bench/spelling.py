"""The part of the demo in which `spell` looks at scanned digits and writes their names."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from conveyor_client import aio

SHOWN: Final = (4, 7)
"""Digits that are drawn, the first held-out image of each."""
AT_ONCE: Final = 180
"""Images that are spelled at the same time."""

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Looked:
    """One image spelled step by step, with traces."""

    tokens: list[int]
    weights: Floats
    """Of each step over the patches, [T, 16]."""


async def look(client: aio.Client, data: Any, image: Floats) -> Looked:
    """Spells one image; every step is asked where it looked. ``data`` is the model's module."""
    tokens: list[int] = []
    weights: list[Floats] = []
    token = data.VOCABULARY.index(data.LOOK)
    async with client.session("spell", memory=data.memories(image[None])[0]) as session:
        while len(tokens) < data.STEPS_MAX and token != data.VOCABULARY.index(data.END):
            row, trace = await session.step_with_trace(token, mode="full")
            assert trace.attention is not None
            token = int(row.argmax())
            tokens.append(token)
            weights.append(trace.attention[0])
    return Looked(tokens, np.stack(weights))


async def words(client: aio.Client, data: Any, images: Floats) -> tuple[list[str], float]:
    """Spells images with `Generate`, a session each.

    Returns:
        The words, and the seconds it took.
    """
    memories = data.memories(images)
    began = time.perf_counter()
    found: list[str] = []
    for start in range(0, len(memories), AT_ONCE):
        some = memories[start : start + AT_ONCE]
        found += await asyncio.gather(*(_word(client, data, memory) for memory in some))
    return found, time.perf_counter() - began


def drawing(data: Any, image: Floats, looked: Looked) -> str:
    """The image and where each step looked, without the step that ended the word."""
    written = looked.tokens[:-1]
    return data.drawing(image, written, looked.weights[: len(written)])


def right(data: Any, shown: Sequence[int], found: Sequence[str]) -> int:
    """How many of the words name the digit."""
    return sum(data.NAMES[d] == word for d, word in zip(shown, found, strict=True))


async def _word(client: aio.Client, data: Any, memory: Floats) -> str:
    async with client.session("spell", memory=memory) as session:
        start, end = data.VOCABULARY.index(data.LOOK), data.VOCABULARY.index(data.END)
        written = session.generate(
            [start], steps_max=data.STEPS_MAX, temperature=0, stop_tokens=[end]
        )
        async with written:
            return data.word([int(token) async for token in written])
