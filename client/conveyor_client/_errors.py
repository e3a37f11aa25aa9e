"""What can go wrong, as exceptions.

ConveyorError
├── NotFound
│   ├── ModelNotFound
│   └── SessionNotFound
│       └── SessionEnded              expired, closed or evicted
├── OwnershipLost                     somebody else has the session now
│   ├── SessionSuperseded
│   ├── SessionFenced
│   └── SessionMoved
├── SessionExists
├── SessionMismatch
├── StepRefused
│   ├── StepGap
│   ├── StepConflict
│   └── StepResultNotHeld
├── InvalidInput
│   ├── InvalidField
│   ├── InvalidShape
│   ├── NonFiniteInput
│   ├── TokenOutOfRange
│   ├── EmptyChunk
│   ├── ChunkTooLong
│   ├── InvalidMemory
│   ├── MessageTooLarge
│   └── InvalidToken
├── LimitExceeded                     full for now; says when to come back
├── DeadlineExceeded
├── NotSupported
│   ├── ModelNotStreamable
│   └── ModelNotGenerative
├── Unavailable
│   ├── ServerDraining
│   ├── StoreUnavailable
│   └── TransportError                the connection broke or never stood
├── DataLoss
│   ├── SessionQuarantined
│   ├── SnapshotCorrupt
│   ├── ServerRestarted               the session was in the memory of an earlier process
│   └── StoreLostWrites
├── SnapshotIncompatible
├── CheckpointNotRetained
├── ServerError
│   └── EngineFailed
├── Unauthenticated
└── NotOpen                           used before it was opened or after it was closed
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar, Final

import grpc

NOT_OPENED: Final = (
    "the session is not open: call session.open() first, or use it in a with block"
    " (with conveyor_client.aio: await session.open(), or async with)"
)


class ConveyorError(Exception):
    """Base of everything this package raises on purpose.

    Attributes:
        reason: A name from the contract's closed enum `ErrorReason` without its prefix, for example
            "STEP_GAP"; "TRANSPORT" where the connection and not the server spoke, "CLIENT" where
            this library refused by itself, "UNSPECIFIED" where the server gave no reason.
        code: The gRPC status code.
        retryable: Whether the same request can succeed later without any change.
        retry_after_seconds: How long the server asks to wait first, or None.
        metadata: What the server added to the reason, such as {"expected_step": "7"}.
    """

    retryable_by_nature: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        reason: str = "CLIENT",
        code: grpc.StatusCode = grpc.StatusCode.UNKNOWN,
        retry_after_seconds: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.code = code
        self.retry_after_seconds = retry_after_seconds
        self.metadata: Mapping[str, str] = MappingProxyType(dict(metadata or {}))

    @property
    def retryable(self) -> bool:
        """Whether the same request can succeed later without any change."""
        return self.retryable_by_nature or self.retry_after_seconds is not None

    def copy(self) -> "ConveyorError":
        """Returns an equal error without traceback, so that each waiter can raise one of its own.

        Returns:
            A new error of the same class.
        """
        return type(self)(
            str(self),
            reason=self.reason,
            code=self.code,
            retry_after_seconds=self.retry_after_seconds,
            metadata=self.metadata,
        )


class NotFound(ConveyorError):
    """There is no such thing, or it is not the caller's."""


class ModelNotFound(NotFound):
    """The server has no model of that name or version."""


class SessionNotFound(NotFound):
    """There is no such session, or it belongs to somebody else."""


class SessionEnded(SessionNotFound):
    """The caller's own session has ended: it expired, was closed or was evicted."""

    @property
    def ending(self) -> str:
        """How it ended: "expired", "closed" or "evicted"."""
        return self.reason.removeprefix("SESSION_").lower()


class OwnershipLost(ConveyorError):
    """The session is still alive, but this client no longer owns it."""


class SessionSuperseded(OwnershipLost):
    """A newer stream or call has opened the session; this client does not take it back."""


