"""Everything that can go wrong for a caller, as one tree.

    ConveyorError
    ├── NotFound
    │   ├── ModelNotFound
    │   ├── SessionNotFound          never existed, or somebody else's
    │   └── SessionEnded
    │       ├── SessionExpired
    │       ├── SessionClosed
    │       └── SessionEvicted
    ├── InvalidInput
    │   ├── InvalidField
    │   ├── InvalidShape
    │   ├── NonFiniteInput
    │   ├── TokenOutOfRange
    │   ├── EmptyChunk
    │   ├── ChunkTooLong
    │   ├── UnknownHandle
    │   ├── InvalidMemory
    │   └── InvalidToken
    ├── Conflict
    │   ├── SessionExists
    │   ├── SessionSuperseded
    │   ├── SessionFenced
    │   └── StepConflict
    ├── Precondition
    │   ├── ModelNotStreamable
    │   ├── ModelNotGenerative
    │   ├── SessionMismatch
    │   ├── SnapshotIncompatible
    │   ├── CheckpointNotRetained
    │   ├── StepGap
    │   └── StepResultNotHeld
    ├── LimitExceeded
    │   ├── MessageTooLarge
    │   ├── SessionsLimit
    │   ├── PrincipalSessionsLimit
    │   ├── StreamSessionsLimit
    │   ├── StepsInFlightLimit
    │   ├── InboxFull
    │   ├── StreamsLimit
    │   ├── CallsLimit
    │   ├── MemoryTooLarge
    │   ├── SlowReader
    │   └── DeviceOutOfMemory
    ├── DataLost
    │   ├── SessionQuarantined
    │   ├── SnapshotCorrupt
    │   ├── ServerRestarted
    │   └── StoreLostWrites
    ├── Unavailable
    │   ├── ServerDraining
    │   ├── SessionMoved
    │   └── StoreUnavailable
    ├── DeadlineExceeded
    ├── EngineFailed
    ├── NotSupported
    ├── Unauthenticated
    └── Internal

Each leaf owns the reason sent to the caller and how long to wait before another try, if another try
can help. Which gRPC status goes with which branch is the business of `rpc.status` alone. Messages
are written for the caller: they never hold paths, tracebacks or another caller's data.
"""

from typing import ClassVar


def limit_text(limit: str, maximum: object, model: str = "") -> str:
    """As in "limits.sessions_max is 100,000".

    Args:
        limit: The setting.
        maximum: Its value.
        model: The model whose own `[limits]` set it; empty where the server's settings did.
    """
    if isinstance(maximum, float) and maximum.is_integer():
        maximum = int(maximum)
    value = f"{maximum:,}" if isinstance(maximum, int | float) else str(maximum)
    return f"{limit} is {value}{f' in the model.toml of {model!r}' if model else ''}"


class ConveyorError(Exception):
    """The root. Instances of leaves only are raised.

    Attributes:
        reason: The name of the `conveyor.v1.ErrorReason` value, without its prefix.
        retry_after_seconds: How long to wait before trying again, or None where trying again cannot
            help.
        metadata: Facts for programs, such as `expected_step`; sent in `google.rpc.ErrorInfo`.
    """

    reason: ClassVar[str]
    retry_after_seconds: ClassVar[float | None] = None

    def __init__(self, message: str, **metadata: object) -> None:
        """Keeps the message and, as strings, the metadata."""
        super().__init__(message)
        self.message = message
        self.metadata = {key: str(value) for key, value in metadata.items()}


class NotFound(ConveyorError):
    """What was named is not there."""


class ModelNotFound(NotFound):
    """No model of that name, or not in that version."""

    reason = "MODEL_NOT_FOUND"

    def __init__(self, message: str, *, hint: str = "", **metadata: object) -> None:
        """`hint` says what there is instead."""
        super().__init__(f"{message}; {hint}" if hint else message, **metadata)
        self.hint = hint


class SessionNotFound(NotFound):
    """No such session for this principal."""

    reason = "SESSION_NOT_FOUND"

    def __init__(self, session_id: str) -> None:
        """The same words whether the session never existed or is somebody else's."""
        super().__init__(f"there is no session {session_id!r}")


class SessionEnded(NotFound):
    """The principal's own session, ended."""


class SessionExpired(SessionEnded):
    """Its lease ran out."""

    reason = "SESSION_EXPIRED"


