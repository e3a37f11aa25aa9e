"""ModelStatistics: what came through this protocol, counted for each version of a model."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from conveyor.oip import inference_pb2
from conveyor_server.clock import Clock
from conveyor_server.core import ModelInfo, ModelKey
from conveyor_server.rpc.oip.underway import Request

TALLIES_MAX: Final = 1024
"""Versions of models that are counted; beyond it the one counted longest is forgotten."""


@dataclass(slots=True)
class _Span:
    """How often something took place, and how long it took in all."""

    count: int = 0
    seconds: float = 0.0

    def add(self, seconds: float) -> None:
        self.count += 1
        self.seconds += seconds

    def message(self) -> inference_pb2.StatisticDuration:
        return inference_pb2.StatisticDuration(count=self.count, ns=round(self.seconds * 1e9))


@dataclass(slots=True)
class _Tally:
    """Of one version."""

    success: _Span = field(default_factory=_Span)
    fail: _Span = field(default_factory=_Span)
    queue: _Span = field(default_factory=_Span)
    read: _Span = field(default_factory=_Span)
    run: _Span = field(default_factory=_Span)
    answer: _Span = field(default_factory=_Span)
    executions: int = 0
    last_begun: float = 0.0
    last_wall: float = 0.0


class Statistics:
    """Counts answered requests; read by ModelStatistics alone."""

    def __init__(self, clock: Clock) -> None:
        """Nothing is counted yet."""
        self._clock = clock
        self._tallies: dict[ModelKey, _Tally] = {}

    def count(self, request: Request, ready_seconds: float) -> None:
        """Counts a request that is about to be answered.

        Args:
            request: It; one that failed before it had a model is nobody's.
            ready_seconds: Monotonic time at which its answer began to be made.
        """
        if request.model is None:
            return
        tally = self._tallies.get(request.model.key)
        if tally is None:
            tally = self._tallies[request.model.key] = _Tally()
            if len(self._tallies) > TALLIES_MAX:  # nobody asked for them for that long
                del self._tallies[next(iter(self._tallies))]
        now = self._clock.monotonic()
        if request.error is not None:
            tally.fail.add(now - request.received_seconds)
            return
        begun = request.begun_seconds or request.submitted_seconds
        tally.success.add(now - request.received_seconds)
        tally.read.add(request.submitted_seconds - request.received_seconds)
        tally.queue.add(begun - request.submitted_seconds)
        tally.run.add(ready_seconds - begun)
        tally.answer.add(now - ready_seconds)
        if begun != tally.last_begun:  # those of one tick began at one time
            tally.last_begun = begun
            tally.executions += 1
        tally.last_wall = now

    def message(self, models: Iterable[ModelInfo]) -> inference_pb2.ModelStatisticsResponse:
        """Describes what was counted of some versions."""
        wall = self._clock.wall() - self._clock.monotonic()
        return inference_pb2.ModelStatisticsResponse(
            model_stats=[
                _statistics(model.key, self._tallies.get(model.key, _Tally()), wall)
                for model in models
            ]
        )

    def keep(self, models: Iterable[ModelInfo]) -> None:
        """Forgets all versions but these, which are those in service."""
        served = {model.key for model in models}
        self._tallies = {key: each for key, each in self._tallies.items() if key in served}


def _statistics(key: ModelKey, tally: _Tally, wall: float) -> inference_pb2.ModelStatistics:
    last = wall + tally.last_wall if tally.success.count else 0.0
    found = inference_pb2.ModelStatistics(
        name=key.name,
        version=str(key.version),
        last_inference=round(last * 1e3),
        inference_count=tally.success.count,
        execution_count=tally.executions,
        inference_stats=inference_pb2.InferStatistics(
            success=tally.success.message(),
            fail=tally.fail.message(),
            queue=tally.queue.message(),
            compute_input=tally.read.message(),
            compute_infer=tally.run.message(),
            compute_output=tally.answer.message(),
            cache_hit=inference_pb2.StatisticDuration(),
            cache_miss=inference_pb2.StatisticDuration(),
        ),
    )
    if tally.success.count:
        found.batch_stats.add(
            batch_size=1,
            compute_input=tally.read.message(),
            compute_infer=tally.run.message(),
            compute_output=tally.answer.message(),
        )
    return found
