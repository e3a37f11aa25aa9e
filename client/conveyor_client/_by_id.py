"""Calls about sessions by their id, and what else needs the channel alone."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from uuid import uuid4

import numpy.typing as npt

from conveyor.v1 import model_pb2, session_pb2
from conveyor_client._calls import Calls
from conveyor_client._nouns import (
    DURABILITIES,
    OPEN_MODES,
    OUTPUT_MODES,
    TRACE_MODES,
    Durability,
    ModelInfo,
    OpenedSession,
    OpenMode,
    Output,
    Rows,
    SessionInfo,
    TraceMode,
    model_from_proto,
    session_from_proto,
)
from conveyor_client._requests import make_open_request
from conveyor_client._rows import RowCodec, pack_memory
from conveyor_client._trace import StepResult, Trace, pieces_of, trace_from_pieces

_MODELS_CACHED_MAX = 256


class ById:
    """The part of the client that keeps no stream: one unary call for each method."""

    def __init__(self, calls: Calls) -> None:
        self.calls = calls
        self._models: dict[tuple[str, int], ModelInfo] = {}

    async def open_session(
        self,
        model: str = "",
        *,
        version: int = 0,
        session_id: str | None = None,
        mode: OpenMode = "either",
        token: str = "",
        idle_seconds: float | None = None,
        durability: Durability = "default",
        memory: npt.ArrayLike | None = None,
        labels: Mapping[str, str] | None = None,
        timeout_seconds: float | None = None,
    ) -> OpenedSession:
        """Opens a session without a stream, to be used with `step` or by another process.

        Args:
            model: The model's name; may be empty to resume.
            version: Its version; 0 means the newest.
            session_id: Its id; made up if None.
            mode: As for `session`.
            token: As for `resume`.
            idle_seconds: After so long without a step the session ends.
            durability: How the server keeps the state through its own death.
            memory: What the model attends over, (M, memory row elements).
            labels: The caller's own notes.
            timeout_seconds: Overrides the client's.

        Returns:
            The claim.

        Raises:
            ConveyorError: What went wrong, by class.
        """
        request = make_open_request(
            model=model,
            version=version,
            session_id=session_id or uuid4().hex,
            mode=OPEN_MODES[mode],
            token=token,
            durability=DURABILITIES[durability],
            idle_seconds=idle_seconds,
            memory=None if memory is None else pack_memory(memory),
            labels=labels,
        )
        response = await self.calls.unary(
            self.calls.sessions.OpenSession,
            request,
            timeout_seconds=timeout_seconds,
            repeatable=mode != "create",
            key=request.session_id,
        )
        return OpenedSession(session_from_proto(response.session), response.resumed, response.token)

    async def step(
        self,
        session_id: str,
        inputs: Rows,
        *,
        first_step: int,
        epoch: int = 0,
        output: Output = "all",
        trace: TraceMode | None = None,
        timeout_seconds: float | None = None,
    ) -> StepResult:
        """Runs one chunk with a call of its own, for programs that step now and then.

        Repeating a call with the same number is safe: the server answers it from memory.

        Args:
            session_id: The session.
            inputs: One step or a chunk, as `Session.step` takes it.
            first_step: The number of its first step.
            epoch: If given, the step runs only while this is still the session's epoch.
            output: Which rows come back.
            trace: What to tell of the gates: "summary", "full", or None for nothing.
            timeout_seconds: Overrides the client's.

        Returns:
            The output, where the session stands, and the trace if one was asked for.

        Raises:
            StepGap: `first_step` is beyond the next step.
            StepConflict: The step was taken with another payload.
            ConveyorError: Anything else, by class.
        """
        info = await self.get_session(session_id, timeout_seconds=timeout_seconds)
        model = await self.cached_model(info.model, info.version, digest=info.model_digest)
        codec = RowCodec(model)
        rows, length, single = codec.encode(inputs)
        request = session_pb2.StepRequest(
            session_id=session_id,
            first_step=first_step,
            length=length,
            rows=rows,
            output=OUTPUT_MODES[output],
            trace=TRACE_MODES[trace] if trace else session_pb2.TRACE_MODE_UNSPECIFIED,
            epoch=epoch,
        )
        response = await self.calls.unary(
            self.calls.sessions.Step,
            request,
            timeout_seconds=timeout_seconds,
            repeatable=True,
            key=session_id,
        )
        return StepResult(
            output=codec.decode(response.rows, single or output == "last"),
            first_step=response.first_step,
            durable_step=response.durable_step,
            duplicate=response.duplicate,
            trace=_trace_of(response) if trace else None,
        )

    async def get_session(
        self, session_id: str, *, timeout_seconds: float | None = None
    ) -> SessionInfo:
        """Describes one of the caller's sessions.

        Args:
            session_id: The session.
            timeout_seconds: Overrides the client's.

        Returns:
            The description.

        Raises:
            SessionNotFound: There is none.
            ConveyorError: Anything else, by class.
        """
        request = session_pb2.GetSessionRequest(session_id=session_id)
        response = await self.calls.unary(
            self.calls.sessions.GetSession,
            request,
            timeout_seconds=timeout_seconds,
            repeatable=True,
            key=session_id,
        )
        return session_from_proto(response.session)

    async def sessions(
        self, *, model: str = "", page_size: int = 0, timeout_seconds: float | None = None
    ) -> AsyncGenerator[SessionInfo, None]:
        """Lists the caller's sessions in order of their ids, fetching page after page.

        Args:
            model: Only sessions of this model.
            page_size: Sessions in a page; 0 means the server's choice.
            timeout_seconds: For each page; overrides the client's.

        Yields:
            The sessions.

        Raises:
            ConveyorError: What went wrong, by class.
        """
        request = session_pb2.ListSessionsRequest(model=model, page_size=page_size)
        while True:
            response = await self.calls.unary(
                self.calls.sessions.ListSessions,
                request,
                timeout_seconds=timeout_seconds,
                repeatable=True,
            )
            for session in response.sessions:
                yield session_from_proto(session)
            if not response.next_page_token:
                return
            request.page_token = response.next_page_token

    async def close_session(
        self, session_id: str, *, timeout_seconds: float | None = None
    ) -> SessionInfo:
        """Ends a session and frees its state.

        Args:
            session_id: The session.
            timeout_seconds: Overrides the client's.

        Returns:
            The session as it was when it ended.

        Raises:
            SessionNotFound: There is none, or it is over already.
            ConveyorError: Anything else, by class.
        """
        request = session_pb2.CloseSessionRequest(session_id=session_id)
        response = await self.calls.unary(
            self.calls.sessions.CloseSession,
            request,
            timeout_seconds=timeout_seconds,
            repeatable=True,
            key=session_id,
        )
        return session_from_proto(response.session)

    async def reset_session(
        self, session_id: str, *, timeout_seconds: float | None = None
    ) -> SessionInfo:
        """Sets a session's carry back to the initial one and its next step to 1.

        Args:
            session_id: The session.
            timeout_seconds: Overrides the client's.

        Returns:
            The session after it.

        Raises:
            ConveyorError: What went wrong, by class.
        """
        request = session_pb2.ResetSessionRequest(session_id=session_id)
        response = await self.calls.unary(
            self.calls.sessions.ResetSession,
            request,
            timeout_seconds=timeout_seconds,
            key=session_id,
        )
        return session_from_proto(response.session)

    async def fork_session(
        self,
        session_id: str,
        copies: int | Sequence[str] = 1,
        *,
        at_step: int = 0,
        timeout_seconds: float | None = None,
    ) -> list[SessionInfo]:
        """Copies a session, carry and position, into new ones.

        Args:
            session_id: The session to copy.
            copies: How many, or the ids they shall have.
            at_step: If above 0, copy only if this is the applied step.
            timeout_seconds: Overrides the client's.

        Returns:
            The new sessions, in order.

        Raises:
            SessionExists: An id is taken.
            ConveyorError: Anything else, by class.
        """
        ids = [""] * copies if isinstance(copies, int) else copies
        request = session_pb2.ForkSessionRequest(
            session_id=session_id, new_session_ids=ids, at_step=at_step
        )
        response = await self.calls.unary(
            self.calls.sessions.ForkSession,
            request,
            timeout_seconds=timeout_seconds,
            key=session_id,
        )
        return [session_from_proto(session) for session in response.sessions]

    async def rewind_session(
        self, session_id: str, step: int, *, timeout_seconds: float | None = None
    ) -> SessionInfo:
        """Takes a session back to a retained checkpoint.

        Args:
            session_id: The session.
            step: The checkpoint's step.
            timeout_seconds: Overrides the client's.

        Returns:
            The session after it.

        Raises:
            CheckpointNotRetained: There is none of that step.
            ConveyorError: Anything else, by class.
        """
        request = session_pb2.RewindSessionRequest(session_id=session_id, step=step)
        response = await self.calls.unary(
            self.calls.sessions.RewindSession,
            request,
            timeout_seconds=timeout_seconds,
            key=session_id,
        )
        return session_from_proto(response.session)

    async def export_session(
        self, session_id: str, *, timeout_seconds: float | None = None
    ) -> bytes:
        """Takes a portable snapshot of a session, which lives on.

        Args:
            session_id: The session.
            timeout_seconds: Overrides the client's.

        Returns:
            The snapshot.

        Raises:
            ConveyorError: What went wrong, by class.
        """
        request = session_pb2.ExportSessionRequest(session_id=session_id)
        response = await self.calls.unary(
            self.calls.sessions.ExportSession,
            request,
            timeout_seconds=timeout_seconds,
            repeatable=True,
            key=session_id,
        )
        return response.snapshot

    # --- models ----------------------------------------------------------------------------------

    async def model(
        self, name: str, version: int = 0, *, timeout_seconds: float | None = None
    ) -> ModelInfo:
        """Describes one model.

        Args:
            name: Its name.
            version: Its version; 0 means the newest.
            timeout_seconds: Overrides the client's.

        Returns:
            The description.

        Raises:
            ModelNotFound: There is none.
            ConveyorError: Anything else, by class.
        """
        request = model_pb2.GetModelRequest(name=name, version=version)
        response = await self.calls.unary(
            self.calls.models.GetModel, request, timeout_seconds=timeout_seconds, repeatable=True
        )
        return model_from_proto(response.model)

    async def cached_model(self, name: str, version: int, *, digest: str = "") -> ModelInfo:
        """Describes a model, from memory if it is known and has this digest."""
        known = self._models.get((name, version))
        if known is not None and digest in ("", known.digest):
            return known
        model = await self.model(name, version)
        if len(self._models) >= _MODELS_CACHED_MAX:
            self._models.clear()
        self._models[name, version] = self._models[name, model.version] = model
        return model


def _trace_of(response: session_pb2.StepResponse) -> Trace:
    trace = response.trace if response.HasField("trace") else None
    return trace_from_pieces(response.first_step, pieces_of(response.length, trace))
