"""When a heart beats, forty milliseconds a step. Numpy, scipy and the file of heartpy only.

The recording comes with the package `heartpy` and is read from its file: eleven minutes of the
blood pulse at a finger, 100 samples a second. It is real; the beats are found in it here, as the
peaks of the pulse, and each step says whether there was one.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.signal import butter, find_peaks, sosfiltfilt

FEATURES = ("beat",)
"""1 where a beat came within the step, else 0."""
TARGETS = ("beat_next",)
STEP_SECONDS = 0.04
SAMPLES_A_SECOND = 100
BAND_HZ = (0.7, 5.0)
"""Of the pulse: what is slower is the hand that moves, what is faster is noise."""
APART_SECONDS_MIN = 0.4
PROMINENCE = 0.8
"""Of a peak, in standard deviations of the signal."""
VALIDATION_SHARE = 0.65
HELD_OUT_SHARE = 0.8
"""From this part of the recording on nothing is trained on, and nothing is chosen by it."""

Floats = npt.NDArray[np.float32]


def beat_seconds() -> npt.NDArray[np.float64]:
    """When the beats were, in seconds from the start of the recording."""
    found = importlib.util.find_spec("heartpy")  # found and not imported: it would bring plots
    assert found is not None
    assert found.origin is not None
    table = pd.read_csv(Path(found.origin).parent / "data" / "data3.csv")
    stamps = pd.to_datetime(table["datetime"], format="ISO8601")
    seconds = (stamps - stamps.iloc[0]).dt.total_seconds().to_numpy()
    times = np.arange(0, seconds[-1], 1 / SAMPLES_A_SECOND)
    level = np.interp(times, seconds, table["hr"].to_numpy(dtype=np.float64))
    band = butter(2, BAND_HZ, "bandpass", fs=SAMPLES_A_SECOND, output="sos")
    pulse = sosfiltfilt(band, level)
    apart = int(APART_SECONDS_MIN * SAMPLES_A_SECOND)
    peaks, _ = find_peaks(pulse, distance=apart, prominence=PROMINENCE * pulse.std())
    return times[peaks]


def series() -> Floats:
    """Whether there was a beat, 1 or 0, in each step of the recording: [T, 1]."""
    steps = (beat_seconds() / STEP_SECONDS).astype(int)
    beats = np.zeros((steps[-1] + 1, 1), dtype=np.float32)
    beats[steps] = 1
    return beats
