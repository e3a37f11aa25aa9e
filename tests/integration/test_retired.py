"""Sessions whose model version is out of service: described, resumed and stepped all the same."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from conveyor.v1 import model_pb2
from conveyor_client import ModelNotFound, aio
from tests.integration.bundles import TINY, add_model
from tests.integration.conftest import StartServer
from tests.integration.process import ServerProcess
from tests.integration.wire import Refusal, Wire, floats, refused, until

Rows = Callable[..., npt.NDArray[Any]]
WIDE: dict[str, Any] = {**TINY, "input": {"kind": "features", "size": 4}, "head": {"size": 5}}
"""Another shape than `tiny` has: rows of one are no rows of the other."""


async def _reload(server: ServerProcess, wire: Wire, expected: list[int]) -> None:
    async def done() -> bool:
        page = await wire.models.ListModels(model_pb2.ListModelsRequest())
        return [model.version for model in page.models if model.name == "tiny"] == expected

    server.signal(signal.SIGHUP)
    await until(done)


async def _model(wire: Wire, version: int) -> model_pb2.Model:
    request = model_pb2.GetModelRequest(name="tiny", version=version)
    return (await wire.models.GetModel(request)).model


async def test_a_session_is_resumed_on_its_own_version_in_service_or_not(
    start_server: StartServer, rows: Rows, tmp_path: Path
) -> None:
    add_model(tmp_path, "tiny", TINY, version=1, seed=1)
    add_model(tmp_path, "other", TINY)
    server = start_server(models=tmp_path)
    x = rows(8)
    async with Wire(server.address) as wire:
        whole = floats(await wire.predict("tiny", x), 2)
        old = await _model(wire, 1)
        async with (
            aio.Client(server.address) as client,
            client.session("tiny", session_id="kept") as session,
        ):
            assert np.array_equal(await session.step(x[:2]), whole[:2])
            await session.detach()

        add_model(tmp_path, "tiny", WIDE, version=2, seed=2)
        await _reload(server, wire, [1, 2])
        await _resume_and_step(server, x[2:4], whole[2:4])

        shutil.rmtree(tmp_path / "tiny" / "1")
        await _reload(server, wire, [2])
        described = await _model(wire, 1)
        assert (described.digest, described.newest) == (old.digest, False)
        assert (await _model(wire, 0)).version == 2
        await _resume_and_step(server, x[4:6], whole[4:6])

        shutil.rmtree(tmp_path / "tiny")
        await _reload(server, wire, [])
        assert (await _model(wire, 1)).digest == old.digest
        not_found = Refusal("NOT_FOUND", "MODEL_NOT_FOUND")
        assert await refused(_model(wire, 0)) == not_found
        await _resume_and_step(server, x[6:], whole[6:], by_name=True)

        await wire.close("kept")
        assert await refused(_model(wire, 1)) == not_found
        async with aio.Client(server.address) as client:
            for unknown in (client.session("tiny"), client.session("tiny", mode="create")):
                with pytest.raises(ModelNotFound) as caught:
                    await unknown.open()
                assert caught.value.reason == "MODEL_NOT_FOUND"


async def _resume_and_step(
    server: ServerProcess, x: npt.NDArray[Any], expected: npt.NDArray[Any], by_name: bool = False
) -> None:
    async with aio.Client(server.address) as client:
        named = client.session("tiny", session_id="kept", mode="resume")
        async with named if by_name else client.resume("kept") as session:
            assert session.model.version == 1
            assert np.array_equal(await session.step(x), expected)
            await session.detach()
