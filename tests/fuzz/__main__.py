"""Fuzzes one target: `python -m tests.fuzz TARGET SECONDS [FOLDER]` (needs `conveyor[fuzz]`).

New inputs that reach further go to FOLDER. The input of a defect is written to the working folder
as crash-..., timeout-... or oom-..., and the exit status is not 0. To see it again, put it into
`tests/fuzz/corpus/TARGET`, which is where it belongs once the defect is fixed.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any, Final

import atheris

INPUT_BYTES_MAX: Final = 64 * 2**10
INPUT_SECONDS_MAX: Final = 20
MEMORY_MIB_MAX: Final = 4096
CORPUS: Final = Path(__file__).parent / "corpus"


def _mutator(mutate: Any) -> dict[str, Any]:
    if mutate is None:
        return {}
    return {"custom_mutator": lambda *given: mutate(*given, atheris.Mutate)}


def main(name: str, seconds: str, folder: str = "") -> None:
    with atheris.instrument_imports(include=["conveyor_server", "conveyor_models"]):
        from tests.fuzz.targets import TARGETS

    target = TARGETS[name]
    with tempfile.TemporaryDirectory() as seeds:
        for number, seed in enumerate(target.seeds()):
            (Path(seeds) / str(number)).write_bytes(seed)
        corpus = CORPUS / name
        arguments = [
            f"-max_total_time={seconds}",
            f"-max_len={INPUT_BYTES_MAX}",
            f"-timeout={INPUT_SECONDS_MAX}",
            f"-rss_limit_mb={MEMORY_MIB_MAX}",
            "-print_final_stats=1",
            *([folder] if folder else []),
            seeds,
            *([str(corpus)] if corpus.is_dir() else []),
        ]
        # The first folder is written to; with none given that is the one of the seeds.
        atheris.Setup([sys.argv[0], *arguments], target.run, **_mutator(target.mutate))
        atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
