"""What the pages of the families write with other frameworks becomes the model they show."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from conveyor_models import load_bundle, parse_spec
from tests.unit.docs.markdown import DOCS, Block, blocks

IMPORT: Final = "conveyor-server models import "
FAMILIES: Final = DOCS / "families"


def _commands(page: Path) -> list[Block]:
    return [block for block in blocks(page, "") if block.text.startswith(IMPORT)]


PAGES: Final = [page for page in sorted(FAMILIES.glob("*.md")) if _commands(page)]


def _run(*arguments: str, folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | {"KERAS_BACKEND": "torch", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_every_cell_that_a_framework_has_is_imported() -> None:
    assert {page.stem for page in PAGES} >= {"rnn", "lstm", "gru"}


@pytest.mark.timeout(300)  # each framework is imported several times
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_an_imported_file_is_the_model_of_the_page(page: Path, tmp_path: Path) -> None:
    expected = parse_spec(blocks(page, "toml")[0].text)
    steps = [block for block in blocks(page, "python") if "import" in block.text]
    assert len(steps) == len(_commands(page))
    for step in sorted([*steps, *_commands(page)], key=lambda block: block.line):
        if step.language == "python":
            _run("-c", step.text, folder=tmp_path)
            continue
        arguments = shlex.split(step.text)[1:]
        _run("-m", "conveyor_server.cli", *arguments, folder=tmp_path)
        made = load_bundle(tmp_path / "my-models" / expected.name)
        assert made.spec.structure() == expected.structure(), str(step)
