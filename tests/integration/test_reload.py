"""How models come into service and leave it, and what a server does that cannot go on."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy.typing as npt
import pytest
import torch
from grpc import aio

from conveyor.v1 import model_pb2, session_pb2
from conveyor_models import Bundle, load_bundle
from conveyor_server.config import LimitsConfig, load_config
from conveyor_server.core import ModelKey
from conveyor_server.engine import loader
from conveyor_server.engine.engine import TorchEngine
from conveyor_server.engine.loader import Known, Repository, load_repository
from conveyor_server.engine.runner import ModelRunner
from conveyor_server.reload import Reloader
from conveyor_server.scheduler.driver import Driver
from conveyor_server.scheduler.models import ModelTable
from tests.integration.bundles import TINY, add_model
from tests.integration.conftest import StartServer
from tests.integration.process import ServerProcess, run_command
from tests.integration.wire import Wire, until

Rows = Callable[..., npt.NDArray[Any]]
PROBLEM = "a model cannot be served"
BUG = """
from conveyor_server.cli import main
from conveyor_server.scheduler.scheduler import Scheduler

begin = Scheduler.begin

def broken(self):
    batch = begin(self)
    if len(self.sessions):
        raise ZeroDivisionError("a bug")
    return batch

Scheduler.begin = broken
main()
"""


async def _served(wire: Wire) -> dict[int, str]:
    page = await wire.models.ListModels(model_pb2.ListModelsRequest())
    return {model.version: model.digest for model in page.models}


async def _predict(wire: Wire, rows: npt.NDArray[Any]) -> bytes:
    """By version 1."""
    request = session_pb2.PredictRequest(
        model="tiny", version=1, length=len(rows), rows=rows.tobytes()
    )
    return (await wire.sessions.Predict(request)).rows


async def _reload(server: ServerProcess, wire: Wire, *versions: int) -> None:
    server.signal(signal.SIGHUP)

    async def done() -> bool:
        return set(await _served(wire)) == set(versions)

    await until(done)


async def test_a_retired_version_never_comes_back_as_another(
    start_server: StartServer, rows: Rows, tmp_path: Path
) -> None:
    first = add_model(tmp_path, "tiny", TINY, version=1, seed=1)
    add_model(tmp_path, "tiny", TINY, version=2, seed=2)
    server = start_server(models=tmp_path, expected_errors=(PROBLEM,))
    x, folder = rows(6), tmp_path / "tiny" / "1"
    async with Wire(server.address) as wire:
        whole = await _predict(wire, x)
        session_id = (await wire.open("tiny", version=1)).session.session_id
        await wire.step(session_id, 1, x[:3])
        shutil.rmtree(folder)
        await _reload(server, wire, 2)
        assert server.metric("conveyor_slots", model="tiny", version="1", state="used") == 1

        add_model(tmp_path, "tiny", TINY, version=1, seed=3)
        server.signal(signal.SIGHUP)
        await until(lambda: bool(server.problems()))
        assert "new version" in server.problems()[0]["problem"]
        assert set(await _served(wire)) == {2}

        shutil.rmtree(folder)
        add_model(tmp_path, "tiny", TINY, version=1, seed=1)
        await _reload(server, wire, 1, 2)
        assert (await _served(wire))[1] == first.digest
        assert (await wire.step(session_id, 4, x[3:])).rows == whole[3 * 8 :]

        # Its last session takes a retired version with it; then the name is free.
        shutil.rmtree(folder)
        await _reload(server, wire, 2)
        await wire.close(session_id)
        assert 'version="1"' not in server.scrape()
        other = add_model(tmp_path, "tiny", TINY, version=1, seed=3)
        await _reload(server, wire, 1, 2)
        assert (await _served(wire))[1] == other.digest
        assert await _predict(wire, x) != whole


def _engine() -> TorchEngine:
    return TorchEngine(torch.device("cpu"), cpu_threads=1, slots=2)


def _known(found: Repository) -> dict[ModelKey, Known]:
    return {
        each.info.key: Known(each.info.digest, found.fingerprints[each.info.key])
        for each in found.loaded
    }


def test_the_weights_of_unchanged_bundles_are_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version in (1, 2):
        add_model(tmp_path, "tiny", TINY, version=version, seed=version)
    engine = _engine()
    known = _known(load_repository(tmp_path, engine, {}, LimitsConfig()))
    read: list[str] = []

    def watched(folder: Path) -> Bundle:
        read.append(folder.name)
        return load_bundle(folder)

    monkeypatch.setattr(loader, "load_bundle", watched)
    again = load_repository(tmp_path, engine, known, LimitsConfig())
    assert (read, again.loaded, again.present) == ([], [], set(known))
    add_model(tmp_path, "tiny", TINY, version=2, seed=2)  # the same, written anew
    again = load_repository(tmp_path, engine, known, LimitsConfig())
    assert (read, again.present, again.problems) == (["2"], set(known), [])
    add_model(tmp_path, "tiny", TINY, version=2, seed=3)
    for _ in range(2):  # told as often as it is looked at
        changed = load_repository(tmp_path, engine, known, LimitsConfig())
        assert changed.present == {ModelKey("tiny", 1)}
        assert len(changed.problems) == 1
    assert read == ["2"] * 3


@pytest.mark.parametrize("error", [RuntimeError("no memory"), MemoryError("no memory")])
def test_a_model_that_cannot_be_prepared_is_a_problem_of_its_own(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version in (1, 2):
        add_model(tmp_path, "tiny", TINY, version=version)
    engine = _engine()
    prepare = engine.prepare

    def fails_once(bundle: Bundle) -> ModelRunner:
        if bundle.spec.version == 1:
            raise error
        return prepare(bundle)

    monkeypatch.setattr(engine, "prepare", fails_once)
    found = load_repository(tmp_path, engine, {}, LimitsConfig())
    assert [each.info.key.version for each in found.loaded] == [2]
    assert "no memory" in found.problems[0]


async def test_no_exception_ends_the_regular_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = load_config(flags={"models.folder": str(tmp_path), "models.reload_seconds": "0.001"})
    looks = 0

    async def look() -> None:
        nonlocal looks
        looks += 1
        raise ZeroDivisionError("a bug")

    async def set_serving(*_: object) -> None:
        raise AssertionError("nothing is served")

    reloader = Reloader(config, _engine(), ModelTable(), Driver(0), set_serving)
    monkeypatch.setattr(reloader, "look", look)
    reloader.start()
    await until(lambda: looks >= 3)
    reloader.request()
    reloader.stop()
    assert sum(record.exc_info is not None for record in caplog.records) >= 3


async def test_a_server_that_breaks_says_so_with_its_exit_status(
    repository: Path, tmp_path: Path
) -> None:
    settings = {"shutdown.grace_seconds": 0.2}
    server = ServerProcess(tmp_path, repository, settings, program=("-c", BUG))
    try:
        async with Wire(server.address) as wire:
            with suppress(aio.AioRpcError):  # it may or may not be answered any more
                await wire.new_session("tiny")
        assert server.wait() == 1
    finally:
        if server.running:
            server.kill()
    assert "a tick broke off" in server.log_text()
    assert "because of an internal error" in server.log_text()


def test_a_ready_file_of_an_earlier_server_is_gone_before_this_one_serves(tmp_path: Path) -> None:
    file, empty = tmp_path / "ready.json", tmp_path / "models"
    file.write_text("{}")
    empty.mkdir()
    arguments = ["serve", "--models", str(empty), "--set", f"listen.ready_file={file}"]
    assert run_command(arguments).returncode == 2
    assert not file.exists()


def test_a_ready_file_that_cannot_be_written_is_refused_at_once(
    tmp_path: Path, repository: Path
) -> None:
    file = tmp_path / "nowhere" / "ready.json"
    arguments = ["serve", "--models", str(repository), "--set", f"listen.ready_file={file}"]
    ended = run_command(arguments)
    assert ended.returncode == 2
    assert "listen.ready_file" in ended.stderr
    assert "serving" not in ended.stderr