class SessionClosed(SessionEnded):
    """The principal closed it."""

    reason = "SESSION_CLOSED"


class SessionEvicted(SessionEnded):
    """The server ended it to make room."""

    reason = "SESSION_EVICTED"


class InvalidInput(ConveyorError):
    """The request is invalid, whatever the state of the server."""


class InvalidField(InvalidInput):
    """A field is missing, malformed or out of its range."""

    reason = "INVALID_FIELD"

    def __init__(self, field: str, problem: str) -> None:
        """`field` is the name in the contract."""
        super().__init__(f"{field}: {problem}", field=field)


class InvalidShape(InvalidInput):
    """The byte count is not what the declared steps take."""

    reason = "INVALID_SHAPE"


class NonFiniteInput(InvalidInput):
    """A feature is NaN or infinite."""

    reason = "NON_FINITE_INPUT"


class TokenOutOfRange(InvalidInput):
    """A token is outside the vocabulary."""

    reason = "TOKEN_OUT_OF_RANGE"


class EmptyChunk(InvalidInput):
    """A chunk without steps or a frame without entries."""

    reason = "EMPTY_CHUNK"


class ChunkTooLong(InvalidInput):
    """More steps, or more bytes of results, in one chunk than a limit allows."""

    reason = "CHUNK_TOO_LONG"

    def __init__(self, message: str, *, limit: str, maximum: object, model: str = "") -> None:
        """As `LimitExceeded`; with `model` the limit is that model's own."""
        super().__init__(
            f"{message} ({limit_text(limit, maximum, model)})", limit=limit, maximum=maximum
        )


class UnknownHandle(InvalidInput):
    """The stream has no open session under that handle."""

    reason = "UNKNOWN_HANDLE"


class InvalidMemory(InvalidInput):
    """An attention memory where none belongs, or none where one does."""

    reason = "INVALID_MEMORY"


class InvalidToken(InvalidInput):
    """The session token is malformed."""

    reason = "INVALID_TOKEN"


class Conflict(ConveyorError):
    """Two callers, or two requests, disagree."""


class SessionExists(Conflict):
    """The id is taken."""

    reason = "SESSION_EXISTS"


class SessionSuperseded(Conflict):
    """A newer open took the session over."""

    reason = "SESSION_SUPERSEDED"


class SessionFenced(Conflict):
    """Another server claimed the session."""

    reason = "SESSION_FENCED"


class StepConflict(Conflict):
    """A step was sent again with different input."""

    reason = "STEP_CONFLICT"


class Precondition(ConveyorError):
    """The request is valid, but not in the current state."""


class ModelNotStreamable(Precondition):
    """The model has bidirectional or reverse layers."""

    reason = "MODEL_NOT_STREAMABLE"


class ModelNotGenerative(Precondition):
    """The output cannot be fed back as input."""

    reason = "MODEL_NOT_GENERATIVE"


class SessionMismatch(Precondition):
    """The session exists with another model, version or option."""

    reason = "SESSION_MISMATCH"


class SnapshotIncompatible(Precondition):
    """The snapshot is of another model, layout or format."""

    reason = "SNAPSHOT_INCOMPATIBLE"


class CheckpointNotRetained(Precondition):
    """No checkpoint of that step is kept."""

    reason = "CHECKPOINT_NOT_RETAINED"


class StepGap(Precondition):
    """The chunk begins beyond the next step."""

    reason = "STEP_GAP"

    def __init__(self, first_step: int, expected_step: int) -> None:
        """Names the step that is expected."""
        super().__init__(
            f"the chunk starts at step {first_step}, but the next step is {expected_step}",
            expected_step=expected_step,
        )


class StepResultNotHeld(Precondition):
    """The step ran earlier and its result is no longer kept."""

    reason = "STEP_RESULT_NOT_HELD"


class LimitExceeded(ConveyorError):
    """A named limit was reached; nothing was changed."""

    retry_after_seconds = 1.0

    def __init__(self, message: str, *, limit: str, maximum: object, model: str = "") -> None:
        """The message ends with the limit and its value.

        Args:
            message: What happened.
            limit: The setting's name.
            maximum: Its value.
            model: The model whose own `[limits]` set it; empty where the server's settings did.
        """
        super().__init__(
            f"{message} ({limit_text(limit, maximum, model)})", limit=limit, maximum=maximum
        )


