"""``python -m bench``: one table, each line beside its comparator, measured in turns in one run."""

import argparse
import datetime
import json
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from bench import facts, report, served
from bench.model import write_model
from bench.processes import conveyor_server, null_server
from bench.result import Line, middle

SERVED = ("streams", "chunks", "many", "unary", "inference")
GROUPS = (*SERVED, "engine", "families")


def main() -> None:
    """Measures, prints, and writes what it is told to."""
    options = _parse()
    console = Console(width=None if sys.stdout.isatty() else 210)
    lines: list[Line] = []
    with tempfile.TemporaryDirectory(prefix="conveyor-bench-") as name:
        folder = Path(name)
        models = folder / "models"
        bundle = write_model(models)
        groups = set(options.only)
        if groups & set(SERVED):
            settings = {"log.level": "warning", "engine.device": "cpu"}
            with (
                conveyor_server(folder, models, settings) as conveyor,
                null_server(folder) as null,
                null_server(folder, bundle) as null_engine,
            ):
                lines += served.run(
                    served.Servers(conveyor, null, null_engine),
                    groups,
                    rounds=options.rounds,
                    seconds=options.seconds,
                    say=_say,
                )
        if "engine" in groups:
            from bench import engine  # onnx and torch: not beside a load that is measured

            lines += engine.run(bundle, rounds=options.rounds, seconds=options.seconds, say=_say)
        if "families" in groups:
            from bench import families

            lines += families.run(rounds=options.rounds, seconds=options.seconds, say=_say)
    report.show(console, lines)
    _say_machine(console, lines)
    if options.json is not None:
        _write(options, lines)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "--only", nargs="+", choices=GROUPS, default=GROUPS, help="only these groups of lines"
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


def _say_machine(console: Console, lines: list[Line]) -> None:
    machine = facts.machine()
    console.print(
        f"\n{machine['cpu']}, {machine['cores']} cores, Python {machine['python']}; "
        + ", ".join(f"{name} {version}" for name, version in facts.versions().items())
    )
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
    raw = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": facts.machine(),
        "versions": facts.versions(),
        "settings": {
            "seconds": options.seconds,
            "rounds": options.rounds,
            "warm_seconds": served.WARM_SECONDS,
        },
        "lines": [line.to_json() for line in lines],
    }
    options.json.write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
