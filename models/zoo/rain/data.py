"""The weather of Seattle, a day a step. Numpy and pandas only.

The series comes with the package `vega_datasets` and is read from its file: what was measured on
each day from 2012 to 2015. One row is one day.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pandas as pd
from vega_datasets import local_data

FEATURES = ("rain", "warmest", "coldest", "wind", "year_sin", "year_cos")
"""ln(1 + mm), then degrees Celsius over 10 (both), metres a second over 3, and the day of the year
as an angle."""
TARGETS = ("rain_tomorrow",)
VALIDATION_YEAR = 2014
HELD_OUT_YEAR = 2015
"""From here on nothing is trained on, and nothing is chosen by it."""

Floats = npt.NDArray[np.float32]


def series() -> tuple[Floats, Floats, npt.NDArray[np.int64]]:
    """Features [T, 6]; whether it rained the day after [T, 1], 0 or 1; and years [T].

    The last day is left out, as nothing follows it.
    """
    table = local_data.seattle_weather()
    rain = table["precipitation"].to_numpy()
    days = pd.DatetimeIndex(table["date"])
    turns = 2 * np.pi * days.day_of_year.to_numpy() / 365.25
    columns = [
        np.log1p(rain),
        table["temp_max"].to_numpy() / 10,
        table["temp_min"].to_numpy() / 10,
        table["wind"].to_numpy() / 3,
        np.sin(turns),
        np.cos(turns),
    ]
    features = np.stack(columns, axis=1).astype(np.float32)
    wet = (rain > 0).astype(np.float32)[:, None]
    return features[:-1], wet[1:], days.year.to_numpy(dtype=np.int64, copy=True)[:-1]
