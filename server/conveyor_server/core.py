"""The nouns every room of the server shares; no grpc and no torch here.

Payloads stay one `bytes` from the socket to the engine and back: rows packed little-endian,
float32 for features and outputs, int32 for tokens.
"""

import enum
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

from conveyor_server.errors import ConveyorError

ELEMENT_BYTES = 4
"""Bytes of one element of any row: float32 or int32."""

SESSION_ID: Final = re.compile(r"[A-Za-z0-9._:-]{1,128}")
"""What a session id looks like, to be matched in full."""
STEP_MAX: Final = 2**62
"""No step has a higher number."""
NEXT_STEP: Final = 0
"""The first step of a chunk from a protocol without numbers: whichever is next at its turn."""
NO_CLAIM: Final = -1
"""The epoch of a chunk that must not run: its session turned out to be another one."""
SUMMARY_VALUES: Final = 5
"""Numbers that a gate is summarised in."""
SUMMARY_BYTES: Final = 2 + SUMMARY_VALUES * (1 + ELEMENT_BYTES)
"""Bytes that a summary takes in a message."""
TRACE_NAME_BYTES: Final = 32
"""Bytes that a layer, or one of its gates, takes in a message beside its values; rounded up."""

SessionKey = tuple[str, str]
"""Principal and session id.

Every principal has ids of its own, so nobody can probe for somebody else's.
"""


class InputKind(enum.StrEnum):
    """What a model reads."""

    TOKENS = "tokens"
    FEATURES = "features"


class OutputMode(enum.IntEnum):
    """Which output rows of a chunk are wanted; the values are the contract's."""

    ALL = 1
    LAST = 2
    NONE = 3


class TraceMode(enum.IntEnum):
    """What of the gates is wanted beside the outputs; the values are the contract's."""

    NONE = 0
    SUMMARY = 1
    FULL = 2


class Durability(enum.IntEnum):
    """How far state is kept through the server's own death; the values are the contract's."""

    NONE = 1
    ASYNC = 2
    SYNC = 3


class OpenMode(enum.IntEnum):
    """What an open does with a known or an unknown id; the values are the contract's."""

    EITHER = 0
    CREATE = 1
    RESUME = 2


class SessionState(enum.IntEnum):
    """What a session is doing; the values are the contract's."""

    IDLE = 1
    ACTIVE = 2
    QUARANTINED = 3


class Tier(enum.IntEnum):
    """Where a carry lies; the values are the contract's. UNSET: the session was never stepped."""

    UNSET = 0
    DEVICE = 1
    HOST = 2
    STORE = 3


class ModelKey(NamedTuple):
    """One version of one model. A tuple, because it is hashed several times for each step."""

    name: str
    version: int


@dataclass(frozen=True, slots=True)
class LayerInfo:
    """One recurrent layer, for describing it."""

    cell: str
    size: int
    projection: int
    options: tuple[tuple[str, str], ...] = ()
    traced: tuple[tuple[str, int], ...] = ()
    """What a trace shows: each gate's or state's name, and how many units it has."""

    @property
    def direction(self) -> str:
        """forward, reverse or bidirectional."""
        return dict(self.options).get("direction", "forward")


@dataclass(frozen=True, slots=True)
class LimitSource:
    """The setting that a bound of a model comes from."""

    setting: str
    value: int = 0
    """The setting's own value; 0: the bound itself."""
    model: str = ""
    """The model whose `[limits]` set it; empty where the server's settings did."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """All that the rooms above the engine know of a loaded model."""

    key: ModelKey
    digest: str
    description: str
    input_kind: InputKind
    input_size: int
    """Elements in an input row: 1 for tokens."""
    vocabulary_size: int
    """Tokens are 0 .. vocabulary_size - 1; 0 for features."""
    output_size: int
    activation: str
    input_labels: tuple[str, ...]
    output_labels: tuple[str, ...]
    embedding_size: int
    layers: tuple[LayerInfo, ...]
    carry_bytes: int
    parameters: int
    step_multiply_adds: int
    chunk_steps_max: int
    streamable: bool = True
    """False for networks with bidirectional or reverse layers: Predict only."""
    memory_row_size: int = 0
    """Elements in a row of what a session attends over; 0 for models without attention."""
    memory_rows_max: int = 0
    """Most such rows that one session may bring."""
    memory_rows_limit: LimitSource = LimitSource("limits.memory_rows_max")
    """Why no more."""

    @property
    def input_row_bytes(self) -> int:
        """Bytes in an input row."""
        return self.input_size * ELEMENT_BYTES

    @property
    def output_row_bytes(self) -> int:
        """Bytes in an output row."""
        return self.output_size * ELEMENT_BYTES

    @property
    def memory_row_bytes(self) -> int:
        """Bytes in a row of a memory; 0 for models without attention."""
        return self.memory_row_size * ELEMENT_BYTES

    def trace_step_bytes(self, mode: TraceMode, memory_rows: int) -> int:
        """Bytes that the trace of one step takes in a message, names aside."""
        if mode is TraceMode.NONE:
            return 0
        gates = [units for layer in self.layers for _, units in layer.traced]
        full = mode is TraceMode.FULL
        seen = sum(gates) * ELEMENT_BYTES if full else len(gates) * SUMMARY_BYTES
        return seen + memory_rows * ELEMENT_BYTES

    @property
    def generative(self) -> bool:
        """Whether an output can be the next input."""
        if self.input_kind is InputKind.TOKENS:
            return self.output_size == self.vocabulary_size and self.activation != "sigmoid"
        return self.output_size == self.input_size


@dataclass(frozen=True, slots=True)
class GateTrace:
    """One gate, or one part of the state, over some steps."""

    name: str
    """i, f, g, o; r, z, n; c, h."""
    units: int
    values: bytes
    """float32, a row for each step. FULL: `units` columns. SUMMARY: mean, minimum, maximum, share
    of units below 0.1, share above 0.9."""


@dataclass(frozen=True, slots=True)
class LayerTrace:
    """One layer's part of a trace."""

    layer: int
    cell: str
    gates: tuple[GateTrace, ...]