class MessageTooLarge(LimitExceeded):
    """The message is larger than the limit."""

    reason = "MESSAGE_TOO_LARGE"
    retry_after_seconds = None


class SessionsLimit(LimitExceeded):
    """The server has reached its number of sessions, or has no memory for more."""

    reason = "SESSIONS_LIMIT"


class PrincipalSessionsLimit(LimitExceeded):
    """The principal has reached its number of sessions."""

    reason = "PRINCIPAL_SESSIONS_LIMIT"


class StreamSessionsLimit(LimitExceeded):
    """The stream has reached its number of sessions."""

    reason = "STREAM_SESSIONS_LIMIT"


class StepsInFlightLimit(LimitExceeded):
    """The session has too many steps that are not answered yet."""

    reason = "STEPS_IN_FLIGHT_LIMIT"
    retry_after_seconds = 0.05


class InboxFull(LimitExceeded):
    """The scheduler's inbox is full."""

    reason = "INBOX_FULL"
    retry_after_seconds = 0.1


class StreamsLimit(LimitExceeded):
    """The server has reached its number of streams."""

    reason = "STREAMS_LIMIT"


class CallsLimit(LimitExceeded):
    """The server handles as many calls, or as many bytes of requests, as it may."""

    reason = "CALLS_LIMIT"
    retry_after_seconds = 0.5


class MemoryTooLarge(LimitExceeded):
    """The attention memory has too many rows."""

    reason = "MEMORY_TOO_LARGE"
    retry_after_seconds = None


class SlowReader(LimitExceeded):
    """The client does not read its results."""

    reason = "SLOW_READER"


class DeviceOutOfMemory(LimitExceeded):
    """The device, or the server itself, has no memory left."""

    reason = "DEVICE_OUT_OF_MEMORY"

    def __init__(self, device: str) -> None:
        """`device` is the one that is full."""
        ConveyorError.__init__(
            self,
            f"{device} is out of memory; try again later, or lower engine.slots or"
            " engine.batch_sessions_max",
            limit="device memory",
            maximum=device,
        )


class DataLost(ConveyorError):
    """State that was promised is not there."""


class SessionQuarantined(DataLost):
    """The carry became non-finite."""

    reason = "SESSION_QUARANTINED"


class SnapshotCorrupt(DataLost):
    """A snapshot or checkpoint is damaged."""

    reason = "SNAPSHOT_CORRUPT"


class ServerRestarted(DataLost):
    """The token is of an earlier process, and sessions were in its memory only."""

    reason = "SERVER_RESTARTED"


class StoreLostWrites(DataLost):
    """The token comes from an earlier run of the server."""

    reason = "STORE_LOST_WRITES"


class Unavailable(ConveyorError):
    """Not here or not now; another try helps."""

    retry_after_seconds = 1.0


class ServerDraining(Unavailable):
    """The server is stopping."""

    reason = "SERVER_DRAINING"

    def __init__(self) -> None:
        """Always the same message."""
        super().__init__("the server is shutting down; connect again")


class SessionMoved(Unavailable):
    """The session lives on another server."""

    reason = "SESSION_MOVED"


class StoreUnavailable(Unavailable):
    """The store does not answer."""

    reason = "STORE_UNAVAILABLE"


class DeadlineExceeded(ConveyorError):
    """The chunk did not start in time."""

    reason = "DEADLINE_EXCEEDED"


class EngineFailed(ConveyorError):
    """The batch failed; every state in it is unchanged."""

    reason = "ENGINE_FAILED"
    retry_after_seconds = 0.1


class NotSupported(ConveyorError):
    """This server, as configured, does not do this."""

    reason = "NOT_SUPPORTED"


class Unauthenticated(ConveyorError):
    """The credentials are missing, malformed or unknown."""

    reason = "UNAUTHENTICATED"


class Internal(ConveyorError):
    """A fault of the server itself; the details are in the log."""

    reason = "INTERNAL"

    def __init__(self) -> None:
        """Always the same message."""
        super().__init__("internal error of the server; the details are in its log")


def reasons() -> list[str]:
    """Every reason there is, sorted."""
    found: set[str] = set()
    kinds: list[type[ConveyorError]] = [ConveyorError]
    while kinds:
        kind = kinds.pop()
        kinds += kind.__subclasses__()
        if "reason" in vars(kind):
            found.add(kind.reason)
    return sorted(found)
