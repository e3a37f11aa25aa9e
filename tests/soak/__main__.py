"""`python -m tests.soak SECONDS`: fuzzing, then clients that connect, step and are killed.

At the end the server has to hold what it held at the beginning: memory, descriptors, threads,
sessions, slots, streams and bytes kept for anybody. A table says so; the exit status is 1 where one
does not come back, a decoder raised, or an answer was wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

from tests.integration.bundles import MODELS, add_model
from tests.integration.process import ServerProcess
from tests.soak.load import Load
from tests.soak.sample import Sample, differences, quiet_sample

FUZZ_SHARE: Final = 0.1
"""Of the time, for fuzzing, but no more than the next."""
FUZZ_SECONDS_MAX: Final = 600
WARM_SHARE: Final = 0.2
"""Of the rest, before the baseline is taken: malloc and caches keep what they once needed."""
WARM_SECONDS_MAX: Final = 120
SETTINGS: Final = {
    "shutdown.grace_seconds": 1,
    "limits.idle_seconds_default": 4,
    "limits.slow_reader_seconds_max": 4,
}


def fuzz(seconds: float, say: Console) -> list[str]:
    """Every target for a part of the time; the names of those that found something."""
    from tests.fuzz.targets import TARGETS

    found: list[str] = []
    each = max(1, round(seconds / len(TARGETS)))
    for name in TARGETS:
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run(
                [sys.executable, "-m", "tests.fuzz", name, str(each)],
                cwd=folder,
                env=os.environ | {"PYTHONPATH": str(Path.cwd()), "OMP_NUM_THREADS": "1"},
                capture_output=True,
                check=False,
            )
            said = done.stderr.decode("utf-8", "replace") + done.stdout.decode("utf-8", "replace")
            runs = next((x.split()[-1] for x in said.splitlines() if "executed_units" in x), "?")
            say.print(f"fuzz {name}: {runs} inputs in {each} s, exit status {done.returncode}")
            if done.returncode:
                found.append(name)
                say.print(said[-4000:], markup=False)
                for file in Path(folder).iterdir():
                    kept = Path(f"{name}-{file.name}").absolute()
                    kept.write_bytes(file.read_bytes())
                    say.print(f"its input: {kept}")
    return found


async def soak(seconds: float, seed: int, say: Console) -> bool:
    """Whether everything came back."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("tiny", "words", "broad"):
            add_model(Path(folder) / "models", name, MODELS[name])
        server = ServerProcess(Path(folder) / "server", Path(folder) / "models", SETTINGS)
        try:
            load = Load(server, random.Random(seed))
            await load.run(min(WARM_SECONDS_MAX, WARM_SHARE * seconds))
            before = await quiet_sample(server)
            say.print(f"baseline: {before}")
            peak = await load.run(seconds - min(WARM_SECONDS_MAX, WARM_SHARE * seconds))
            after = await quiet_sample(server)
        finally:
            status = server.stop()
        problems = list(server.problems())
    say.print(_table(before, peak, after))
    say.print(", ".join(f"{count:,} {what}" for what, count in sorted(load.counts.items())))
    for line in problems[:10]:
        say.print(f"in the log: {line}", markup=False)
    if load.wrong:
        say.print(f"WRONG ANSWERS: {load.wrong[:5]}", markup=False)
    lost = differences(before, after)
    if lost:
        say.print(f"not back at the baseline: {', '.join(lost)}")
    return not (lost or problems or load.wrong or status)


def _table(before: Sample, peak: Sample, after: Sample) -> Table:
    table = Table("", "baseline", "most", "end", "back")
    lost = differences(before, after)
    for name, value in before.values.items():
        row = [f"{each.values[name]:,.0f}" for each in (before, peak, after)]
        assert value is not None
        table.add_row(name, *row, "no" if name in lost else "yes")
    return table


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak")
    parser.add_argument("seconds", type=float)
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    parser.add_argument("--no-fuzzing", action="store_true", help="clients only")
    given = parser.parse_args()
    say = Console(width=120)
    say.print(f"seed {given.seed}")
    seconds, found = given.seconds, list[str]()
    if not given.no_fuzzing:
        share = min(FUZZ_SECONDS_MAX, FUZZ_SHARE * seconds)
        found = fuzz(share, say)
        seconds -= share
    passed = asyncio.run(soak(seconds, given.seed, say)) and not found
    say.print("passed" if passed else "FAILED")
    sys.exit(not passed)


if __name__ == "__main__":
    main()
