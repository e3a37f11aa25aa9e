"""Models whose sessions do not begin with zeros: what was never stepped begins where they say."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch

from conveyor.v1 import session_pb2
from conveyor_models import Bundle
from tests.integration.bundles import add_model
from tests.integration.conftest import StartServer
from tests.integration.process import ServerProcess
from tests.integration.wire import Wire, floats

BIASED: Final[dict[str, Any]] = {
    "input": {"kind": "features", "size": 3},
    "layers": [
        {"cell": "lstm", "size": 9, "initial_state": True},
        {"cell": "gru", "size": 2, "initial_state": True},
    ],
}
X: Final = np.random.default_rng(0).standard_normal((6, 3), dtype=np.float32)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return add_model(tmp_path_factory.mktemp("biased"), "biased", BIASED, seed=5)


@pytest.fixture(scope="module")
def server(start_server: StartServer, bundle: Bundle) -> ServerProcess:
    folder: Path = bundle.path.parent
    return start_server({"engine.slots": 2, "shutdown.grace_seconds": 2}, models=folder)


@pytest.fixture
async def wire(server: ServerProcess) -> AsyncIterator[Wire]:
    async with Wire(server.address) as connected:
        yield connected


@pytest.fixture
async def expected(wire: Wire, bundle: Bundle) -> bytes:
    """The outputs of a session that is opened and stepped."""
    _, y = bundle.network().run(torch.from_numpy(X.copy()).unsqueeze(1))
    rows = await wire.predict("biased", X)
    np.testing.assert_allclose(floats(rows, 2), y.squeeze(1).numpy(), rtol=1e-4, atol=1e-5)
    return rows


async def _outputs(wire: Wire, session_id: str) -> bytes:
    request = session_pb2.StepRequest(
        session_id=session_id, first_step=1, length=len(X), rows=X.tobytes()
    )
    return (await wire.sessions.Step(request)).rows


async def test_a_snapshot_taken_before_the_first_step(wire: Wire, expected: bytes) -> None:
    snapshot = await wire.export(await wire.new_session("biased"))
    request = session_pb2.ImportSessionRequest(snapshot=snapshot, session_id="imported")
    await wire.sessions.ImportSession(request)
    assert await _outputs(wire, "imported") == expected


async def test_a_fork_taken_before_the_first_step(wire: Wire, expected: bytes) -> None:
    request = session_pb2.ForkSessionRequest(
        session_id=await wire.new_session("biased"), new_session_ids=["forked"]
    )
    await wire.sessions.ForkSession(request)
    assert await _outputs(wire, "forked") == expected


async def test_a_reset(wire: Wire, expected: bytes) -> None:
    session_id = await wire.new_session("biased")
    assert await _outputs(wire, session_id) == expected
    await wire.sessions.ResetSession(session_pb2.ResetSessionRequest(session_id=session_id))
    assert await _outputs(wire, session_id) == expected


async def test_a_session_in_a_slot_that_others_had(wire: Wire, expected: bytes) -> None:
    ids = [await wire.new_session("biased") for _ in range(5)]
    assert [await _outputs(wire, each) for each in ids] == [expected] * 5
