"""A task made for precise timing, after Gers and Schmidhuber (2000). Numpy only.

One number comes in per step: 1 starts the timer, else 0. Exactly `DELAY_STEPS` later the timer is
due, and at no other step. Then it rests, for how long is drawn at random, until it is started
again. What is learned from, compared by and held out are other draws; the last two go on for eight
times as long.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt

FEATURES = ("start",)
TARGETS = ("due",)
DELAY_STEPS = 40
REST_STEPS = (3, 20)
"""Fewest and most steps from due to the next start."""
LONGER_REST_STEPS = (3, 40)
TOLERANCE_STEPS = 1
FIRED = 0.5
"""The timer counts as fired in a step whose output is above this."""
VALIDATION_SEED = 1_001
HELD_OUT_SEED = 1_002
COMPARED_STEPS = 1_000
COMPARED_STREAMS = 16

Floats = npt.NDArray[np.float32]


def streams(
    random: np.random.Generator, steps: int, count: int, rest: tuple[int, int]
) -> tuple[Floats, Floats]:
    """Starts and what is due, each [T, B]: `count` streams, independent of each other."""
    starts = np.zeros((steps, count), dtype=np.float32)
    due = np.zeros_like(starts)
    for stream in range(count):
        at = int(random.integers(1, rest[1] + 1))
        while at < steps:
            starts[at, stream] = 1
            if at + DELAY_STEPS < steps:
                due[at + DELAY_STEPS, stream] = 1
            at += DELAY_STEPS + int(random.integers(rest[0], rest[1] + 1))
    return starts, due


def validation() -> tuple[Floats, Floats]:
    """Starts and what is due, each [T, B], to compare networks by."""
    random = np.random.default_rng(VALIDATION_SEED)
    return streams(random, COMPARED_STEPS, COMPARED_STREAMS, REST_STEPS)


def held_out() -> tuple[Floats, Floats]:
    """Starts and what is due, each [T, B]; nothing is trained on it and nothing chosen by it."""
    random = np.random.default_rng(HELD_OUT_SEED)
    return streams(random, COMPARED_STEPS, COMPARED_STREAMS, REST_STEPS)


def longer_rests() -> tuple[Floats, Floats]:
    """As `held_out`, but with rests of which many are longer than any learned from."""
    random = np.random.default_rng(HELD_OUT_SEED)
    return streams(random, COMPARED_STEPS, COMPARED_STREAMS, LONGER_REST_STEPS)


def share_right(output: npt.NDArray[np.floating], starts: Floats) -> float:
    """The share of intervals that were timed right.

    An interval goes from a start to the step before the next one. It is right if the output fires
    when the timer is due, give or take `TOLERANCE_STEPS`, and at no other step of the interval.

    Args:
        output: [T, B].
        starts: [T, B]; the last interval of each stream is cut off by its end and not scored.
    """
    fired = output > FIRED
    right = []
    for stream in range(starts.shape[1]):
        begun = np.flatnonzero(starts[:, stream])
        for start, end in pairwise(begun):
            when = np.flatnonzero(fired[start:end, stream]) - DELAY_STEPS
            right.append(len(when) > 0 and bool((abs(when) <= TOLERANCE_STEPS).all()))
    return float(np.mean(right))


def loudest_wait(output: npt.NDArray[np.floating], starts: Floats) -> float:
    """The furthest from 0 that an output, [T, B], is from a start until it may soon fire.

    The last two steps before the timer may fire, and all intervals that `share_right` does not
    score, are left out.
    """
    quiet_steps = DELAY_STEPS - TOLERANCE_STEPS - 2
    waits = [
        abs(output[start : start + quiet_steps, stream]).max()
        for stream in range(starts.shape[1])
        for start in np.flatnonzero(starts[:, stream])[:-1]
    ]
    return float(max(waits))
