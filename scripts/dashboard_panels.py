"""What is on Grafana's dashboards; `dashboards.py` writes it down as Grafana reads it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

I: Final = 'instance=~"$instance"'  # noqa: E741  short, for it stands in every query
M: Final = f'{I}, model=~"$model"'
RATE: Final = "[$__rate_interval]"


@dataclass(frozen=True)
class Panel:
    """One picture: queries as (PromQL, legend)."""

    title: str
    about: str
    unit: str
    queries: Sequence[tuple[str, str]]
    kind: str = "timeseries"
    columns: int = 8
    rows: int = 8
    stacked: bool = False


@dataclass(frozen=True)
class Row:
    """A title above panels, which fill lines from left to right."""

    title: str
    panels: Sequence[Panel]


@dataclass(frozen=True)
class Dashboard:
    """One file."""

    uid: str
    title: str
    about: str
    rows: Sequence[Row]


def stat(title: str, about: str, unit: str, query: str) -> Panel:
    """One number."""
    return Panel(title, about, unit, [(query, "")], "stat", columns=4, rows=4)


def quantiles(metric: str, labels: str, by: str) -> list[tuple[str, str]]:
    """Half of the observations, and all but one in a hundred, are below these."""
    return [
        (
            f"histogram_quantile({share}, sum by ({by}, le) "
            f"(rate({metric}_bucket{{{labels}}}{RATE})))",
            f"{{{{{by}}}}} {name}",
        )
        for share, name in ((0.5, "p50"), (0.99, "p99"))
    ]


def mean(metric: str) -> list[tuple[str, str]]:
    """Of a histogram, by model."""
    total, count = (
        f"sum by (model) (rate({metric}_{part}{{{M}}}{RATE}))" for part in ("sum", "count")
    )
    return [(f"{total} / {count}", "{{model}}")]


def rate(metric: str, labels: str, by: str) -> list[tuple[str, str]]:
    """Of a counter, a second."""
    return [(f"sum by ({by}) (rate({metric}{{{labels}}}{RATE}))", f"{{{{{by}}}}}")]


def limit(setting: str) -> tuple[str, str]:
    """A setting of the server, for a picture of what it bounds."""
    query = f'max by (instance) (conveyor_limit{{{I}, setting="{setting}"}})'
    return query, f"{{{{instance}}}} limits.{setting}"


OVERVIEW: Final = Dashboard(
    "conveyor-overview",
    "Conveyor: overview",
    "Is it well, is it fast, what do callers get.",
    [
        Row(
            "Now",
            [
                stat("Servers", "That answer their scrapes.", "none", 'sum(up{job="conveyor"})'),
                stat("Sessions", "Open ones.", "none", f"sum(conveyor_sessions{{{I}}})"),
                stat("Streams", "StreamSteps calls.", "none", f"sum(conveyor_streams{{{I}}})"),
                stat("Steps", "Applied.", "ops", f"sum(rate(conveyor_steps_total{{{M}}}{RATE}))"),
                stat(
                    "Refused",
                    "Calls, frames and chunks.",
                    "ops",
                    f"sum(rate(conveyor_rejected_total{{{I}}}{RATE}))",
                ),
                stat(
                    "Alerts",
                    "Firing.",
                    "none",
                    'count(ALERTS{alertname=~"Conveyor.*", alertstate="firing"}) or vector(0)',
                ),
            ],
        ),
        Row(
            "Steps",
            [
                Panel(
                    "Steps",
                    "Applied, by model.",
                    "ops",
                    rate("conveyor_steps_total", M, "model"),
                    stacked=True,
                ),
                Panel(
                    "Time of a chunk",
                    "From its arrival to its last result.",
                    "s",
                    quantiles("conveyor_step_seconds", M, "model"),
                ),
                Panel(
                    "Refused",
                    "By reason; docs/guides/alerts.md says what to do about most of them.",
                    "ops",
                    rate("conveyor_rejected_total", I, "reason"),
                    stacked=True,
                ),
            ],
        ),
        Row(
            "Calls",
            [
                Panel(
                    "Calls",
                    "Begun, by method.",
                    "ops",
                    rate("grpc_server_started_total", I, "grpc_method"),
                ),
                Panel(
                    "Time of a unary call",
                    "From its begin to its end.",
                    "s",
                    quantiles(
                        "grpc_server_handling_seconds",
                        f'{I}, grpc_type="unary_unary"',
                        "grpc_method",
                    ),
                ),
                Panel(
                    "Calls that failed",
                    "By status, without OK and what clients cancelled.",
                    "ops",
                    rate(
                        "grpc_server_handled_total",
                        f'{I}, grpc_code!~"OK|CANCELLED"',
                        "grpc_code",
                    ),
                    stacked=True,
                ),
                Panel(
                    "Messages",
                    "On all calls.",
                    "ops",
                    [
                        (f"sum(rate(grpc_server_msg_received_total{{{I}}}{RATE}))", "received"),
                        (f"sum(rate(grpc_server_msg_sent_total{{{I}}}{RATE}))", "sent"),
                    ],
                ),
            ],
        ),
        Row(
            "Processes",
            [
                Panel(
                    "Processor",
                    "Cores in use.",
                    "none",
                    rate("process_cpu_seconds_total", I + ', job="conveyor"', "instance"),
                ),
                Panel(
                    "Memory",
                    "Resident.",
                    "bytes",
                    [(f'process_resident_memory_bytes{{{I}, job="conveyor"}}', "{{instance}}")],
                ),
                Panel(
                    "File descriptors",
                    "Open, and how many there may be.",
                    "none",
                    [
                        (f'process_open_fds{{{I}, job="conveyor"}}', "{{instance}}"),
                        (f'process_max_fds{{{I}, job="conveyor"}}', "{{instance}} at most"),
                    ],
                ),
                Panel(
                    "What runs",
                    "Version and device of each server.",
                    "none",
                    [(f"conveyor_info{{{I}}}", "{{instance}}: {{version}} on {{device}}")],
                ),
            ],
        ),
    ],
)

SESSIONS: Final = Dashboard(
    "conveyor-sessions",
    "Conveyor: sessions and state",
    "Who is there, where their state lies, how near the bounds are.",
    [
        Row(
            "Sessions",
            [
                Panel(
                    "Open sessions",
                    "By state.",
                    "none",
                    [(f"sum by (state) (conveyor_sessions{{{I}}})", "{{state}}")],
                    stacked=True,
                ),
                Panel(
                    "Sessions and their bound",
                    "Beyond it an open is refused with SESSIONS_LIMIT.",
                    "none",
                    [
                        (f"sum by (instance) (conveyor_sessions{{{I}}})", "{{instance}}"),
                        limit("sessions_max"),
                    ],
                ),
                Panel(
                    "Ended",
                    "By reason. Evicted ones made room: see the alert ConveyorEvicting.",
                    "ops",
                    rate("conveyor_sessions_ended_total", I, "reason"),
                ),
                Panel(
                    "Taken over",
                    "Opens of sessions that were there, by how that ended.",
                    "ops",
                    rate("conveyor_resumes_total", I, "outcome"),
                ),
                Panel(
                    "Streams and their bound",
                    "Beyond it a stream is refused with STREAMS_LIMIT.",
                    "none",
                    [(f"conveyor_streams{{{I}}}", "{{instance}}"), limit("streams_max")],
                ),
                Panel(
                    "Steps answered from memory",
                    "Retries of steps that had been applied.",
                    "ops",
                    rate("conveyor_duplicate_steps_total", M, "model"),
                ),
            ],
        ),
        Row(
            "Where carries lie",
            [
                Panel(
                    "Slots in use",
                    "Of the rows of the state pools, by version; at 100 % sessions are paged.",
                    "percentunit",
                    [
                        (
                            f'sum by (model, version) (conveyor_slots{{{M}, state="used"}})'
                            f" / sum by (model, version) (conveyor_slots{{{M}}})",
                            "{{model}} {{version}}",
                        )
                    ],
                ),
                Panel(
                    "Paging",
                    "Carries moved to the device and off it.",
                    "ops",
                    [
                        (f"sum(rate(conveyor_page_ins_total{{{M}}}{RATE}))", "in"),
                        (f"sum(rate(conveyor_page_outs_total{{{M}}}{RATE}))", "out"),
                    ],
                ),
                Panel(
                    "Chunks that waited for a carry",
                    "The share of chunks whose session had to be brought in first.",
                    "percentunit",
                    [
                        (
                            'model:conveyor_page_ins:ratio_rate5m{model=~"$model"}',
                            "{{model}}",
                        )
                    ],
                ),
            ],
        ),
        Row(
            "Memory",
            [
                Panel(
                    "Carries and attention memories",
                    "Bytes, by where they lie; a memory on the device is in host memory too.",
                    "bytes",
                    [(f"sum by (tier) (conveyor_state_bytes{{{I}}})", "{{tier}}")],
                    stacked=True,
                    columns=6,
                ),
                Panel(
                    "Carries in host memory and their bound",
                    "Beyond it the sessions idle longest are evicted.",
                    "bytes",
                    [
                        (
                            f'sum by (instance) (conveyor_state_bytes{{{I}, tier="host"}})'
                            f" - sum by (instance) (conveyor_memories_bytes{{{I}}})",
                            "{{instance}}",
                        ),
                        limit("host_state_bytes_max"),
                    ],
                    columns=6,
                ),
                Panel(
                    "What sessions attend over, and its bound",
                    "Beyond it no session that brings a memory is opened.",
                    "bytes",
                    [
                        (f"conveyor_memories_bytes{{{I}}}", "{{instance}}"),
                        limit("memories_bytes_max"),
                    ],
                    columns=6,
                ),
                Panel(
                    "Held for retries, and its bound",
                    "Beyond it those of the sessions stepped longest ago are dropped.",
                    "bytes",
                    [
                        (f"conveyor_held_result_bytes{{{I}}}", "{{instance}}"),
                        limit("held_results_total_bytes_max"),
                    ],
                    columns=6,
                ),
            ],
        ),
    ],
)

ENGINE: Final = Dashboard(
    "conveyor-engine",
    "Conveyor: engine and batching",
    "What a tick is made of and where a chunk's time goes.",
    [
        Row(
            "Ticks",
            [
                Panel(
                    "Ticks",
                    "Engine calls, by model.",
                    "ops",
                    rate("conveyor_tick_seconds_count", M, "model"),
                ),
                Panel(
                    "Time of a tick",
                    "Of its engine call.",
                    "s",
                    quantiles("conveyor_tick_seconds", M, "model"),
                ),
                Panel(
                    "Engine busy",
                    "The share of the time that an engine call runs; near 100 % the engine is the"
                    " bound.",
                    "percentunit",
                    rate("conveyor_tick_seconds_sum", I, "instance"),
                ),
                Panel(
                    "Times of ticks",
                    "How many took how long.",
                    "s",
                    [
                        (
                            f"sum by (le) (increase(conveyor_tick_seconds_bucket{{{M}}}{RATE}))",
                            "{{le}}",
                        )
                    ],
                    "heatmap",
                    columns=24,
                ),
            ],
        ),
        Row(
            "How full ticks are",
            [
                Panel(
                    "Sessions in a tick",
                    "On average. 1 with many sessions: they do not meet.",
                    "none",
                    mean("conveyor_tick_sessions"),
                ),
                Panel("Steps in a tick", "On average.", "none", mean("conveyor_tick_steps")),
                Panel(
                    "Steps in a second of engine time",
                    "What batching gains: it rises with the sessions in a tick.",
                    "ops",
                    [
                        (
                            f"sum by (model) (rate(conveyor_steps_total{{{M}}}{RATE}))"
                            f" / sum by (model) (rate(conveyor_tick_seconds_sum{{{M}}}{RATE}))",
                            "{{model}}",
                        )
                    ],
                ),
            ],
        ),
        Row(
            "Waiting",
            [
                Panel(
                    "Time in the queue",
                    "From a chunk's arrival to its first tick.",
                    "s",
                    quantiles("conveyor_queue_seconds", M, "model"),
                ),
                Panel(
                    "Inbox and its bound",
                    "Chunks accepted and not finished; beyond it one is refused with INBOX_FULL.",
                    "none",
                    [(f"conveyor_inbox_chunks{{{I}}}", "{{instance}}"), limit("inbox_chunks_max")],
                ),
                Panel(
                    "Time of a chunk",
                    "The queue, and all its ticks.",
                    "s",
                    quantiles("conveyor_step_seconds", M, "model"),
                ),
                Panel(
                    "Whole sequences",
                    "Predict on models that cannot be stepped.",
                    "none",
                    [(f"sum by (state) (conveyor_predictions{{{I}}})", "{{state}}")],
                ),
            ],
        ),
        Row(
            "The machine",
            [
                Panel(
                    "Device memory",
                    "Of a CUDA device, everybody's use of it.",
                    "bytes",
                    [
                        (
                            f"sum by (instance, state) (conveyor_device_memory_bytes{{{I}}})",
                            "{{instance}} {{state}}",
                        )
                    ],
                    columns=12,
                ),
                Panel(
                    "Garbage collections",
                    "By generation; the oldest one stops the server for longest.",
                    "ops",
                    rate("python_gc_collections_total", f'{I}, job="conveyor"', "generation"),
                    columns=12,
                ),
            ],
        ),
    ],
)

DASHBOARDS: Final = (OVERVIEW, SESSIONS, ENGINE)
