"""A session that steps over a lane."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Iterable, Sequence
from contextlib import aclosing, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Self

from conveyor.v1 import session_pb2
from conveyor_client._attachment import Attachment
from conveyor_client._errors import (
    NOT_OPENED,
    ConveyorError,
    DeadlineExceeded,
    NotOpen,
    SessionNotFound,
)
from conveyor_client._generation import Generation
from conveyor_client._nouns import (
    TRACE_MODES,
    FloatArray,
    ModelInfo,
    Output,
    Rows,
    SessionInfo,
    TraceMode,
)
from conveyor_client._sending import Sender
from conveyor_client._trace import Trace

if TYPE_CHECKING:
    from conveyor_client._client import Client


class Session:
    """One sequence's state on one model, stepped over a shared stream.

    Make it with `Client.session`, `Client.resume` or `Client.import_session` and open it with
    ``async with`` (closing ends the session on the server) or with `open`. Steps of one session run
    in the order they are submitted; many may be submitted before the first is answered.

    If the connection breaks, the session opens itself again and sends what was not answered under
    the numbers it had, so no step is lost and none runs twice. Errors that this cannot mend are
    raised from the steps that wait.

    A model that takes tokens steps on an integer and takes a chunk as integers of shape (K,); any
    other steps on features of shape (D,) and takes a chunk as (K, D). A step returns float32 of
    shape (O,), a chunk (K, O); with output "last" a chunk returns its last row (O,), and with
    output "none" the result is empty.

    Tables, structured arrays, series and dicts are matched by the model's labels, in any order of
    names; an unknown, missing or duplicate name is `InvalidShape`.
    """

    def __init__(
        self,
        client: "Client",
        request: session_pb2.OpenSessionRequest,
        *,
        output: Output = "all",
        own_stream: bool = False,
    ) -> None:
        self._client = client
        self._output: Output = output
        self._attachment = Attachment(client, request, own_stream=own_stream)
        self._sender = Sender(self._attachment, client.options.timeout_seconds)

    # --- what it is ------------------------------------------------------------------------------

    @property
    def session_id(self) -> str:
        """Its id."""
        attachment = self._attachment
        if attachment.answer is not None:
            return attachment.answer.session.session_id
        return attachment.request.session_id

    @property
    def model(self) -> ModelInfo:
        """The model it runs on.

        Raises:
            NotOpen: It was never opened.
        """
        if self._attachment.opened is None:
            raise NotOpen(NOT_OPENED)
        return self._attachment.opened.model

    @property
    def epoch(self) -> int:
        """The epoch of this client's claim; 0 before it is opened."""
        answer = self._attachment.answer
        return answer.session.epoch if answer else 0

    @property
    def token(self) -> str:
        """What `Client.resume` may be given to prove this claim; empty before it is opened."""
        answer = self._attachment.answer
        return answer.token if answer else self._attachment.request.token

    @property
    def resumed(self) -> bool:
        """Whether the server had the session already when it was opened last."""
        answer = self._attachment.answer
        return answer is not None and answer.resumed

    @property
    def applied_step(self) -> int:
        """The number of the last step known to be applied."""
        opened = self._attachment.opened
        return opened.ledger.answered_step if opened else 0

    @property
    def durable_step(self) -> int:
        """The number of the last step known to be durable."""
        opened = self._attachment.opened
        return opened.ledger.durable_step if opened else 0

    # --- opening and closing ---------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            await self.close()
            return
        with suppress(ConveyorError):  # the error under way says more
            await self.close()

    async def open(self, *, timeout_seconds: float | None = None) -> None:
        """Opens the session; does nothing if it is open.

        Args:
            timeout_seconds: Overrides the client's.

        Raises:
            ConveyorError: What the server refused, or `TransportError` if there is none.
        """
        attachment = self._attachment
        if attachment.error is not None:
            raise attachment.error.copy()
        if attachment.opened is not None:
            return
        seconds = self._seconds(timeout_seconds)
        try:
            async with asyncio.timeout(seconds):
                await attachment.open()
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"the session could not be opened within {seconds:g} s"
            ) from error

    async def close(self, *, timeout_seconds: float | None = None) -> None:
        """Ends the session on the server; what was sent before runs first.

        Does nothing if it is over already.

        Args:
            timeout_seconds: Overrides the client's.

        Raises:
            ConveyorError: The server could not be told; the session ends there by its lease.
        """
        attachment = self._attachment
        if attachment.error is not None:
            return
        seconds = self._seconds(timeout_seconds)
        try:
            if not await attachment.give_handle_back(detach=False, seconds=seconds):
                with suppress(SessionNotFound):
                    await self._client.close_session(self.session_id, timeout_seconds=seconds)
        finally:
            attachment.end(
                NotOpen("the session is closed; make another one with client.session(...)")
            )

    async def detach(self, *, timeout_seconds: float | None = None) -> None:
        """Lets go of the session and leaves it alive on the server, to be resumed within its lease.

        Waits for the steps in flight first.

        Args:
            timeout_seconds: Overrides the client's.

        Raises:
            ConveyorError: The steps in flight could not be finished.
        """
        attachment = self._attachment
        if attachment.error is not None or attachment.opened is None:
            return
        seconds = self._seconds(timeout_seconds)
        try:
            async with attachment.exclusively(seconds):
                await attachment.give_handle_back(detach=True, seconds=seconds)
        finally:
            attachment.end(NotOpen("the session is detached; go on with client.resume(session_id)"))

    # --- stepping --------------------------------------------------------------------------------

    async def step(
        self,
        inputs: Rows,
        *,
        output: Output | None = None,
        timeout_seconds: float | None = None,
    ) -> FloatArray:
        """Runs one step or one chunk.

        A chunk longer than the server takes in one piece is sent in several. Cancelling, or running
        out of time, does not undo the step: it, or a beginning of a chunk, may have run or still
        run. The next step waits for the server to tell, and runs behind what it applied; once that
        is answered, `applied_step` says how far the session came.

        Args:
            inputs: One step or a chunk, see the class.
            output: Which rows come back; overrides the session's choice.
            timeout_seconds: For all of it; the server also drops what it has not begun by then.
                By default, each part of a long chunk has the client's time.

        Returns:
            The output rows, see the class.

        Raises:
            InvalidInput: The rows are not what the model takes.
            StepRefused: The numbers do not fit: somebody else has stepped the session.
            DeadlineExceeded: The time is over.
            OwnershipLost: Somebody else has the session now.
            DataLoss: The server lost state that cannot be replayed.
            ConveyorError: Anything else, by class.
        """
        mode = output or self._output
        sent = self._sender.send(inputs, mode, timeout_seconds)
        return (await self._sender.wait_for(sent, timeout_seconds)).output

    async def stream(
        self,
        inputs: AsyncIterable[Rows] | Iterable[Rows],
        *,
        in_flight: int = 32,
        output: Output | None = None,
        timeout_seconds: float | None = None,
    ) -> AsyncGenerator[FloatArray]:
        """Runs steps or chunks one after the other, several in flight.

        Outputs are yielded as they come, also while the next input is still awaited. Leaving the
        loop early leaves the steps in flight to run.

        Args:
            inputs: Steps or chunks, each as `step` takes it.
            in_flight: At most so many are sent ahead of the output that was yielded last.
            output: Which rows come back; overrides the session's choice.
            timeout_seconds: For each of them.

        Yields:
            One output for each input, in order.

        Raises:
            ConveyorError: As `step`; inputs after the failed one are not run.
        """
        mode = output or self._output
        answered = self._sender.in_order(inputs, in_flight, mode, timeout_seconds)
        async with aclosing(answered):
            async for sent in answered:
                yield sent.output

    async def step_with_trace(
        self,
        inputs: Rows,
        *,
        mode: TraceMode = "summary",
        timeout_seconds: float | None = None,
    ) -> tuple[FloatArray, Trace]:
        """Runs one step or one chunk and tells what the gates did. The outputs are the same bits.

        Args:
            inputs: One step or a chunk, see the class.
            mode: "summary" for statistics of each gate, "full" for every activation.
            timeout_seconds: As for `step`.

        Returns:
            The output rows, and the trace, one row for each step. Steps that were answered from the
            server's memory, after the connection broke, have none: see `Trace.covered`.

        Raises:
            NotSupported: The server does not trace.
            ConveyorError: As `step`.
        """
        sent = self._sender.send(inputs, "all", timeout_seconds, trace=TRACE_MODES[mode])
        await self._sender.wait_for(sent, timeout_seconds)
        return sent.output, sent.trace

    async def stream_with_trace(
        self,
        inputs: AsyncIterable[Rows] | Iterable[Rows],
        *,
        mode: TraceMode = "summary",
        in_flight: int = 32,
        timeout_seconds: float | None = None,
    ) -> AsyncGenerator[tuple[FloatArray, Trace]]:
        """Runs steps or chunks, several in flight, and tells what the gates did.

        As `stream`, with what `step_with_trace` returns for each input.

        Args:
            inputs: Steps or chunks, each as `step` takes it.
            mode: "summary" for statistics of each gate, "full" for every activation.
            in_flight: At most so many are sent ahead of the output that was yielded last.
            timeout_seconds: For each of them.

        Yields:
            The output rows and the trace of each input, in order.

        Raises:
            NotSupported: The server does not trace.
            ConveyorError: As `step`; inputs after the failed one are not run.
        """
        trace = TRACE_MODES[mode]
        answered = self._sender.in_order(inputs, in_flight, "all", timeout_seconds, trace=trace)
        async with aclosing(answered):
            async for sent in answered:
                yield sent.output, sent.trace

    def generate(
        self,
        prompt: Rows | None = None,
        *,
        steps_max: int,
        temperature: float = 1.0,
        top_k: int = 0,
        stop_tokens: Sequence[int] = (),
        seed: int = 0,
        timeout_seconds: float | None = None,
    ) -> Generation:
        """Lets the model go on by itself: each output is sampled and fed back, on the server.

        The session moves on with it. Steps submitted meanwhile wait until it ends.

        Args:
            prompt: A chunk to run first; required for a session never stepped.
            steps_max: At most so many outputs are made.
            temperature: 0 takes the most probable token; 1 samples from the model's own
                distribution.
            top_k: Sample among so many most probable tokens; 0 means all.
            stop_tokens: Generation ends after any of these.
            seed: The same seed from the same state gives the same tokens.
            timeout_seconds: For the whole of it; overrides the client's.

        Returns:
            An asynchronous iterator of tokens, or of output rows (O,) for other models.
        """
        codec = self._attachment.require().codec
        request = session_pb2.GenerateRequest(
            session_id=self.session_id,
            steps_max=steps_max,
            temperature=temperature,
            top_k=top_k,
            stop_tokens=stop_tokens,
            seed=seed,
        )
        if prompt is not None:
            request.prompt, request.prompt_length, _ = codec.encode(prompt)
        return Generation(self._generate(request, timeout_seconds), codec)

    def check(self, inputs: Rows) -> None:
        """Checks what can be checked of inputs without running them; from any thread.

        Args:
            inputs: One step or a chunk.

        Raises:
            InvalidInput: They are not what the model takes.
            ConveyorError: The session is not open.
        """
        self._attachment.require().codec.encode(inputs)

    def items(self, inputs: Iterable[Rows]) -> Iterable[Rows]:
        """What `stream` walks through: the rows of a table, anything else as it is.

        Args:
            inputs: As `stream` takes them, unless they are an asynchronous iterator.

        Raises:
            InvalidInput: The table's names are not the model's.
            ConveyorError: The session is not open.
        """
        return self._attachment.require().codec.items(inputs)

    # --- the whole of its state ------------------------------------------------------------------

    async def fork(
        self, copies: int | Sequence[str] = 1, *, timeout_seconds: float | None = None
    ) -> "list[Session]":
        """Copies the session, carry and position, once its steps in flight are done.

        Args:
            copies: How many, or the ids they shall have.
            timeout_seconds: Overrides the client's.

        Returns:
            The copies, not opened yet.

        Raises:
            SessionExists: An id is taken.
            ConveyorError: Anything else, by class.
        """
        async with self._attachment.exclusively(self._seconds(timeout_seconds)):
            infos = await self._client.fork_session(
                self.session_id, copies, timeout_seconds=timeout_seconds
            )
        return [self._client.resume(info.session_id, output=self._output) for info in infos]

    async def reset(self, *, timeout_seconds: float | None = None) -> None:
        """Sets the carry back to the initial one and the next step to 1.

        Args:
            timeout_seconds: Overrides the client's.

        Raises:
            ConveyorError: What went wrong, by class.
        """
        async with self._attachment.exclusively(self._seconds(timeout_seconds)):
            self._attachment.rebase(
                await self._client.reset_session(self.session_id, timeout_seconds=timeout_seconds)
            )

    async def rewind(self, step: int, *, timeout_seconds: float | None = None) -> None:
        """Goes back to a retained checkpoint.

        Args:
            step: The checkpoint's step.
            timeout_seconds: Overrides the client's.

        Raises:
            CheckpointNotRetained: There is none of that step.
            ConveyorError: Anything else, by class.
        """
        async with self._attachment.exclusively(self._seconds(timeout_seconds)):
            self._attachment.rebase(
                await self._client.rewind_session(
                    self.session_id, step, timeout_seconds=timeout_seconds
                )
            )

    async def export(self, *, timeout_seconds: float | None = None) -> bytes:
        """Takes a portable snapshot once the steps in flight are done; the session lives on.

        Args:
            timeout_seconds: Overrides the client's.

        Returns:
            The snapshot, for `Client.import_session`.

        Raises:
            ConveyorError: What went wrong, by class.
        """
        async with self._attachment.exclusively(self._seconds(timeout_seconds)):
            return await self._client.export_session(
                self.session_id, timeout_seconds=timeout_seconds
            )

    async def info(self, *, timeout_seconds: float | None = None) -> SessionInfo:
        """Asks the server what it knows of the session.

        Args:
            timeout_seconds: Overrides the client's.

        Returns:
            The description.

        Raises:
            ConveyorError: What went wrong, by class.
        """
        return await self._client.get_session(self.session_id, timeout_seconds=timeout_seconds)

    # --- inside ----------------------------------------------------------------------------------

    async def _generate(
        self, request: session_pb2.GenerateRequest, timeout_seconds: float | None
    ) -> AsyncGenerator[session_pb2.GenerateResponse]:
        attachment, calls = self._attachment, self._client.calls
        async with attachment.exclusively(self._seconds(timeout_seconds)) as ledger:
            request.first_step = ledger.next_step
            ended = False
            responses = calls.stream(
                calls.sessions.Generate,
                request,
                timeout_seconds=timeout_seconds,
                key=self.session_id,
            )
            try:
                async with aclosing(responses):
                    async for response in responses:
                        if response.end:
                            ended = True
                            attachment.rebase_at(response.applied_step, ledger.durable_step)
                        yield response
            finally:
                if not ended:  # given up or broken off: only the server knows how far it came
                    with suppress(ConveyorError):
                        attachment.rebase(await self.info())

    def _seconds(self, timeout_seconds: float | None) -> float:
        return self._client.options.timeout_seconds if timeout_seconds is None else timeout_seconds
