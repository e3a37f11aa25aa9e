"""grpc.health.v1: what serves, by name."""

from typing import Any, cast

from grpc_health.v1 import health, health_pb2

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN

_messages = cast(Any, health_pb2)  # its types lack those of List

Status = health_pb2.HealthCheckResponse.ServingStatus.ValueType


class Health(health.aio.HealthServicer):
    """Check and Watch of the library, with List, which it does not have."""

    def __init__(self) -> None:
        """Nothing serves yet."""
        super().__init__()
        self._statuses: dict[str, Status] = {}
        self._draining = False

    async def set(self, service: str, status: Status) -> None:
        """Sets the status of one name; does nothing while draining."""
        if not self._draining:
            self._statuses[service] = status
        await super().set(service, status)

    async def enter_graceful_shutdown(self) -> None:
        """From now on nothing serves."""
        self._draining = True
        for service, status in self._statuses.items():
            if status != SERVICE_UNKNOWN:
                self._statuses[service] = NOT_SERVING
        await super().enter_graceful_shutdown()

    async def List(self, request: Any, context: Any) -> Any:
        """The status of each name that Check knows."""
        statuses = {
            service: health_pb2.HealthCheckResponse(status=status)
            for service, status in self._statuses.items()
            if status != SERVICE_UNKNOWN
        }
        return _messages.HealthListResponse(statuses=statuses)
