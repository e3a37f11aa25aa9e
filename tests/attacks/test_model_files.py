"""Model files that mean harm, through the real commands: refused, by a limit, nothing touched."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
import pytest

from tests.attacks.canary import Canary
from tests.attacks.commands import Commands
from tests.attacks.model_files import BUNDLES, HARM, IMPORTS, PIPE, SECRET, Write, make_outside
from tests.integration.bundles import TINY, add_model
from tests.integration.conftest import StartServer
from tests.integration.process import ServerProcess
from tests.integration.wire import Wire, until

MEMORY_BYTES_MAX: Final = 256 * 2**20
"""Beyond what the command begins with."""
PROBLEM: Final = "a model cannot be served"


@pytest.fixture(scope="module")
def commands() -> Iterator[Commands]:
    with Commands() as started:
        yield started


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    folder = tmp_path / "outside"
    make_outside(folder)
    return folder


@pytest.fixture
def canary(outside: Path) -> Iterator[Canary]:
    watch = Canary(*(outside / name for name in (SECRET, PIPE, "secret.h5")))
    yield watch
    watch.close()


@pytest.mark.parametrize(("write", "said"), IMPORTS.values(), ids=IMPORTS.keys())
def test_import_refuses_and_touches_nothing(
    write: Write, said: str, commands: Commands, outside: Path, canary: Canary, tmp_path: Path
) -> None:
    (tmp_path / "given").mkdir()
    file = write(tmp_path / "given", outside)
    into = tmp_path / "models"
    done = commands.run("models", "import", file, "--name", "model", "--into", into)
    assert (done.status, "Traceback" in done.said) == (2, False), done
    assert said in done.said
    assert str(file.parent) in done.said
    assert done.memory_bytes < MEMORY_BYTES_MAX
    assert not into.exists()
    assert not canary.touched()
    assert not (outside / HARM).exists()


def test_the_canary_sings(outside: Path, canary: Canary, commands: Commands) -> None:
    """What a harmful file would do is seen."""
    (outside / SECRET).read_bytes()
    assert canary.touched()
    assert not canary.touched()
    done = commands.run("models", "show", outside / "absent")
    assert done.status == 2
    assert done.seconds > 0


@pytest.fixture
def hostile(tmp_path: Path, outside: Path) -> Path:
    folder = tmp_path / "repository"
    add_model(folder, "tiny", TINY)
    for name, (make, _) in BUNDLES.items():
        make(folder / name, outside)
    return folder


def test_check_names_every_problem(
    commands: Commands, hostile: Path, outside: Path, canary: Canary
) -> None:
    done = commands.run("check", "--models", hostile)
    assert (done.status, "Traceback" in done.said) == (1, False), done
    lines = done.said.splitlines()
    for name, (_, said) in BUNDLES.items():
        (line,) = [line for line in lines if f"/{name}" in line]
        assert said in line
    assert len(lines) == len(BUNDLES)
    assert done.memory_bytes < MEMORY_BYTES_MAX
    assert not canary.touched()
    assert not (outside / HARM).exists()


async def test_a_server_serves_the_sound_model_and_looks_again(
    start_server: StartServer, hostile: Path, outside: Path, canary: Canary
) -> None:
    server = start_server({"shutdown.grace_seconds": 1}, models=hostile, expected_errors=(PROBLEM,))
    for name, (make, _) in BUNDLES.items():
        make(hostile / f"late-{name}", outside)
    server.signal(signal.SIGHUP)
    await until(lambda: _problem(server, f"late-{list(BUNDLES)[-1]}"))
    for name, (_, said) in BUNDLES.items():
        for each in (name, f"late-{name}"):
            await until(lambda each=each: _problem(server, each), each)
            assert said in _problem(server, each)
    async with Wire(server.address) as wire:
        assert await wire.predict("tiny", np.zeros((2, 3), np.float32))
    assert not canary.touched()
    assert not (outside / HARM).exists()


def _problem(server: ServerProcess, name: str) -> str:
    """The first line about a bundle."""
    found = [line["problem"] for line in server.log() if f"/{name}" in line.get("problem", "")]
    return found[0] if found else ""
