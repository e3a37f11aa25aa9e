"""README's way from a trained module to a client's call, followed in an empty folder."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
from torch import nn

from tests.integration.process import ServerProcess, command_environment
from tests.unit.docs.markdown import REPOSITORY, blocks

README: Final = REPOSITORY / "README.md"
ADDRESS: Final = "127.0.0.1:50051"
ROWS: Final = np.array([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6], [0.7, 0.8, 0.9]], np.float32)


def _section(title: str) -> tuple[list[str], list[str], list[str]]:
    """The section's Python blocks, its lines of commands without comments, and its text."""
    lines = README.read_text(encoding="utf-8").splitlines()
    first = lines.index(title) + 1
    last = next(n for n, line in enumerate(lines[first:], first) if line.startswith("## "))
    inside = [block for kind in ("python", "") for block in blocks(README, kind)]
    inside = [block for block in inside if first < block.line < last]
    programs = [block.text for block in inside if block.language == "python"]
    commands = [
        re.sub(r"\s+#.*", "", line)
        for block in inside
        if not block.language
        for line in block.text.splitlines()
    ]
    return programs, commands, lines[first:last]


def _run(command: list[str], folder: Path) -> str:
    """Runs one of the commands of the environment that the tests run in."""
    program = Path(sys.executable).with_name(command[0])
    done = subprocess.run(
        [program, *command[1:]],
        cwd=folder,
        env=command_environment(),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "of-ones-own"
    folder.mkdir()
    yield folder
    assert {path.name for path in folder.iterdir()} == {"my_model.py", "my_model.pt", "my-models"}


def _expected(folder: Path) -> np.ndarray[Any, Any]:
    """What PyTorch makes of the saved weights and all rows at once."""
    state = torch.load(folder / "my_model.pt", weights_only=True)
    lstm, fc = nn.LSTM(3, 8), nn.Linear(8, 2)
    nn.ModuleDict({"lstm": lstm, "fc": fc}).load_state_dict(state)
    with torch.no_grad():
        return fc(lstm(torch.from_numpy(ROWS))[0]).numpy()


def test_a_model_of_ones_own_is_imported_served_and_called(folder: Path, tmp_path: Path) -> None:
    (program, client), commands, text = _section("### Your own model")
    assert any("`my_model.py`" in line for line in text)
    (folder / "my_model.py").write_text(program)
    *before, serve = commands
    assert [command.split()[:3] for command in before] == [
        ["python", "my_model.py"],
        ["conveyor-server", "models", "import"],
        ["conveyor-server", "check", "--models"],
    ]
    said = [_run(command.split(), folder) for command in before]
    assert "configuration: sound" in said[-1]
    assert re.search(r"^mine +1 +3 features +2 +lstm 8 ", said[-1], re.MULTILINE)
    start, _, models = serve.rpartition(" ")
    assert start == "conveyor-server serve --models"
    server = ServerProcess(tmp_path / "server", folder / models, {})
    try:
        assert client.count(ADDRESS) == 1
        printed = _run(["python", "-c", client.replace(ADDRESS, server.address)], folder)
    finally:
        assert server.stop() == 0
    numbers = [float(number) for number in re.findall(r"-?\d+\.\d*(?:e[+-]?\d+)?", printed)]
    np.testing.assert_allclose(np.reshape(numbers, (3, 2)), _expected(folder), rtol=0, atol=1e-6)


def test_nothing_that_the_guides_import_goes_into_a_folder_of_sources() -> None:
    pages = [README, *REPOSITORY.glob("docs/**/*.md")]
    sources = {path.name for path in REPOSITORY.iterdir() if path.is_dir()}
    into = {
        name
        for page in pages
        for name in re.findall(r"models import .*--into (\S+)", page.read_text(encoding="utf-8"))
    }
    assert "my-models" in into
    assert not into & sources
