"""What was measured, and what follows from it."""

import math
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, Literal


@dataclass(slots=True)
class Measured:
    """One round of one contender. CPU shares are of one core: 1.0 is one of them all the time."""

    value: float
    """Steps per second: of time that passed, or of processor time where nothing is waited for."""
    p50_ms: float = math.nan
    p99_ms: float = math.nan
    step_cpu_us: float | None = None
    """Processor time for each step: the server's, or the engine's."""
    server_cpu: float | None = None
    generator_cpu: float | None = None
    others_cpu: float | None = None
    """Everything else that ran on the machine."""
    mean_batch: float | None = None
    """Sessions in a tick."""


@dataclass(frozen=True, slots=True)
class Target:
    """What a ratio to the comparator is to be."""

    figure: Literal["steps/s", "p50"]
    bound: Literal["at least", "at most"]
    ratio: float


@dataclass(slots=True)
class Line:
    """A subject beside one comparator, both measured in turns."""

    name: str
    subject: str
    comparator: str
    subject_rounds: list[Measured]
    comparator_rounds: list[Measured]
    targets: tuple[Target, ...] = field(default=())

    @property
    def ratio(self) -> float:
        """Of the values: the median of the ratios of neighbouring rounds."""
        return self._ratio("value")

    @property
    def p50_ratio(self) -> float:
        """Of the median latencies, likewise."""
        return self._ratio("p50_ms")

    def reached(self, target: Target) -> bool:
        """Whether a target is met."""
        ratio = self.ratio if target.figure == "steps/s" else self.p50_ratio
        return ratio >= target.ratio if target.bound == "at least" else ratio <= target.ratio

    def to_json(self) -> dict[str, Any]:
        """Everything, rounds included."""
        raw: dict[str, Any] = asdict(self) | {"ratio": self.ratio, "p50_ratio": self.p50_ratio}
        for target, plain in zip(self.targets, raw["targets"], strict=True):
            plain["reached"] = self.reached(target)
        return _without_nan(raw)

    def _ratio(self, figure: str) -> float:
        pairs = zip(self.subject_rounds, self.comparator_rounds, strict=True)
        return median(getattr(ours, figure) / getattr(theirs, figure) for ours, theirs in pairs)


def middle(rounds: list[Measured], figure: str) -> float | None:
    """The median of one figure over the rounds; None if it was not measured."""
    values = [value for each in rounds if (value := getattr(each, figure)) is not None]
    return median(values) if values else None


def _without_nan(value: Any) -> Any:
    match value:
        case dict():
            return {key: _without_nan(item) for key, item in value.items()}
        case list() | tuple():
            return [_without_nan(item) for item in value]
        case float() if math.isnan(value):
            return None
        case _:
            return value
