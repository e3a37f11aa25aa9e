"""Building requests that more than one module sends."""

from collections.abc import Mapping

from google.protobuf.duration_pb2 import Duration

from conveyor.v1 import session_pb2
from conveyor_client._nouns import DurabilityValue, OpenModeValue


def make_open_request(
    *,
    model: str = "",
    version: int = 0,
    session_id: str = "",
    mode: OpenModeValue = session_pb2.OPEN_MODE_UNSPECIFIED,
    token: str = "",
    durability: DurabilityValue = session_pb2.DURABILITY_UNSPECIFIED,
    idle_seconds: float | None = None,
    memory: session_pb2.Memory | None = None,
    labels: Mapping[str, str] | None = None,
) -> session_pb2.OpenSessionRequest:
    """Builds the request that opens a session."""
    request = session_pb2.OpenSessionRequest(
        model=model,
        version=version,
        session_id=session_id,
        mode=mode,
        token=token,
        durability=durability,
        memory=memory,
        labels=labels,
    )
    if idle_seconds is not None:
        request.idle_ttl.CopyFrom(duration(idle_seconds))
    return request


def duration(seconds: float) -> Duration:
    """Converts seconds."""
    nanos = round(seconds * 1e9)
    return Duration(seconds=nanos // 1_000_000_000, nanos=nanos % 1_000_000_000)
