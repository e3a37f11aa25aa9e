"""What a session is opened with: the model asked for, and the request, the first time and again."""

from typing import Protocol

from conveyor.v1 import session_pb2
from conveyor_client._errors import MessageTooLarge, ModelNotFound
from conveyor_client._home import Home
from conveyor_client._lane import Lane
from conveyor_client._nouns import ModelInfo
from conveyor_client._policy import Options

_OPEN_OVERHEAD_BYTES = 64  # what an open frame holds beside the request, at its longest


class Hub(Protocol):
    """What an attachment needs of the client."""

    options: Options

    @property
    def home(self) -> Home:
        """Where the client may be used."""
        ...

    async def cached_model(self, name: str, version: int, *, digest: str = "") -> ModelInfo:
        """Describes a model."""
        ...

    def lane_for(self, model: ModelInfo | None, *, own_key: str = "") -> Lane:
        """Finds a stream with room."""
        ...


async def requested_model(hub: Hub, request: session_pb2.OpenSessionRequest) -> ModelInfo | None:
    """The model asked for: its limits say how many sessions a stream carries.

    Returns:
        The model; None if none is named, or if it is out of service and a session may still run on
        it.

    Raises:
        ModelNotFound: There is none to create a session on.
    """
    if not request.model:
        return None
    try:
        return await hub.cached_model(request.model, request.version)
    except ModelNotFound:
        if request.mode == session_pb2.OPEN_MODE_CREATE:
            raise
        return None


def check_size(request: session_pb2.OpenSessionRequest, model: ModelInfo | None) -> None:
    """Refuses a memory that fits no message: on a stream it would end every session there.

    Raises:
        MessageTooLarge: It is above what the server takes.
    """
    bytes_max = model.limits.message_bytes_max if model is not None else 0
    size = request.ByteSize() + _OPEN_OVERHEAD_BYTES
    if bytes_max and size > bytes_max:
        raise MessageTooLarge(
            f"opening with this memory takes {size:,} bytes (the server's"
            " limits.message_bytes_max is"
            f" {bytes_max:,})",
            reason="MESSAGE_TOO_LARGE",
        )


def again(
    request: session_pb2.OpenSessionRequest, answer: session_pb2.OpenSessionResponse
) -> session_pb2.OpenSessionRequest:
    """The request that resumes a session, from the one that opened it and what was answered."""
    resuming = session_pb2.OpenSessionRequest()
    resuming.CopyFrom(request)
    resuming.ClearField("memory")
    resuming.session_id = answer.session.session_id
    resuming.model, resuming.version = answer.session.model, answer.session.version
    resuming.mode = session_pb2.OPEN_MODE_RESUME
    resuming.token = answer.token
    return resuming
