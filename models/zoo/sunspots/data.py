"""Sunspot numbers, a year a step. Numpy and pandas only.

The series comes with the package `statsmodels` and is read from its file: the mean sunspot number
of each year from 1700 to 2008. One row is one year.
"""

from __future__ import annotations

from importlib.resources import files

import numpy as np
import numpy.typing as npt
import pandas as pd

FEATURES = ("sunspots_100",)
"""Hundreds of sunspots, the mean of a year."""
TARGETS = ("sunspots_100_next_year",)
VALIDATION_YEAR = 1900
HELD_OUT_YEAR = 1940
"""From here on nothing is trained on, and nothing is chosen by it."""
SCALE = 100.0

Floats = npt.NDArray[np.float32]


def series() -> tuple[Floats, Floats, npt.NDArray[np.int64]]:
    """Features [T, 1], targets [T, 1] and years [T] of the feature; each but the last year."""
    table = pd.read_csv(str(files("statsmodels") / "datasets" / "sunspots" / "sunspots.csv"))
    numbers = (table["SUNACTIVITY"].to_numpy() / SCALE).astype(np.float32)[:, None]
    return numbers[:-1], numbers[1:], table["YEAR"].to_numpy(dtype=np.int64, copy=True)[:-1]
