"""Servers for a module's tests: real processes, checked for errors when the module ends."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pytest
import torch

from conveyor_models import Bundle
from tests.integration.bundles import add_all
from tests.integration.process import ServerProcess
from tests.integration.wire import Wire

ZOO: Final = Path(__file__).parents[2] / "models" / "zoo"
StartServer = Callable[..., ServerProcess]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small models of ``bundles``. Nobody changes it."""
    folder = tmp_path_factory.mktemp("repository")
    add_all(folder)
    return folder


@pytest.fixture(scope="session")
def bundles(repository: Path) -> dict[str, Bundle]:
    from conveyor_models import load_bundle, scan

    return {found.spec.name: load_bundle(found.path) for found in scan(repository).bundles}


@pytest.fixture(scope="module")
def start_server(
    tmp_path_factory: pytest.TempPathFactory, repository: Path
) -> Iterator[StartServer]:
    """Starts servers that live until the module's end.

    Each has to stop by itself on SIGTERM with status 0, having logged no error but the expected
    ones.
    """
    started: list[tuple[ServerProcess, tuple[str, ...]]] = []

    def start(
        settings: dict[str, Any] | None = None,
        *,
        models: Path = repository,
        config: str = "",
        expected_errors: tuple[str, ...] = (),
        program: Sequence[str] = ("-m", "conveyor_server.cli"),
    ) -> ServerProcess:
        folder = tmp_path_factory.mktemp("server")
        server = ServerProcess(folder, models, {**(settings or {})}, config, program)
        started.append((server, expected_errors))
        return server

    yield start
    statuses = [server.stop() for server, _ in started]
    for (server, expected_errors), status in zip(started, statuses, strict=True):
        unexpected = [line for line in server.problems() if line["message"] not in expected_errors]
        assert not unexpected, unexpected
        assert status == 0, server.log_text()


@pytest.fixture(scope="module")
def server(start_server: StartServer) -> ServerProcess:
    """A server of the small models with settings as they are by default."""
    return start_server({"shutdown.grace_seconds": 2})


@pytest.fixture
async def wire(server: ServerProcess) -> AsyncIterator[Wire]:
    async with Wire(server.address) as connected:
        yield connected


@pytest.fixture
def rows() -> Callable[..., npt.NDArray[Any]]:
    """Random inputs: features [steps, size], or tokens [steps] below ``vocabulary``."""

    def make(steps: int, size: int = 3, seed: int = 0, vocabulary: int = 0) -> npt.NDArray[Any]:
        random = np.random.default_rng(seed)
        if vocabulary:
            return random.integers(0, vocabulary, steps, dtype=np.int32)
        return random.standard_normal((steps, size), dtype=np.float32)

    return make
