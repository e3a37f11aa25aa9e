"""What each request has to hold to be let in."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from conveyor_server.admission.fields import (
    check_model_name,
    check_session_id,
    member,
    sorted_labels,
)
from conveyor_server.admission.rows import (
    check_length,
    check_memory_values,
    check_size,
    check_values,
)
from conveyor_server.config import LimitsConfig
from conveyor_server.core import (
    ELEMENT_BYTES,
    NEXT_STEP,
    STEP_MAX,
    Chunk,
    Durability,
    InputKind,
    MemoryRows,
    ModelInfo,
    OpenMode,
    OpenRequest,
    OutputMode,
    Reply,
    SessionKey,
    TraceMode,
)
from conveyor_server.errors import (
    ChunkTooLong,
    ConveyorError,
    EmptyChunk,
    InvalidField,
    InvalidShape,
    InvalidToken,
    MessageTooLarge,
    ModelNotGenerative,
    limit_text,
)
from conveyor_server.scheduler.generation import Plan
from conveyor_server.scheduler.sampling import Sampling

TOKEN_CHARACTERS_MAX: Final = 512

# Looking a member up in its enum takes as long as all the rest of what is done with it here.
_ALL: Final = OutputMode.ALL
_LAST: Final = OutputMode.LAST
_NONE: Final = OutputMode.NONE
_TRACES: Final = (TraceMode.NONE, TraceMode.SUMMARY, TraceMode.FULL)


@dataclass(frozen=True, slots=True)
class Binding:
    """A session as one caller may step it."""

    principal: str
    session_id: str
    epoch: int
    model: ModelInfo
    reply: Reply
    handle: int = 0
    memory_rows: int = 0
    """In what it attends over."""


@dataclass(slots=True)
class Entry:
    """One chunk of a frame before it is checked."""

    binding: Binding
    first_step: int
    length: int
    output: int
    trace: int = 0


class Admission:
    """Checks requests against the limits."""

    def __init__(self, limits: LimitsConfig) -> None:
        """`limits` of this server."""
        self.limits = limits

    def chunk(self, entry: Entry, rows: bytes, now: float, deadline: float | None) -> Chunk:
        """Checks one chunk with its rows.

        Raises:
            EmptyChunk, ChunkTooLong, InvalidField, InvalidShape, NonFiniteInput, TokenOutOfRange.
        """
        self._check_entry(entry)
        check_size(entry.binding.model, rows, entry.length)
        check_values(entry.binding.model, rows)
        return _chunk(entry, rows, now, deadline)

    def following(
        self,
        model: ModelInfo,
        key: SessionKey,
        length: int,
        rows: bytes,
        reply: Reply,
        now: float,
        deadline: float | None,
    ) -> Chunk:
        """Checks a chunk that has no number and runs under any claim: it is whatever comes next.

        Raises:
            EmptyChunk, ChunkTooLong, InvalidShape, NonFiniteInput, TokenOutOfRange.
        """
        self._check_length(model, length)
        self._check_output(model, length, _ALL)
        check_size(model, rows, length)
        check_values(model, rows)
        return Chunk(
            principal=key[0],
            session_id=key[1],
            model=model,
            epoch=0,
            first_step=NEXT_STEP,
            length=length,
            rows=rows,
            output=_ALL,
            reply=reply,
            arrived_seconds=now,
            deadline_seconds=deadline,
        )

    def message(self, *payloads: bytes) -> None:
        """Checks the size of a message by the payloads that make nearly all of it.

        The transport's own limit stands a little higher and ends the call without a reason.

        Raises:
            MessageTooLarge: It is above `limits.message_bytes_max`.
        """
        size = sum(map(len, payloads))
        if size > self.limits.message_bytes_max:
            raise MessageTooLarge(
                f"the message holds {size:,} bytes; send less at a time",
                limit="limits.message_bytes_max",
                maximum=self.limits.message_bytes_max,
            )

    def frame(
        self, entries: Sequence[Entry], rows: bytes, now: float, deadline: float | None
    ) -> list[Chunk | ConveyorError]:
        """Checks the chunks of a frame, each on its own.

        Returns:
            For each entry its chunk, or why it is refused.

        Raises:
            EmptyChunk: There is no entry.
            InvalidShape: The bytes are not those of the entries, so none can be told from the next.
        """
        if not entries:
            raise EmptyChunk("the frame has no entries; expected at least 1")
        if len(entries) == 1:
            try:
                return [self.chunk(entries[0], rows, now, deadline)]
            except ConveyorError as error:
                return [error]
        sizes = [entry.length * entry.binding.model.input_row_bytes for entry in entries]
        if sum(sizes) != len(rows) or min(sizes) < 0:
            raise InvalidShape(
                f"the frame holds {len(rows):,} bytes, but its entries take {sum(sizes):,}"
            )
        sound = _all_sound(entries, rows)
        checked: list[Chunk | ConveyorError] = []
        offset = 0
        for entry, size in zip(entries, sizes, strict=True):
            part = rows[offset : offset + size]
            offset += size
            try:
                self._check_entry(entry)
                if not sound:
                    check_values(entry.binding.model, part)
                checked.append(_chunk(entry, part, now, deadline))
            except ConveyorError as error:
                checked.append(error)
        return checked

    def open(  # noqa: PLR0913  the request's fields, each checked on its own
        self,
        *,
        principal: str,
        model: str,
        version: int,
        session_id: str,
        mode: int,
        durability: int,
        idle_seconds: float | None,
        memory: MemoryRows | None,
        labels: Mapping[str, str],
        token: str,
    ) -> OpenRequest:
        """Checks OpenSession.

        Whether the model takes such a memory is told where the model is known.

        Raises:
            InvalidField, InvalidToken, MessageTooLarge, ModelNotFound, NonFiniteInput.
        """
        check_model_name(model)
        if len(token) > TOKEN_CHARACTERS_MAX:
            raise InvalidToken(
                f"the session token has {len(token):,} characters; pass the one that OpenSession"
                " gave"
            )
        if session_id or mode == OpenMode.RESUME:
            check_session_id(session_id)
        if not session_id and not model:
            raise InvalidField("model", "is empty; a new session needs a model")
        if version < 0:
            raise InvalidField("version", f"is {version}; expected 0 (the newest) or more")
        return OpenRequest(
            principal=principal,
            session_id=session_id,
            model=model,
            version=version,
            mode=member(OpenMode, mode, "mode"),
            durability=member(Durability, durability or Durability.NONE, "durability"),
            idle_seconds=None if idle_seconds is None else self.idle_seconds(idle_seconds),
            labels=sorted_labels(labels, self.limits.labels_max),
            token=token,
            memory=self.memory(memory),
        )

    def memory(self, memory: MemoryRows | None, *beside: bytes) -> MemoryRows | None:
        """Checks what to attend over, as far as that needs no model; `beside`: the other payloads.

        Raises:
            MessageTooLarge, NonFiniteInput.
        """
        if memory is None:
            return None
        self.message(memory.rows, *beside)
        check_memory_values(memory)
        return memory

    def idle_seconds(self, seconds: float) -> float:
        """Checks a wanted idle time.

        Raises:
            InvalidField: Not above 0, or above the limit.
        """
        if not 0 < seconds <= self.limits.idle_seconds_max:
            bound = limit_text("limits.idle_seconds_max", self.limits.idle_seconds_max)
            raise InvalidField(
                "idle_ttl", f"is {seconds:.12g} s; expected more than 0, up to the limit ({bound})"
            )
        return seconds

    def fork_ids(self, session_ids: Sequence[str]) -> Sequence[str]:
        """Checks the ids of ForkSession.

        Raises:
            InvalidField: None, too many, malformed, or one twice.
        """
        if not 1 <= len(session_ids) <= self.limits.fork_sessions_max:
            bound = limit_text("limits.fork_sessions_max", self.limits.fork_sessions_max)
            raise InvalidField(
                "new_session_ids",
                f"has {len(session_ids):,} ids; expected at least 1, up to the limit ({bound})",
            )
        given = [session_id for session_id in session_ids if session_id]
        for session_id in given:
            check_session_id(session_id, "new_session_ids")
        if len(set(given)) != len(given):
            twice = next(each for each in given if given.count(each) > 1)
            raise InvalidField("new_session_ids", f"duplicate id {twice!r}")
        return session_ids

    def sequence(self, model: ModelInfo, length: int, rows: bytes, output: int = 0) -> None:
        """Checks the whole sequence of Predict.

        Raises:
            EmptyChunk, ChunkTooLong, InvalidField, InvalidShape, NonFiniteInput, TokenOutOfRange.
        """
        check_length(length, self.limits.predict_steps_max, "limits.predict_steps_max")
        self._check_output(model, length, output)
        check_size(model, rows, length)
        check_values(model, rows)

    def generation(
        self,
        model: ModelInfo,
        *,
        prompt: bytes,
        prompt_length: int,
        steps_max: int,
        sampling: Sampling,
        stop_tokens: Sequence[int],
    ) -> Plan:
        """Checks Generate.

        Raises:
            ModelNotGenerative, InvalidField, ChunkTooLong, InvalidShape, NonFiniteInput,
            TokenOutOfRange.
        """
        if not model.generative:
            raise ModelNotGenerative(
                f"model {model.key.name!r} cannot generate: its output has no use as its next"
                " input; step it instead"
            )
        if steps_max < 1:
            raise InvalidField("steps_max", f"is {steps_max}; expected at least 1")
        limit = "limits.generate_steps_max"
        check_length(prompt_length + steps_max, self.limits.generate_steps_max, limit)
        if prompt_length < 0:
            raise InvalidField("prompt_length", f"is {prompt_length}; expected 0 or more")
        check_size(model, prompt, prompt_length)
        check_values(model, prompt)
        if not (math.isfinite(sampling.temperature) and 0 <= sampling.temperature <= 100):
            raise InvalidField("temperature", f"is {sampling.temperature:g}; expected 0 to 100")
        if sampling.top_k < 0:
            raise InvalidField("top_k", f"is {sampling.top_k}; expected 0 (all tokens) or more")
        if model.input_kind is InputKind.FEATURES and (sampling != Sampling() or stop_tokens):
            raise InvalidField(
                "temperature",
                f"sampling and stop tokens need a model of tokens; {model.key.name!r} takes"
                " features",
            )
        for token in stop_tokens:
            if not 0 <= token < model.vocabulary_size:
                raise InvalidField(
                    "stop_tokens", f"has {token}; expected 0 to {model.vocabulary_size - 1:,}"
                )
        return Plan(model, steps_max, sampling, frozenset(stop_tokens))

    def _check_entry(self, entry: Entry) -> None:
        model = entry.binding.model
        self._check_length(model, entry.length)
        if not 1 <= entry.first_step <= STEP_MAX:
            raise InvalidField(
                "first_step", f"is {entry.first_step}; steps are numbered from 1 to {STEP_MAX:,}"
            )
        traced = 0
        if entry.trace:
            if not 0 <= entry.trace < len(_TRACES):
                raise InvalidField("trace", f"{entry.trace} is not one of its values")
            traced = _trace_bytes(entry)
        self._check_output(model, entry.length, entry.output, traced)

    def _check_length(self, model: ModelInfo, length: int) -> None:
        server, limit = self.limits.chunk_steps_max, "limits.chunk_steps_max"
        if model.chunk_steps_max < server:
            check_length(length, model.chunk_steps_max, limit, model.key.name)
        else:
            check_length(length, server, limit)

    def _check_output(
        self, model: ModelInfo, length: int, output: int, trace_bytes: int = 0
    ) -> None:
        if not 0 <= output <= _NONE:
            raise InvalidField("output", f"{output} is not one of its values")
        rows = length if output <= _ALL else 1 if output == _LAST else 0
        wanted = rows * model.output_size * ELEMENT_BYTES + trace_bytes
        if wanted > self.limits.result_bytes_max:
            raise ChunkTooLong(
                f"{length:,} steps would return {wanted:,} bytes; send fewer, or ask for less"
                " output",
                limit="limits.result_bytes_max",
                maximum=self.limits.result_bytes_max,
            )


def result_bytes(chunk: Chunk) -> int:
    """Bytes of the output rows and of the trace that are wanted of a chunk."""
    output = chunk.output
    if output is _ALL:
        return chunk.length * chunk.model.output_size * ELEMENT_BYTES + chunk.trace_bytes
    rows = chunk.model.output_size * ELEMENT_BYTES if output is _LAST else 0
    return rows + chunk.trace_bytes


def _all_sound(entries: Sequence[Entry], rows: bytes) -> bool:
    """Whether all values of a frame pass, told in one look where all entries are of one model."""
    model = entries[0].binding.model
    if any(entry.binding.model is not model for entry in entries):
        return False
    try:
        check_values(model, rows)
    except ConveyorError:
        return False
    return True


def _chunk(entry: Entry, rows: bytes, now: float, deadline: float | None) -> Chunk:
    binding = entry.binding
    return Chunk(
        session_id=binding.session_id,
        principal=binding.principal,
        model=binding.model,
        epoch=binding.epoch,
        first_step=entry.first_step,
        length=entry.length,
        rows=rows,
        output=OutputMode(entry.output or _ALL),
        reply=binding.reply,
        arrived_seconds=now,
        deadline_seconds=deadline,
        handle=binding.handle,
        trace=_TRACES[entry.trace],
        trace_bytes=_trace_bytes(entry) if entry.trace else 0,
    )


def _trace_bytes(entry: Entry) -> int:
    """Bytes that the trace of a chunk takes."""
    binding = entry.binding
    a_step = binding.model.trace_step_bytes(_TRACES[entry.trace], binding.memory_rows)
    return entry.length * a_step
