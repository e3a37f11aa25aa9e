"""Hourly temperatures of Seattle and San Francisco, as features and targets. Numpy and pandas only.

The series come with the package `vega_datasets` and are read from its files. They cover the
year 2010, but are as smooth as climate normals are: each hour close to the same hour of the day
before, without any weather. One row is one hour of one station; all temperatures are in degrees
Fahrenheit, given to a tenth.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
from vega_datasets import local_data

FEATURES = ("temperature_f", "day_sin", "day_cos", "half_day_sin", "half_day_cos")
"""The temperature of this hour, and where the hour stands in the day."""
HORIZONS_HOURS = (1, 6, 24)
TARGETS = tuple(f"temperature_f_in_{hours}_h" for hours in HORIZONS_HOURS)
HELD_OUT_HOURS = 6 * 7 * 24
"""The last six weeks of the year are never trained on, neither as feature nor as target."""
STATIONS = ("seattle", "san_francisco")

Floats = npt.NDArray[np.float32]
Hours = npt.NDArray[np.datetime64]


@dataclass(frozen=True, slots=True)
class Series:
    """Consecutive hours of one station."""

    station: str
    features: Floats
    """[T, 5], columns as in `FEATURES`."""
    targets: Floats
    """[T, 3], columns as in `TARGETS`; NaN where the series ends before."""
    timestamps: Hours
    """[T], local time."""

    def __getitem__(self, rows: slice) -> Series:
        """Some of the rows."""
        return Series(self.station, self.features[rows], self.targets[rows], self.timestamps[rows])


def whole_year(station: str) -> Series:
    """All hours of 2010 at one of `STATIONS`.

    The one hour the series leave out, where clocks go forward in March, is put back as the mean of
    its neighbours.
    """
    table = local_data.seattle_temps() if station == "seattle" else local_data.sf_temps()
    by_hour = pd.Series(table["temp"].to_numpy(), index=pd.DatetimeIndex(table["date"]))
    by_hour = by_hour.asfreq("h").interpolate()
    temperatures = by_hour.to_numpy(dtype=np.float64)
    turns = 2 * np.pi * by_hour.index.hour.to_numpy() / 24
    columns = [temperatures, np.sin(turns), np.cos(turns), np.sin(2 * turns), np.cos(2 * turns)]
    targets = np.full((len(temperatures), len(HORIZONS_HOURS)), np.nan)
    for column, hours in enumerate(HORIZONS_HOURS):
        targets[:-hours, column] = temperatures[hours:]
    return Series(
        station,
        np.stack(columns, axis=1).astype(np.float32),
        targets.astype(np.float32),
        by_hour.index.to_numpy(),
    )


def training(station: str) -> Series:
    """The hours before the held-out ones, without the targets that would reach into them."""
    series = whole_year(station)[:-HELD_OUT_HOURS]
    for column, hours in enumerate(HORIZONS_HOURS):
        series.targets[-hours:, column] = np.nan
    return series


def held_out(station: str = "seattle") -> tuple[Floats, Floats, Hours]:
    """The last six weeks of the year at one station.

    Returns:
        Features [T, 5] in raw units, ready to send; targets [T, 3], NaN for hours after the year's
        end; and timestamps [T].
    """
    series = whole_year(station)[-HELD_OUT_HOURS:]
    return series.features, series.targets, series.timestamps


def windows(count: int, steps: int) -> list[Series]:
    """Different held-out stretches, one for each of many sessions.

    They alternate between the stations and begin at hours spread evenly over the held-out weeks, so
    that every target exists. A network that begins with an empty carry wants about a day before its
    forecasts count.

    Args:
        count: how many.
        steps: hours in each.

    Raises:
        ValueError: there are not so many that differ.
    """
    last = HELD_OUT_HOURS - max(HORIZONS_HOURS) - steps
    each = -(-count // len(STATIONS))
    if count < 1 or steps < 1 or each > last + 1:
        raise ValueError(f"cannot cut {count} different windows of {steps} hours")
    stations = [whole_year(station)[-HELD_OUT_HOURS:] for station in STATIONS]
    starts = [round(index * last / max(each - 1, 1)) for index in range(each)]
    found = [series[start : start + steps] for start in starts for series in stations]
    return found[:count]


def persistence(features: Floats) -> Floats:
    """The forecast that nothing changes: [T, 3]."""
    return np.repeat(features[:, :1], len(HORIZONS_HOURS), axis=1)


def same_hour_yesterday(features: Floats) -> Floats:
    """The forecast that each hour is as warm as the same hour the day before: [T, 3].

    NaN where the rows do not reach back far enough, which is within the first day.
    """
    temperatures = features[:, 0]
    forecast = np.full((len(temperatures), len(HORIZONS_HOURS)), np.nan, dtype=np.float32)
    for column, hours in enumerate(HORIZONS_HOURS):
        back = 24 - hours  # the hour forecast, a day before it
        forecast[back:, column] = temperatures[: len(temperatures) - back]
    return forecast
