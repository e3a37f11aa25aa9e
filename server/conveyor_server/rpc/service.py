"""What every servicer is given."""

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from grpc import aio

from conveyor_server.admission.admission import Admission
from conveyor_server.clock import Clock
from conveyor_server.config import Config
from conveyor_server.engine.port import Engine
from conveyor_server.errors import ConveyorError
from conveyor_server.metrics import Metrics
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
    tracing: "Tracing | None" = None
    """None: nothing is traced."""


class Waiter:
    """A reply that a coroutine waits for."""

    def __init__(self) -> None:
        """On the running loop."""
        self._future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.reply = Collected(self._settle)

    async def wait(self) -> Collected:
        """Returns the whole answer, or raises the error it failed with."""
        await self._future
        return self.reply

    def _settle(self, error: ConveyorError | None) -> None:
        if self._future.done():  # the call was cancelled
            return
        if error is None:
            self._future.set_result(None)
        else:
            self._future.set_exception(error)
