"""ModelStreamInfer: requests of any sequences on one stream, answered in the order they came.

Like StreamSteps it has one reader and one writer, and no task for each message.
"""

import asyncio
from collections import OrderedDict, deque
from typing import Final

from grpc import aio

from conveyor.oip import inference_pb2
from conveyor_server.core import ModelInfo
from conveyor_server.errors import ConveyorError, ServerDraining
from conveyor_server.metrics import Metrics
from conveyor_server.rpc.oip.requests import Asked, read, unread
from conveyor_server.rpc.oip.responses import StreamResponses
from conveyor_server.rpc.oip.sequences import Sequences
from conveyor_server.rpc.oip.statistics import Statistics
from conveyor_server.rpc.oip.tensors import Steps, check_outputs, read_steps
from conveyor_server.rpc.oip.underway import Request
from conveyor_server.rpc.outbox import Outbox, first_of
from conveyor_server.rpc.service import Context, Services
from conveyor_server.rpc.streams import Streams

METHOD: Final = ("stream_stream", "inference.GRPCInferenceService", "ModelStreamInfer")
"""How calls of ModelStreamInfer and their messages are counted."""
SEQUENCES_KNOWN_MAX: Final = 4096
"""Sequences of one stream whose models are remembered; the others' are looked up."""
_ANSWER_BYTES: Final = 256
"""What an answer is counted as beside its rows and its id."""
ENDS_ON_ERROR: Final = "triton_grpc_error"
"""The metadata key by which a client asks for a status instead of a message with an error."""


class Answers(Outbox):
    """Requests in the order they came; written is the first of them once it is done."""

    def __init__(
        self,
        metrics: Metrics,
        statistics: Statistics,
        services: Services,
        principal: str,
        *,
        end_on_error: bool,
    ) -> None:
        """`end_on_error`: whether the first failure ends the stream with its status."""
        super().__init__(metrics, 0, services.results.account(principal, self.notify), METHOD)
        self._requests: deque[tuple[Request, int]] = deque()
        self._responses = StreamResponses()
        self._statistics = statistics
        self._clock = services.clock
        self._end_on_error = end_on_error

    def __len__(self) -> int:
        return 1 if self._requests and self._requests[0][0].done else 0

    @property
    def unanswered(self) -> list[Request]:
        """Requests that are not done."""
        return [request for request, _ in self._requests if not request.done]

    @property
    def empty(self) -> bool:
        """Whether every request is answered and written."""
        return not self._requests

    def expect(self, request: Request, wanted_bytes: int) -> None:
        """Adds a request to be answered when its turn comes."""
        self._requests.append((request, wanted_bytes))
        self.account.take(wanted_bytes)
        self.done(request)

    def done(self, request: Request) -> None:
        """One of the requests is done, or so it was when it was added."""
        if self and self._requests[0][0] is request:
            self._wake_writer()

    def _next_frame(self) -> inference_pb2.ModelStreamInferResponse:
        request, wanted_bytes = self._requests.popleft()
        self._frame_bytes_written = wanted_bytes
        ready = self._clock.monotonic()
        if request.error is None:
            message = self._responses.answer(request)
        else:
            if self._end_on_error:
                self._statistics.count(request, ready)
                raise request.error
            self._metrics.rejected.add(1, request.error.reason)
            message = self._responses.failure(request)
        self._statistics.count(request, ready)
        return message


