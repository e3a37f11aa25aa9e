"""A results file as a Markdown table: ``python -m bench.markdown bench/results/FILE.json``."""

import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

_HEADER = (
    "| measured | steps/s | p50 us | cpu us | beside it | steps/s | p50 us | cpu us"
    " | ratio | p50 ratio |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)


def table(lines: list[dict[str, Any]]) -> str:
    """``lines`` as `Line.to_json` made them."""
    rows = [_HEADER]
    before = ""
    for line in lines:
        ours = ["", "", "", ""]
        if line["name"] != before:
            ours = [line["name"], *_figures(line["subject_rounds"])]
        before = line["name"]
        theirs = [line["comparator"], *_figures(line["comparator_rounds"])]
        ratios = [f"{line['ratio']:.2f}", f"{line['p50_ratio']:.2f}"]
        rows.append(f"| {' | '.join(ours + theirs + ratios)} |")
    return "\n".join(rows)


def _figures(rounds: list[dict[str, Any]]) -> list[str]:
    steps, p50, cpu = (_middle(rounds, name) for name in ("value", "p50_ms", "step_cpu_us"))
    return [f"{steps:,.0f}", f"{p50 * 1e3:,.0f}", f"{cpu:.3g}"]


def _middle(rounds: list[dict[str, Any]], name: str) -> float:
    values = [each[name] for each in rounds if each[name] is not None]
    return median(values) if values else float("nan")


if __name__ == "__main__":
    print(table(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["lines"]))
