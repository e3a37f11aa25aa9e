"""``python -m bench``: one table, each line beside its comparator, measured in turns in one run."""

import argparse
import datetime
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import facts, markdown
from bench.result import Line, middle

if TYPE_CHECKING:
    from rich.console import Console

SERVED = ("streams", "chunks", "many", "unary", "inference")
GROUPS = (*SERVED, "engine", "families")
"""Measured unless `--only` says otherwise."""
CUDA = "cuda"


def main() -> None:
    """Measures, prints, and writes what it is told to."""
    options = _parse()
    groups = set(options.only)
    lines: list[Line] = []
    if groups & {*SERVED, "engine"}:
        lines += _measure_bundle(options, groups)
    if "families" in groups:
        from bench import families

        lines += families.run(rounds=options.rounds, seconds=options.seconds, say=_say)
    if CUDA in groups:
        from bench import cuda

        try:
            lines += cuda.run(rounds=options.rounds, seconds=options.seconds, say=_say)
        except cuda.NoDevice as problem:
            sys.exit(f"there is no CUDA device to measure: {problem}")
    _show(lines)
    if options.json is not None:
        _write(options, lines)


def _measure_bundle(options: argparse.Namespace, groups: set[str]) -> list[Line]:
    """The groups that need a model on a disk."""
    from bench.model import write_model

    lines: list[Line] = []
    with tempfile.TemporaryDirectory(prefix="conveyor-bench-") as name:
        folder = Path(name)
        bundle = write_model(folder / "models")
        if groups & set(SERVED):
            lines += _measure_served(options, groups, folder, bundle)
        if "engine" in groups:
            from bench import engine  # onnx and torch: not beside a load that is measured

            lines += engine.run(bundle, rounds=options.rounds, seconds=options.seconds, say=_say)
    return lines


def _measure_served(
    options: argparse.Namespace, groups: set[str], folder: Path, bundle: Path
) -> list[Line]:
    from bench import served
    from bench.processes import conveyor_server, null_server

    settings = {"log.level": "warning", "engine.device": "cpu"}
    with (
        conveyor_server(folder, folder / "models", settings) as conveyor,
        null_server(folder) as null,
        null_server(folder, bundle) as null_engine,
    ):
        return served.run(
            served.Servers(conveyor, null, null_engine),
            groups,
            rounds=options.rounds,
            seconds=options.seconds,
            say=_say,
        )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "--only",
        nargs="+",
        choices=(*GROUPS, CUDA),
        default=GROUPS,
        help="only these groups of lines (default: all but cuda)",
    )
    parser.add_argument("--seconds", type=float, help="measured in each round (default 2)")
    parser.add_argument("--rounds", type=int, help="rounds of each contender (default 5)")
    parser.add_argument("--quick", action="store_true", help="3 rounds of 0.6 s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every round there")
    options = parser.parse_args()
    options.seconds = options.seconds or (0.6 if options.quick else 2.0)
    options.rounds = options.rounds or (3 if options.quick else 5)
    return options


def _say(text: str) -> None:
    print(f"measuring: {text}", file=sys.stderr)


def _show(lines: list[Line]) -> None:
    try:
        from rich.console import Console
    except ModuleNotFoundError:  # on a machine that has torch and little else
        print(markdown.table([line.to_json() for line in lines]))
        print(f"\n{_machine()}")
        return
    from bench import report

    console = Console(width=None if sys.stdout.isatty() else 210)
    report.show(console, lines)
    console.print(f"\n{_machine()}", markup=False)
    _say_machine(console, lines)


def _machine() -> str:
    machine = facts.machine()
    versions = ", ".join(f"{name} {version}" for name, version in facts.versions().items())
    return f"{machine['cpu']}, {machine['cores']} cores, Python {machine['python']}; {versions}"


def _say_machine(console: "Console", lines: list[Line]) -> None:
    console.print(
        "cpu us: processor time of the server, or of the engine, for each step. load cpu: what the"
        " load generator took of a core, against either. batch: sessions in a tick."
    )
    shares = [
        share
        for line in lines
        for rounds in (line.subject_rounds, line.comparator_rounds)
        if (share := middle(rounds, "others_cpu")) is not None
    ]
    if shares:
        console.print(f"Other programs took up to {max(shares):.0%} of a core meanwhile.")


def _write(options: argparse.Namespace, lines: list[Line]) -> None:
    raw: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": facts.machine(),
        "versions": facts.versions(),
        "settings": {
            "seconds": options.seconds,
            "rounds": options.rounds,
        },
        "lines": [line.to_json() for line in lines],
    }
    if set(options.only) & set(SERVED):
        from bench.served import WARM_SECONDS

        raw["settings"]["warm_seconds"] = WARM_SECONDS
    if CUDA in options.only:
        raw["device"] = facts.cuda_device()
    options.json.write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
