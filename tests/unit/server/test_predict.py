"""Predict: the version that the rows were checked against is the version that runs.

And nothing is left of a call, whenever it ends.
"""

import asyncio
from dataclasses import replace
from typing import Any, cast

import pytest

from conveyor.v1 import session_pb2
from conveyor_server.admission.admission import Admission
from conveyor_server.config import Config, LimitsConfig
from conveyor_server.core import ModelKey
from conveyor_server.errors import ModelNotFound
from conveyor_server.metrics import Metrics
from conveyor_server.rpc.predict import predict
from conveyor_server.rpc.results import ResultsBudget
from conveyor_server.rpc.service import Services
from tests.support.clock import FakeClock
from tests.support.models import ATTENTIVE, FEATURES
from tests.support.rig import Rig, rows_of

NEWER = replace(FEATURES, key=ModelKey(FEATURES.key.name, 2), input_size=5, digest="sha256:02")


class _Driver:
    """Something else is taken into or out of service between a check and the next operation."""

    def __init__(self, rig: Rig, meanwhile: Any) -> None:
        self._rig = rig
        self.cancelled = False
        """Whether the caller goes away while it waits for an operation."""
        self._meanwhile = meanwhile

    def model(self, name: str, version: int) -> Any:
        return self._rig.models.resolve(name, version)

    async def call(self, operation: Any) -> Any:
        self._meanwhile()
        result = operation(self._rig.operations)
        if self.cancelled:
            raise asyncio.CancelledError
        return result

    def submit(self, chunk: Any) -> None:
        self._rig.scheduler.inbox.put(chunk)
        while (batch := self._rig.scheduler.begin()) is not None:
            self._rig.scheduler.finish(batch, self._rig.scheduler.execute(batch))

    def post(self, operation: Any) -> None:
        operation(self._rig.operations)


def _services(rig: Rig, meanwhile: Any) -> Services:
    driver, engine = cast(Any, _Driver(rig, meanwhile)), cast(Any, rig.engine)
    admission = Admission(LimitsConfig())
    config = Config()
    results = ResultsBudget(config.limits)
    return Services(config, admission, driver, engine, Metrics(), FakeClock(), "cpu", results)


REQUEST = session_pb2.PredictRequest(
    model=FEATURES.key.name, length=3, rows=rows_of(FEATURES, 1, 2, 3)
)


async def test_a_version_that_came_meanwhile_does_not_run() -> None:
    rig = Rig(models=(FEATURES, NEWER))
    rig.models.retire(NEWER.key)
    answer = await predict(_services(rig, lambda: rig.models.add(NEWER)), "ann", REQUEST)
    assert rig.models.newest(NEWER)
    assert (answer.version, answer.rows_length) == (1, 3)
    assert len(answer.rows) == 3 * FEATURES.output_row_bytes


async def test_a_version_that_went_meanwhile_is_not_replaced_by_another() -> None:
    rig = Rig(models=(FEATURES, replace(NEWER, key=ModelKey(FEATURES.key.name, 3))))
    rig.models.retire(ModelKey(FEATURES.key.name, 3))

    def swap() -> None:
        rig.models.add(replace(NEWER, key=ModelKey(FEATURES.key.name, 3)))
        rig.models.retire(FEATURES.key)

    with pytest.raises(ModelNotFound):
        await predict(_services(rig, swap), "ann", REQUEST)


async def test_a_caller_that_goes_while_its_session_is_opened_leaves_none() -> None:
    rig = Rig(models=(ATTENTIVE,))
    services = _services(rig, lambda: None)
    cast(Any, services.driver).cancelled = True
    memory = session_pb2.Memory(length=2, rows=bytes(2 * ATTENTIVE.memory_row_bytes))
    name, rows = ATTENTIVE.key.name, rows_of(ATTENTIVE, 1)
    request = session_pb2.PredictRequest(model=name, length=1, rows=rows, memory=memory)
    with pytest.raises(asyncio.CancelledError):
        await predict(services, "ann", request)
    assert not list(rig.scheduler.sessions)
    assert rig.scheduler.memories.size_bytes == 0
