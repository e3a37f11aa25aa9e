"""What a lane and a session have to say to each other."""

from typing import Protocol

from conveyor.v1 import session_pb2
from conveyor_client._errors import ConveyorError


class Tenant(Protocol):
    """What a lane needs of a session."""

    output_row_bytes: int
    row_bytes: int
    heartbeat_seconds: float

    @property
    def established(self) -> bool:
        """Whether it was open before, so that it is to be resumed after a break."""
        ...

    @property
    def settled(self) -> bool:
        """Whether this connection owes it nothing more."""
        ...

    def open_request(self) -> session_pb2.OpenSessionRequest:
        """What opens it, for the first time or again."""
        ...

    def on_opened(self, handle: int, response: session_pb2.OpenSessionResponse) -> None:
        """It is open under this handle."""
        ...

    def on_results(self, entry: session_pb2.ResultsEntry, rows: bytes) -> bool:
        """A piece of results; False if it fits nothing that was sent."""
        ...

    def on_durable(self, step: int) -> None:
        """A checkpoint was written."""
        ...

    def on_failure(self, first_step: int, error: ConveyorError) -> None:
        """A chunk failed."""
        ...

    def on_closed(self, error: ConveyorError | None, applied_step: int) -> None:
        """The handle is gone: as asked, or for this reason."""
        ...

    def on_pause(self) -> None:
        """The connection is breaking off; wait for `on_opened`."""
        ...

    def on_refused(self, error: ConveyorError) -> None:
        """The server did not open it, or not again."""
        ...

    def on_lost(self, error: ConveyorError) -> None:
        """It will not be opened again."""
        ...
