"""A client whose chunk runs out of time, against a real server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from conveyor_client import Client, DeadlineExceeded
from tests.integration.process import ServerProcess


def test_the_step_after_a_chunk_that_timed_out_runs_behind_what_was_applied(
    server: ServerProcess, rows: Callable[..., npt.NDArray[Any]]
) -> None:
    inputs = rows(60_000)
    one = rows(1, seed=1)[0]
    applied: list[npt.NDArray[Any]] = []
    said: list[npt.NDArray[Any]] = []
    with Client(server.address) as client:
        with client.session("tiny") as session:
            for _ in range(8):
                before = session.applied_step
                with pytest.raises(DeadlineExceeded):
                    session.step(inputs, timeout_seconds=0.02)
                said.append(session.step(one))
                applied += [*inputs[: session.applied_step - before - 1], one]
        with client.session("tiny") as session:
            expected = session.step(np.stack(applied), output="last")
    np.testing.assert_array_equal(said[-1], expected)