class InferStream:
    """One ModelStreamInfer call.

    Attributes:
        known: The model of each sequence that was seen on it lately, by the session's id.
    """

    def __init__(
        self,
        services: Services,
        sequences: Sequences,
        statistics: Statistics,
        principal: str,
        context: Context,
        streams: Streams,
    ) -> None:
        """Serves nothing yet; `streams` are those it is one of."""
        self._services = services
        self._sequences = sequences
        self._principal = principal
        self._context = context
        self._streams = streams
        self._limits = services.config.limits
        metadata = dict(context.invocation_metadata() or ())
        end_on_error = str(metadata.get(ENDS_ON_ERROR, "")).lower() == "true"
        self._answers = Answers(
            services.metrics, statistics, services, principal, end_on_error=end_on_error
        )
        self.known: OrderedDict[str, ModelInfo] = OrderedDict()
        self._stopping = asyncio.Event()

    async def serve(self) -> None:
        """Reads requests until the client half-closes or goes, or the server stops.

        Either way what was accepted is answered.

        Raises:
            ServerDraining: The server is stopping.
        """
        answers, seconds_max = self._answers, self._limits.slow_reader_seconds_max
        writer = asyncio.create_task(answers.write_to(self._context))
        reader = asyncio.create_task(self._read())
        stopped = asyncio.create_task(self._stop())
        tasks = (reader, writer, stopped)
        try:
            await first_of(answers, seconds_max, *tasks)
            if reader.done():
                reader.result()
                answers.finish()
                await first_of(answers, seconds_max, writer)
            elif stopped.done():
                stopped.result()
            writer.result()
        finally:
            await answers.close(*tasks)
            if unanswered := answers.unanswered:
                self._sequences.drop(unanswered)

    def drain(self, reconnect_after_seconds: float) -> None:
        """The server is stopping: what was accepted is answered, then the stream ends."""
        self._stopping.set()

    def answered(self, request: Request) -> None:
        """See `underway.Waiting`."""
        if request.error is not None:
            self.known.pop(request.asked.session_id, None)
        self._answers.done(request)

    async def _stop(self) -> None:
        answers = self._answers
        await self._stopping.wait()
        await answers.until(lambda: answers.empty and not answers.blocked)
        raise ServerDraining

    async def _read(self) -> None:
        answers, received = self._answers, self._services.metrics.grpc_received
        while True:
            message = await self._context.read()
            if message is aio.EOF:
                break
            received.add(1, *METHOD)
            answers.held = True
            await self._take(message)
            if len(self._streams) == 1:  # there is nobody to share a batch with
                self._services.driver.tick_at_once()
            answers.held = False
            if answers:
                await answers.flush(self._context, frames_max=1)
        await answers.until(lambda: answers.empty)

    async def _take(self, message: inference_pb2.ModelInferRequest) -> None:
        """Hands a request in, or refuses it, once there is room for its answer."""
        received = self._services.clock.monotonic()
        try:
            self._sequences.check_serving()
            request = Request(read(message), self, received)
        except ConveyorError as error:
            await self._refuse(Request(unread(message), self, received), error)
            return
        asked = request.asked
        try:
            model = None if asked.start else self.known.get(asked.session_id)
            if model is None or asked.version not in (None, model.key.version):
                model = await self._look_up(asked)
            request.model = model
            check_outputs(message, model)
            steps = read_steps(message, model, self._services.admission)
            wanted = _answer_bytes(asked) + steps.length * model.output_row_bytes
            if not self._room_for(wanted):
                await self._wait_for_room(wanted)
            if asked.start and model.memory_row_size:
                await self._make_way(request, model, steps)
            self._submit(request, model, steps)
        except ConveyorError as error:
            await self._refuse(request, error)
        else:
            self._answers.expect(request, wanted)

    async def _refuse(self, request: Request, error: ConveyorError) -> None:
        wanted = _answer_bytes(request.asked)
        if not self._room_for(wanted):
            await self._wait_for_room(wanted)
        request.fail(error)
        self._answers.expect(request, wanted)

    def _submit(self, request: Request, model: ModelInfo, steps: Steps) -> None:
        asked = request.asked
        self._sequences.submit(request, model, self._principal, steps)
        if asked.end:
            self.known.pop(asked.session_id, None)
        elif asked.session_id and (asked.start or asked.session_id not in self.known):
            self.known[asked.session_id] = model
            if len(self.known) > SEQUENCES_KNOWN_MAX:
                self.known.popitem(last=False)

    async def _look_up(self, asked: Asked) -> ModelInfo:
        """Waits, if it has to, for what other streams do to the sequence."""
        self._answers.held = False
        return await self._sequences.model_of(asked, self._principal)

    async def _make_way(self, request: Request, model: ModelInfo, steps: Steps) -> None:
        self._answers.held = False
        await self._sequences.make_way(request, model, self._principal, steps)

    def _room_for(self, wanted_bytes: int) -> bool:
        owed = self._answers.owed_bytes
        if owed and owed + wanted_bytes > self._limits.outbox_bytes_max:
            return False
        return self._answers.account.room_for(wanted_bytes)

    async def _wait_for_room(self, wanted_bytes: int) -> None:
        self._answers.held = False
        await self._answers.until(lambda: self._room_for(wanted_bytes))


def _answer_bytes(asked: Asked) -> int:
    return _ANSWER_BYTES + len(asked.request_id)
