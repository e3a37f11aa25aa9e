"""What the values of each gate mean: its full name, and from where to where it goes."""

from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from conveyor_client._nouns import FloatArray

LONG_NAMES = MappingProxyType(
    {
        "i": "input",
        "f": "forget",
        "g": "candidate",
        "o": "output",
        "r": "reset",
        "z": "update",
        "n": "candidate",
        "c": "cell",
        "h": "hidden",
    }
)
_SHARES = frozenset("iforz")


@dataclass(frozen=True, slots=True)
class Scale:
    """From where to where a gate's values go.

    Attributes:
        low: The lower end.
        high: The upper end; above `low`.
        diverging: Whether 0 lies in the middle and means nothing.
    """

    low: float
    high: float
    diverging: bool

    def place(self, values: FloatArray) -> FloatArray:
        """Where values lie between the ends: 0 to 1, NaN where there is none."""
        placed = (values - np.float32(self.low)) / np.float32(self.high - self.low)
        return np.clip(placed, 0.0, 1.0, dtype=np.float32)


def is_share(gate: str) -> bool:
    """Whether a gate lets through a share, from 0 to 1, so that the ends mean shut and open."""
    return gate in _SHARES


def scale_of(gate: str, minimum: FloatArray, maximum: FloatArray) -> Scale:
    """Finds the scale of a gate: 0 to 1, or as far on both sides of 0 as its values go.

    Args:
        gate: Its name.
        minimum: The least values, of any shape; NaN where there is none.
        maximum: The greatest.
    """
    if is_share(gate):
        return Scale(0.0, 1.0, diverging=False)
    ends = np.abs(np.concatenate([minimum.ravel(), maximum.ravel()]))
    far = float(np.max(ends[np.isfinite(ends)], initial=0.0))
    # What a cell keeps has no bound, so it fills the scale; the others go from -1 to 1.
    far = far or 1.0 if gate == "c" else max(far, 1.0)
    return Scale(-far, far, diverging=True)
