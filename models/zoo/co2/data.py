"""Carbon dioxide in the air of Mauna Loa, a week a step. Numpy and pandas only.

The series comes with the package `statsmodels` and is read from its file: a value a week from 1958
to 2001, in parts per million. One row is one week.
"""

from __future__ import annotations

from importlib.resources import files

import numpy as np
import numpy.typing as npt
import pandas as pd

FEATURES = ("change_1", "change_4", "change_52", "year_sin", "year_cos")
"""By how many ppm it has changed since 1, 4 and (less 1.5) 52 weeks; the week as an angle."""
HORIZONS_WEEKS = (4, 13)
TARGETS = tuple(f"change_in_{weeks}_weeks" for weeks in HORIZONS_WEEKS)
"""By how many ppm it is going to change."""
USUAL_RISE = 1.5
"""Roughly what a year adds."""
VALIDATION_YEAR = 1985
HELD_OUT_YEAR = 1992
"""From here on nothing is trained on, and nothing is chosen by it."""

Floats = npt.NDArray[np.float32]


def series() -> tuple[Floats, Floats, npt.NDArray[np.int64]]:
    """Features [T, 5], targets [T, 2] and years [T] of the weeks from the second year on.

    The 59 weeks that were not measured are filled in on a straight line. Targets are NaN where the
    series ends before.
    """
    table = pd.read_csv(str(files("statsmodels") / "datasets" / "co2" / "co2.csv"))
    ppm = table["co2"].interpolate().to_numpy(dtype=np.float64)
    days = pd.DatetimeIndex(pd.to_datetime(table["date"].astype(str), format="%Y%m%d"))
    turns = 2 * np.pi * days.day_of_year.to_numpy() / 365.25
    columns = [
        *(ppm - np.roll(ppm, weeks) for weeks in (1, 4)),
        ppm - np.roll(ppm, 52) - USUAL_RISE,
        np.sin(turns),
        np.cos(turns),
    ]
    targets = np.full((len(ppm), len(HORIZONS_WEEKS)), np.nan)
    for column, weeks in enumerate(HORIZONS_WEEKS):
        targets[:-weeks, column] = ppm[weeks:] - ppm[:-weeks]
    whole = slice(52, None)
    return (
        np.stack(columns, axis=1)[whole].astype(np.float32),
        targets[whole].astype(np.float32),
        days.year.to_numpy(dtype=np.int64, copy=True)[whole],
    )
