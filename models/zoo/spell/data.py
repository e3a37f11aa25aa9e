"""Scanned digits cut into patches, and the names to spell. Numpy and scikit-learn only.

The images come with the package scikit-learn, which reads them from its own files: 1,797 digits of
8 by 8 pixels, from forms that 43 people filled in. They stand in the order of the forms, so the
last ones are mostly by people who wrote none of the first; the split below keeps that order.

Letters for dims: N images, M = 16 patches, A = 32 numbers that describe one, T steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from sklearn.datasets import load_digits

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LOOK = "·"
"""The start token; the network also writes it while it looks and has no letter yet."""
END = "."
VOCABULARY = (LOOK, END, *sorted(set("".join(NAMES))))
LOOKS = 4
"""How often it looks before the step that writes the first letter."""
STEPS_MAX = LOOKS + max(map(len, NAMES)) + 1
"""Steps that the longest name takes, with looks and end."""

SIDE = 8
"""Pixels along an edge of an image."""
GRID = 4
"""Patches along an edge, each of 2 by 2 pixels and seen with a border of one pixel."""
CELL = SIDE // GRID
PATCH = CELL + 2
PATCHES = GRID * GRID
FEATURES = PATCH * PATCH + PATCHES
"""Numbers in a row of memory: 16 pixels, and which of the 16 patches it is."""
LEVEL_MAX = 16.0

TRAINING = slice(0, 1_257)
VALIDATION = slice(1_257, 1_437)
"""By these settings are compared."""
HELD_OUT = slice(1_437, 1_797)
"""The last fifth: never trained on, and nothing is chosen by it."""

SHADES = " ░▒▓█"

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]


def digits(rows: slice) -> tuple[Floats, Integers]:
    """Some of the images [N, 8, 8], from 0 (paper) to 1 (ink), and what they show [N]."""
    table = load_digits()
    images = np.asarray(table.images[rows], dtype=np.float32) / LEVEL_MAX
    return images, np.asarray(table.target[rows], dtype=np.int64)


def memories(images: Floats) -> Floats:
    """What a session is opened with: the patches of each image, [N, 16, 32].

    A row holds the 4 by 4 pixels around its patch, line by line, then 16 numbers of which the one
    of its place (line by line as well) is 1.
    """
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (PATCH, PATCH), axis=(1, 2))
    pixels = windows[:, ::CELL, ::CELL].reshape(len(images), PATCHES, PATCH * PATCH)
    places = np.broadcast_to(np.eye(PATCHES), (len(images), PATCHES, PATCHES))
    return np.concatenate((pixels, places), axis=-1, dtype=np.float32)


def spelling(digit: int) -> list[int]:
    """The tokens that the network is to write: looks, letters, end."""
    return [VOCABULARY.index(each) for each in LOOK * LOOKS + NAMES[digit] + END]


def word(tokens: Sequence[int]) -> str:
    """What was written: the letters before the end, without the looks in front."""
    text = "".join(VOCABULARY[token] for token in tokens)
    return text.partition(END)[0].lstrip(LOOK)


def drawing(image: Floats, tokens: Sequence[int], looked: Floats) -> str:
    """An image, and beside it where each step looked, as lines of text.

    Args:
        image: [8, 8], from 0 to 1.
        tokens: what the steps wrote, T at most `STEPS_MAX`.
        looked: the weights of these steps over the patches, [T, 16].
    """
    lines = ["", *_shaded(image, width=2)]
    for band in (slice(0, LOOKS), slice(LOOKS, len(tokens))):
        grids = [
            [VOCABULARY[token].center(2 * GRID), *_shaded(weights.reshape(GRID, GRID), width=2)]
            for token, weights in zip(tokens[band], looked[band], strict=True)
        ]
        first = 0 if band.start == 0 else GRID + 1
        for number in range(GRID + 1):
            if first + number == len(lines):
                lines.append("")
            beside = "   ".join(grid[number] for grid in grids)
            lines[first + number] = f"{lines[first + number]:<{2 * SIDE + 3}}{beside}"
    return "\n".join(line.rstrip() for line in lines)


def _shaded(values: Floats, width: int) -> list[str]:
    levels = (values * len(SHADES)).astype(int).clip(0, len(SHADES) - 1)
    return ["".join(SHADES[level] * width for level in row) for row in levels]
