"""The model repository while the server runs: new versions, retired ones, broken ones."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy.typing as npt
import pytest
from grpc_health.v1 import health_pb2

from conveyor.v1 import model_pb2
from tests.integration.bundles import DEEP, TINY, WORDS, add_model
from tests.integration.conftest import StartServer
from tests.integration.process import ServerProcess
from tests.integration.wire import Refusal, Wire, refused, until

Rows = Callable[..., npt.NDArray[Any]]
PROBLEM = "a model cannot be served"


async def _versions(wire: Wire) -> list[tuple[str, int, bool]]:
    page = await wire.models.ListModels(model_pb2.ListModelsRequest())
    return [(model.name, model.version, model.newest) for model in page.models]


async def _reload(server: ServerProcess, wire: Wire, expected: list[tuple[str, int, bool]]) -> None:
    server.signal(signal.SIGHUP)

    async def done() -> bool:
        return await _versions(wire) == expected

    await until(done)


async def test_a_new_version_is_taken_up_and_an_old_one_kept_for_its_sessions(
    start_server: StartServer, rows: Rows, tmp_path: Path
) -> None:
    add_model(tmp_path, "tiny", TINY, version=1, seed=1)
    server = start_server(models=tmp_path)
    x = rows(10)
    async with Wire(server.address) as wire:
        whole = await wire.predict("tiny", x)
        session_id = await wire.new_session("tiny")
        await wire.step(session_id, 1, x[:4])

        add_model(tmp_path, "tiny", TINY, version=2, seed=2)
        await _reload(server, wire, [("tiny", 1, False), ("tiny", 2, True)])
        newer = await wire.open("tiny")
        assert newer.session.version == 2
        assert (await wire.open("tiny", version=1)).session.version == 1
        assert await wire.predict("tiny", x) != whole

        shutil.rmtree(tmp_path / "tiny" / "1")
        await _reload(server, wire, [("tiny", 2, True)])
        gone = Refusal("NOT_FOUND", "MODEL_NOT_FOUND")
        assert await refused(wire.open("tiny", version=1)) == gone
        health = await wire.health.Check(health_pb2.HealthCheckRequest(service="tiny/1"))
        assert health.status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        # Its session goes on, on its own weights.
        assert (await wire.step(session_id, 5, x[4:])).rows == whole[4 * 8 :]
        await wire.close(session_id)


async def test_health_of_a_name_outlives_one_of_its_versions(
    start_server: StartServer, tmp_path: Path
) -> None:
    add_model(tmp_path, "tiny", TINY, version=1, seed=1)
    add_model(tmp_path, "tiny", TINY, version=2, seed=2)
    server = start_server(models=tmp_path)
    async with Wire(server.address) as wire:
        shutil.rmtree(tmp_path / "tiny" / "1")
        await _reload(server, wire, [("tiny", 2, True)])

        async def status(service: str) -> int:
            answer = await wire.health.Check(health_pb2.HealthCheckRequest(service=service))
            return answer.status

        assert await status("tiny/2") == health_pb2.HealthCheckResponse.SERVING
        assert await status("tiny") == health_pb2.HealthCheckResponse.SERVING


async def test_broken_bundles_hide_no_sound_one(
    start_server: StartServer, rows: Rows, tmp_path: Path
) -> None:
    add_model(tmp_path, "sound", TINY)
    for name in ("no-weights", "cut-weights", "no-toml", "bad-toml", "unknown-key", "other-name"):
        add_model(tmp_path, name, WORDS)
    (tmp_path / "no-weights" / "weights.safetensors").unlink()
    weights = tmp_path / "cut-weights" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    (tmp_path / "no-toml" / "model.toml").unlink()
    (tmp_path / "bad-toml" / "model.toml").write_text("schema = [")
    with (tmp_path / "unknown-key" / "model.toml").open("a") as file:
        file.write('\n[surprise]\nkey = "value"\n')
    (tmp_path / "other-name").rename(tmp_path / "renamed")
    server = start_server(models=tmp_path, expected_errors=(PROBLEM,))
    problems = [line["problem"] for line in server.problems()]
    assert len(problems) == 6
    for name in ("no-weights", "cut-weights", "no-toml", "bad-toml", "unknown-key", "renamed"):
        assert sum(name in problem for problem in problems) == 1
    async with Wire(server.address) as wire:
        assert await _versions(wire) == [("sound", 1, True)]
        assert len(await wire.predict("sound", rows(3))) == 24
        for name in ("no-weights", "renamed", "words"):
            assert await refused(wire.open(name)) == Refusal("NOT_FOUND", "MODEL_NOT_FOUND")
        # Mended, they are served after the next look.
        shutil.rmtree(tmp_path / "bad-toml")
        add_model(tmp_path, "bad-toml", DEEP)
        await _reload(server, wire, [("bad-toml", 1, True), ("sound", 1, True)])


async def test_weights_are_not_swapped_under_a_version(
    start_server: StartServer, rows: Rows, tmp_path: Path
) -> None:
    add_model(tmp_path, "tiny", TINY, seed=1)
    server = start_server(models=tmp_path, expected_errors=(PROBLEM,))
    async with Wire(server.address) as wire:
        whole = await wire.predict("tiny", rows(5))
        add_model(tmp_path, "tiny", TINY, seed=2)
        server.signal(signal.SIGHUP)
        await until(lambda: bool(server.problems()))
        assert "new version" in server.problems()[0]["problem"]
        assert await wire.predict("tiny", rows(5)) == whole


async def test_a_repository_that_vanishes_takes_nothing_out_of_service(
    start_server: StartServer, rows: Rows, tmp_path: Path
) -> None:
    folder = tmp_path / "models"
    add_model(folder, "tiny", TINY)
    server = start_server(models=folder, expected_errors=("the model repository cannot be read",))
    async with Wire(server.address) as wire:
        folder.rename(tmp_path / "away")
        server.signal(signal.SIGHUP)
        await until(lambda: bool(server.problems()))
        assert len(await wire.predict("tiny", rows(2))) == 16
        (tmp_path / "away").rename(folder)
        add_model(folder, "words", WORDS)
        await _reload(server, wire, [("tiny", 1, True), ("words", 1, True)])


async def test_a_repository_is_looked_through_regularly_if_asked_for(
    start_server: StartServer, tmp_path: Path
) -> None:
    add_model(tmp_path, "tiny", TINY)
    server = start_server({"models.reload_seconds": 0.1}, models=tmp_path)
    async with Wire(server.address) as wire:
        add_model(tmp_path, "words", WORDS)

        async def done() -> bool:
            return len(await _versions(wire)) == 2

        await until(done)


@pytest.mark.parametrize("name", ["letters", "temperature"])
async def test_a_shipped_model_answers_as_its_reference(
    start_server: StartServer, rows: Rows, name: str
) -> None:
    import numpy as np
    import torch

    from conveyor_models import load_bundle
    from tests.integration.conftest import ZOO
    from tests.integration.wire import floats

    server = start_server(models=ZOO)
    bundle = load_bundle(ZOO / name)
    x = rows(200, 5, vocabulary=96 if name == "letters" else 0)
    if name == "temperature":
        x[:, 0] = 55 + 10 * x[:, 0]
    _, expected = bundle.network(torch.float64).run(torch.from_numpy(x)[:, None])
    async with Wire(server.address) as wire, wire.stream() as stream:
        columns = bundle.spec.output_size
        opened = await stream.open(name)
        out = await stream.steps(opened.handle, 1, x[:77], columns)
        out += await stream.steps(opened.handle, 78, x[77:], columns)
        assert opened.session.session.model_digest == bundle.digest
        assert out == await wire.predict(name, x)
    difference = floats(out, columns) - expected[:, 0].numpy()
    error = np.linalg.norm(difference) / np.linalg.norm(expected[:, 0].numpy())
    assert error < 1e-6
