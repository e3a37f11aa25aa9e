"""Every metric, declared once. Session ids and principals are never labels.

The scheduler and the streams count thousands of times a second, all on one thread.
`prometheus_client` takes a lock and walks the buckets for every observation, about 1.5 us; the
two small classes here take a tenth of that, and `prometheus_client` still does the exposition.
"""

import bisect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from conveyor_server.errors import reasons

SECONDS_BUCKETS: Final = (
    0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05,
    0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0,
)  # fmt: skip
COUNT_BUCKETS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)

Labels = tuple[str, ...]


class Counter:
    """A number for each combination of labels that only grows."""

    def __init__(self, name: str, help_text: str, labels: Labels = ()) -> None:
        """`name` without the suffix `_total`."""
        self.name, self._help, self._labels = name, help_text, labels
        self.values: dict[Labels, float] = {} if labels else {(): 0}

    def add(self, amount: float = 1, *labels: str) -> None:
        """Adds to one combination."""
        self.values[labels] = self.values.get(labels, 0) + amount

    def total(self) -> float:
        """Over all combinations."""
        return sum(self.values.values())

    def collect(self) -> Metric:
        """For the exposition."""
        family = CounterMetricFamily(self.name, self._help, labels=self._labels)
        for labels, value in list(self.values.items()):
            family.add_metric(labels, value)
        return family


class Histogram:
    """Observations in buckets, for each combination of labels."""

    def __init__(
        self, name: str, help_text: str, buckets: Sequence[float], labels: Labels = ()
    ) -> None:
        """`buckets`: upper bounds, rising; infinity is added."""
        self.name, self._help, self._labels = name, help_text, labels
        self._bounds = list(buckets)
        self._counts: dict[Labels, list[int]] = {}
        self._sums: dict[Labels, float] = {}

    def observe(self, value: float, *labels: str) -> None:
        """Counts one observation."""
        counts = self._counts.get(labels)
        if counts is None:
            # The sum first: whoever scrapes meanwhile, on another thread, goes by the counts.
            self._sums[labels] = 0.0
            counts = self._counts[labels] = [0] * (len(self._bounds) + 1)
        counts[bisect.bisect_left(self._bounds, value)] += 1
        self._sums[labels] += value

    def collect(self) -> Metric:
        """For the exposition."""
        family = HistogramMetricFamily(self.name, self._help, labels=self._labels)
        names = [*(repr(float(bound)) for bound in self._bounds), "+Inf"]
        for labels, counts in list(self._counts.items()):
            cumulative, buckets = 0, list[tuple[str, float]]()
            for name, count in zip(names, counts, strict=True):
                cumulative += count
                buckets.append((name, cumulative))
            family.add_metric(labels, buckets, self._sums[labels])
        return family


GaugeReader = Callable[[], Iterable[tuple[Labels, float]]]


class Metrics(Collector):
    """All metrics of one server, on a registry of its own."""

    def __init__(self) -> None:
        """Registers everything."""
        self._declare_calls()
        self._declare_steps()
        self._declare_sessions()
        self._gauges: list[tuple[str, str, Labels, GaugeReader]] = []
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self.registry.register(self)

    def _declare_calls(self) -> None:
        method = ("grpc_type", "grpc_service", "grpc_method")
        self.grpc_started = Counter("grpc_server_started", "RPCs begun.", method)
        self.grpc_handled = Counter("grpc_server_handled", "RPCs ended.", (*method, "grpc_code"))
        self.grpc_received = Counter("grpc_server_msg_received", "Messages received.", method)
        self.grpc_sent = Counter("grpc_server_msg_sent", "Messages sent.", method)
        self.grpc_seconds = Histogram(
            "grpc_server_handling_seconds",
            "Time from an RPC's begin to its end.",
            SECONDS_BUCKETS,
            method,
        )
        self.rejected = Counter(
            "conveyor_rejected", "Calls, frames and chunks refused.", ("reason",)
        )
        self.log_lines_dropped = Counter(
            "conveyor_log_lines_dropped", "Log lines that standard error did not take."
        )
        self.descriptors_exhausted = Counter(
            "conveyor_descriptors_exhausted",
            "Looks, one a second, that found no file descriptor left.",
        )
        # From 0 on: to Prometheus a series that begins with 1 has not grown.
        for reason in reasons():
            self.rejected.add(0, reason)

    def _declare_steps(self) -> None:
        def seconds(name: str, help_text: str) -> Histogram:
            return Histogram(name, help_text, SECONDS_BUCKETS, model)

        def count(name: str, help_text: str) -> Histogram:
            return Histogram(name, help_text, COUNT_BUCKETS, model)

        model = ("model",)
        self.steps = Counter("conveyor_steps", "Steps applied.", model)
        self.duplicates = Counter(
            "conveyor_duplicate_steps",
            "Steps answered from memory instead of run again.",
            model,
        )
        self.step_seconds = seconds(
            "conveyor_step_seconds", "Time from a chunk's arrival to its last result."
        )
        self.queue_seconds = seconds(
            "conveyor_queue_seconds", "Time from a chunk's arrival to its first tick."
        )
        self.tick_seconds = seconds("conveyor_tick_seconds", "Time of the engine call of a tick.")
        self.tick_sessions = count("conveyor_tick_sessions", "Sessions in a tick.")
        self.tick_steps = count("conveyor_tick_steps", "Steps in a tick.")

    def _declare_sessions(self) -> None:
        model = ("model",)
        self.sessions_ended = Counter("conveyor_sessions_ended", "Sessions ended.", ("reason",))
        for reason in ("closed", "evicted", "expired"):
            self.sessions_ended.add(0, reason)
        self.resumes = Counter("conveyor_resumes", "Opens of existing sessions.", ("outcome",))
        self.page_ins = Counter("conveyor_page_ins", "Carries brought back to a device.", model)
        self.page_outs = Counter("conveyor_page_outs", "Carries moved off a device.", model)

    def gauge(self, name: str, help_text: str, labels: Labels, read: GaugeReader) -> None:
        """Declares a gauge that is read when it is scraped, on the scraper's thread."""
        self._gauges.append((name, help_text, labels, read))

    def collect(self) -> Iterator[Metric]:
        """Called at every scrape."""
        for metric in vars(self).values():
            if isinstance(metric, Counter | Histogram):
                yield metric.collect()
        for name, help_text, labels, read in self._gauges:
            family = GaugeMetricFamily(name, help_text, labels=labels)
            for values, number in read():
                family.add_metric(values, number)
            yield family

    def describe(self) -> Iterable[Metric]:
        """Names only; the registry checks them for clashes without reading the gauges."""
        return []
