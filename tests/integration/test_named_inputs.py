"""Tables in any order of columns, against a real server of a shipped model."""

from __future__ import annotations

import shutil
from typing import Any

import numpy as np
import pandas as pd
import pytest

from conveyor_client import Client, InvalidShape
from tests.integration.conftest import ZOO, StartServer
from tests.integration.process import ServerProcess

LABELS = ["temperature_f", "day_sin", "day_cos", "half_day_sin", "half_day_cos"]


@pytest.fixture(scope="module")
def server(start_server: StartServer, tmp_path_factory: pytest.TempPathFactory) -> ServerProcess:
    models = tmp_path_factory.mktemp("models")
    shutil.copytree(ZOO / "temperature", models / "temperature")
    return start_server({"shutdown.grace_seconds": 2}, models=models)


def test_the_order_of_columns_changes_no_bit(server: ServerProcess) -> None:
    values = np.random.default_rng(0).normal([50, 0, 0, 0, 0], 1, (30, 5))
    frame = pd.DataFrame(values, columns=LABELS)
    shuffled = frame[LABELS[::-1]]
    with Client(server.address) as client:
        expected = client.predict("temperature", values)
        assert not np.allclose(expected, client.predict("temperature", values[:, ::-1]))
        for inputs in (frame, shuffled, shuffled.to_records(index=False), shuffled.to_dict("list")):
            found: Any = client.predict("temperature", inputs)
            np.testing.assert_array_equal(found, expected)
        with client.session("temperature") as session:
            chunk = session.step(shuffled[:10])
            rows = [session.step(row) for _, row in shuffled[10:20].iterrows()]
            streamed = list(session.stream(shuffled[20:]))
            np.testing.assert_array_equal(np.vstack([chunk, *rows, *streamed]), expected)
            with pytest.raises(InvalidShape, match="unknown column: humidity"):
                session.step(frame.assign(humidity=1.0))
            with pytest.raises(InvalidShape, match="missing column: day_cos"):
                session.step(frame.drop(columns="day_cos"))
            assert session.applied_step == 30