@dataclass(frozen=True, slots=True)
class Trace:
    """What went on inside a model during some steps of one session."""

    mode: TraceMode
    steps: int
    layers: tuple[LayerTrace, ...]
    """Bottom first."""
    attention: bytes = b""
    """The weights of the memory's rows, float32, a row for each step; empty without attention."""
    attention_columns: int = 0

    @property
    def size_bytes(self) -> int:
        """What it takes in a message, rounded up."""
        gates = [gate for layer in self.layers for gate in layer.gates]
        if self.mode is TraceMode.FULL:
            seen = sum(len(gate.values) for gate in gates)
        else:
            seen = len(gates) * self.steps * SUMMARY_BYTES
        named = 1 + len(self.layers) + len(gates)
        return seen + len(self.attention) + named * TRACE_NAME_BYTES


@dataclass(frozen=True, slots=True)
class MemoryRows:
    """What a session is to attend over, as its caller gave it."""

    length: int
    """Rows, as declared."""
    rows: bytes
    """Packed, float32."""


@dataclass(slots=True)
class Piece:
    """Consecutive steps of a chunk that are done."""

    first_step: int
    length: int
    rows: bytes
    """The output rows that were wanted, packed."""
    rows_length: int
    final: bool
    """Whether the chunk ends with this piece."""
    duplicate: bool = False
    durable_step: int = 0
    trace: Trace | None = None
    """If it was wanted and the steps ran now."""

    @property
    def size_bytes(self) -> int:
        """Bytes of what was wanted of it."""
        return len(self.rows) + (0 if self.trace is None else self.trace.size_bytes)


class Reply(Protocol):
    """Where a chunk's results go.

    Called on the scheduler's thread, between two engine calls; must not block.
    """

    def piece(self, chunk: "Chunk", piece: Piece) -> None:
        """Some steps are done; pieces come in order, without gaps."""
        ...

    def failed(self, chunk: "Chunk", first_step: int, error: ConveyorError) -> None:
        """The chunk ends here; `first_step` is its first step that was not applied."""
        ...


@dataclass(slots=True, eq=False)
class Chunk:
    """K >= 1 consecutive steps of one session, sent together.

    Not frozen, unlike the other nouns: it is made once for every message, and a frozen dataclass
    takes three times as long to make. Only `done`, `begun_seconds`, a `first_step` of `NEXT_STEP`
    and an `epoch` that becomes `NO_CLAIM` are ever written.
    """

    session_id: str
    principal: str
    model: ModelInfo
    """What it was checked against."""
    epoch: int
    """The claim it belongs to; 0 runs under any, `NO_CLAIM` under none."""
    first_step: int
    length: int
    rows: bytes
    output: OutputMode
    reply: Reply
    arrived_seconds: float
    deadline_seconds: float | None = None
    """Monotonic time by which it has to begin."""
    handle: int = 0
    """The stream-local name, for the reply."""
    done: int = 0
    """Steps applied so far."""
    begun_seconds: float = 0.0
    """When its first tick began; 0 before, and if it needed none."""
    trace: TraceMode = TraceMode.NONE
    trace_bytes: int = 0
    """What the trace of all steps takes in messages."""


@dataclass(slots=True, eq=False)
class WholeSequence:
    """A sequence for a model that cannot be stepped: it runs whole or not at all."""

    model: ModelInfo
    """What it was checked against."""
    rows: bytes
    length: int
    outputs: int
    """How many of the last steps' output rows are wanted."""
    settle: Callable[[bytes | ConveyorError], None]
    """Takes the output rows or what went wrong, once; on the scheduler's thread."""
    arrived_seconds: float
    deadline_seconds: float | None = None
    """Monotonic time by which it has to be done."""


class Owner(Reply, Protocol):
    """Who holds a session: one stream. Called on the scheduler's thread; must not block."""

    def lost(self, session_id: str, epoch: int, applied_step: int, error: ConveyorError) -> None:
        """The session is no longer this owner's.

        It was superseded, expired, evicted or closed from elsewhere.
        """
        ...


@dataclass(frozen=True, slots=True)
class SessionView:
    """A session as it was at one moment."""

    session_id: str
    model: ModelInfo
    state: SessionState
    tier: Tier
    epoch: int
    applied_step: int
    durable_step: int
    durability: Durability
    state_bytes: int
    create_seconds: float
    """Wall time, like the two below."""
    active_seconds: float
    expire_seconds: float
    idle_seconds: float
    labels: tuple[tuple[str, str], ...] = ()
    memory_rows: int = 0


@dataclass(frozen=True, slots=True)
class OpenRequest:
    """What OpenSession asks for, checked by admission."""

    principal: str
    session_id: str
    """Empty: the server chooses."""
    model: str
    """Empty only with `OpenMode.RESUME` or for an existing session."""
    version: int = 0
    mode: OpenMode = OpenMode.EITHER
    durability: Durability = Durability.NONE
    idle_seconds: float | None = None
    token: str = ""
    labels: tuple[tuple[str, str], ...] = ()
    ephemeral: bool = False
    """Made for one call and not listed."""
    memory: MemoryRows | None = None


@dataclass(frozen=True, slots=True)
class Opened:
    """The answer to an open."""

    view: SessionView
    resumed: bool
    token: str
