"""What every servicer is given."""

import asyncio
import uuid
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from grpc import aio

from conveyor_server.admission.admission import Admission
from conveyor_server.clock import Clock
from conveyor_server.config import Config
from conveyor_server.core import MemoryRows, OpenMode, OpenRequest, SessionView
from conveyor_server.engine.port import Engine
from conveyor_server.errors import ConveyorError
from conveyor_server.metrics import Metrics
from conveyor_server.rpc.results import ResultsBudget
from conveyor_server.scheduler.collected import Collected
from conveyor_server.scheduler.driver import Driver

if TYPE_CHECKING:  # it needs an extra
    from conveyor_server.rpc.tracing import Tracing

Context: TypeAlias = "aio.ServicerContext[Any, Any]"
"""What grpc hands to every handler."""


@dataclass(frozen=True, slots=True)
class Services:
    """The rooms below the door."""

    config: Config
    admission: Admission
    driver: Driver
    engine: Engine
    metrics: Metrics
    clock: Clock
    device: str
    results: ResultsBudget
    tracing: "Tracing | None" = None
    """None: nothing is traced."""


@asynccontextmanager
async def session_for_call(
    services: Services, caller: str, model: str, version: int, memory: MemoryRows | None
) -> AsyncGenerator[SessionView]:
    """A session made for one call, which ends with it.

    Raises:
        ConveyorError: As `Operations.open`.
    """
    # It is named here: of a call that is cancelled while it is opened, nobody learns its name.
    session_id = uuid.uuid4().hex
    wanted = OpenRequest(
        caller, session_id, model, version, OpenMode.CREATE, ephemeral=True, memory=memory
    )
    try:
        yield (await services.driver.call(lambda operations: operations.open(wanted))).view
    finally:
        services.driver.post(lambda operations: operations.discard(caller, session_id))


class Waiter:
    """A reply that a coroutine waits for.

    Neither the reply nor what resolves it knows the waiter: in a circle, the answer would stay in
    memory until the garbage collector comes by.
    """

    def __init__(self) -> None:
        """On the running loop."""
        self._future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.reply = Collected(partial(_resolve, self._future))

    async def wait(self) -> Collected:
        """Returns the whole answer, or raises the error it failed with."""
        await self._future
        return self.reply


def _resolve(future: "asyncio.Future[None]", error: ConveyorError | None) -> None:
    if future.done():  # the call was cancelled
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)
