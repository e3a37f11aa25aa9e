"""The frames of StreamSteps beside results, made from core nouns as they are written.

The scheduler leaves nouns in the outbox. One that cannot be converted then ends the stream it was
for, not the tick.
"""

from google.rpc import status_pb2

from conveyor.v1 import session_pb2
from conveyor_server.config import LimitsConfig
from conveyor_server.core import Opened
from conveyor_server.errors import ConveyorError
from conveyor_server.rpc.convert import duration, opened_message
from conveyor_server.rpc.status import ok, status_of

Frame = session_pb2.StreamStepsResponse


def failure(
    error: ConveyorError | status_pb2.Status, handle: int = 0, first_step: int = 0, tag: int = 0
) -> Frame:
    """Something failed; a status that goes to many is made once."""
    status = status_of(error) if isinstance(error, ConveyorError) else error
    return Frame(
        failure=session_pb2.FailureFrame(
            handle=handle, status=status, first_step=first_step, tag=tag
        )
    )


def opened(answer: Opened, limits: LimitsConfig, tag: int, handle: int) -> Frame:
    """A session is open under this handle."""
    message = opened_message(answer, limits)
    return Frame(opened=session_pb2.OpenedFrame(tag=tag, handle=handle, session=message))


def closed(handle: int, applied_step: int, error: ConveyorError | None) -> Frame:
    """A handle is gone; without an error the client asked for it."""
    status = ok() if error is None else status_of(error)
    return Frame(
        closed=session_pb2.ClosedFrame(handle=handle, status=status, applied_step=applied_step)
    )


def heartbeat(nonce: int) -> Frame:
    """Answers a heartbeat."""
    return Frame(heartbeat=session_pb2.HeartbeatFrame(nonce=nonce))


def drain(reconnect_after_seconds: float) -> Frame:
    """The server is stopping."""
    return Frame(drain=session_pb2.DrainFrame(reconnect_after=duration(reconnect_after_seconds)))
