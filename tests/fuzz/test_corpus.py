"""What the fuzzer begins with and what it once found: typed errors, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.targets import TARGETS

CORPUS = Path(__file__).parent / "corpus"


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_and_findings_are_taken_or_refused(name: str) -> None:
    target = TARGETS[name]
    for data in target.seeds():
        target.run(data)
    for file in sorted((CORPUS / name).glob("*")):
        target.run(file.read_bytes())
