"""The table."""

import math
from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from bench.result import Line, Measured, middle

_FIGURES = ("steps/s", "p50 us", "p99 us", "cpu us")


def show(console: Console, lines: Iterable[Line]) -> None:
    """Prints one table: a row for each line and comparator."""
    table = Table(box=None, pad_edge=False, header_style="bold", collapse_padding=True)
    table.add_column("measured", no_wrap=True)
    for name in _FIGURES:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("batch", justify="right", no_wrap=True)
    table.add_column("beside it", no_wrap=True)
    for name in (*_FIGURES, "ratio", "p50 ratio", "load cpu"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("to reach")
    before = ""
    for line in lines:
        ours = ["", "", "", "", "", ""]
        if line.name != before:  # the same subject beside another comparator is not said again
            ours = [line.name, *_figures(line.subject_rounds), _batch(line.subject_rounds)]
        before = line.name
        table.add_row(
            *ours,
            line.comparator,
            *_figures(line.comparator_rounds),
            f"{line.ratio:.2f}",
            f"{line.p50_ratio:.2f}",
            _load(line),
            _targets(line),
        )
    console.print(table)


def _figures(rounds: list[Measured]) -> list[str]:
    value, cpu = middle(rounds, "value"), middle(rounds, "step_cpu_us")
    p50, p99 = middle(rounds, "p50_ms"), middle(rounds, "p99_ms")
    return [_whole(value), _whole(p50, 1e3), _whole(p99, 1e3), _short(cpu)]


def _whole(value: float | None, factor: float = 1) -> str:
    return "" if value is None or math.isnan(value) else f"{value * factor:,.0f}"


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _batch(rounds: list[Measured]) -> str:
    batch = middle(rounds, "mean_batch")
    return "" if batch is None else f"{batch:.1f}"


def _load(line: Line) -> str:
    """What the load generator took of a core, against each."""
    ours = middle(line.subject_rounds, "generator_cpu")
    theirs = middle(line.comparator_rounds, "generator_cpu")
    return "" if ours is None or theirs is None else f"{ours:.0%} {theirs:.0%}"


def _targets(line: Line) -> str:
    said: list[str] = []
    for target in line.targets:
        mark = "[green]reached[/]" if line.reached(target) else "[red]missed[/]"
        said.append(f"{target.figure} {target.bound} {target.ratio}: {mark}")
    return ", ".join(said)