class SessionFenced(OwnershipLost):
    """Another server has claimed the session; open it again."""


class SessionMoved(OwnershipLost):
    """The session is on another server now; open it again."""

    retryable_by_nature = True


class SessionExists(ConveyorError):
    """The id is taken."""


class SessionMismatch(ConveyorError):
    """The session exists with another model, version or option than the request names."""


class StepRefused(ConveyorError):
    """The number of a step does not fit the session, whose state is unchanged."""


class StepGap(StepRefused):
    """The chunk begins beyond the next step."""

    @property
    def expected_step(self) -> int:
        """The number the next step must have; 0 if the server did not say."""
        return int(self.metadata.get("expected_step", "0"))


class StepConflict(StepRefused):
    """A step was sent again with different input."""


class StepResultNotHeld(StepRefused):
    """A step was sent again, and its result is no longer kept."""


class InvalidInput(ConveyorError):
    """The request cannot succeed as it is."""


class InvalidField(InvalidInput):
    """A field is missing, malformed or out of its range."""

    @property
    def field(self) -> str:
        """The field's name; empty if the server did not say."""
        return self.metadata.get("field", "")


class InvalidShape(InvalidInput):
    """The array does not have the shape or type of this model's rows."""


class NonFiniteInput(InvalidInput):
    """A feature is NaN or infinite."""


class TokenOutOfRange(InvalidInput):
    """A token is outside the model's vocabulary."""


class EmptyChunk(InvalidInput):
    """The chunk has no steps."""


class ChunkTooLong(InvalidInput):
    """The chunk has more steps than the server's limit."""


class InvalidMemory(InvalidInput):
    """The model needs an attention memory and got none, or takes none and got one."""


class MessageTooLarge(InvalidInput):
    """A message is larger than the other side's limit."""


class InvalidToken(InvalidInput):
    """The session token is malformed."""


class LimitExceeded(ConveyorError):
    """A limit has been reached; `retry_after_seconds` says when to try again."""

    retryable_by_nature = True


class DeadlineExceeded(ConveyorError):
    """The call took longer than its timeout.

    With the server's reason the chunk was not run. Where this client's own clock ran out (reason
    "CLIENT") the chunk may still run; the session keeps its numbers straight either way.
    """

    retryable_by_nature = True


class NotSupported(ConveyorError):
    """This server, as configured, does not do this."""


class ModelNotStreamable(NotSupported):
    """The model takes whole sequences only: use `predict`."""


class ModelNotGenerative(NotSupported):
    """The model's output cannot be fed back as its input."""


class Unavailable(ConveyorError):
    """No server can answer at the moment."""

    retryable_by_nature = True


class ServerDraining(Unavailable):
    """The server is shutting down."""


class StoreUnavailable(Unavailable):
    """The server's store does not answer."""


class TransportError(Unavailable):
    """The server cannot be reached, or the connection broke."""


class DataLoss(ConveyorError):
    """State or data that should exist is gone."""


class SessionQuarantined(DataLoss):
    """The state became NaN or infinite; reset or close the session."""


class SnapshotCorrupt(DataLoss):
    """A snapshot or checkpoint is truncated or its checksum does not match."""


class ServerRestarted(DataLoss):
    """The session was opened before the server restarted, and its state was in memory only."""


class StoreLostWrites(DataLoss):
    """The session was opened before the server restarted, and its state is gone."""


class SnapshotIncompatible(ConveyorError):
    """The snapshot is of another model digest, layout, data type or format version."""


class CheckpointNotRetained(ConveyorError):
    """No checkpoint of that step is retained."""


class ServerError(ConveyorError):
    """The server failed through no fault of the caller."""


class EngineFailed(ServerError):
    """The engine failed on this batch; the session is unchanged."""

    retryable_by_nature = True


class Unauthenticated(ConveyorError):
    """The credentials are missing, malformed or unknown."""


class NotOpen(ConveyorError):
    """A client or session was used before it was opened or after it was closed."""
