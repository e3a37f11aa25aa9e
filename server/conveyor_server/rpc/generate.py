"""Generate: a closed loop, its outputs streamed as they come."""

import asyncio

from conveyor.v1 import session_pb2
from conveyor_server.admission.fields import check_model_name, check_session_id
from conveyor_server.core import Chunk, ModelInfo, OutputMode
from conveyor_server.errors import (
    InvalidField,
    InvalidMemory,
    SlowReader,
    StepGap,
    StepResultNotHeld,
)
from conveyor_server.rpc.convert import memory_rows
from conveyor_server.rpc.service import Context, Services, session_for_call
from conveyor_server.scheduler.generation import Generation, Made
from conveyor_server.scheduler.sampling import Sampling

_METHOD = ("unary_stream", "conveyor.v1.SessionService", "Generate")


async def generate(
    services: Services,
    caller: str,
    request: session_pb2.GenerateRequest,
    context: Context,
) -> None:
    """Runs Generate on a session, or on one made for the call."""
    memory = services.admission.memory(memory_rows(request), request.prompt)
    if request.WhichOneof("target") == "session_id":
        check_session_id(request.session_id)
        if request.version:
            raise InvalidField("version", "goes with model only; a session has its version")
        if memory is not None:
            raise InvalidMemory(
                "a session has its memory since it was opened; leave the memory out"
            )
        await _Loop(services, caller, request, context, request.session_id).run()
    elif request.model:
        if request.first_step > 1:
            raise InvalidField(
                "first_step", "goes with session_id only; a new session starts at step 1"
            )
        check_model_name(request.model)
        made = session_for_call(services, caller, request.model, request.version, memory)
        async with made as view:
            await _Loop(services, caller, request, context, view.session_id).run()
    else:
        raise InvalidField("target", "is not set; give session_id or model")


class _Loop:
    """One call."""

    def __init__(
        self,
        services: Services,
        caller: str,
        request: session_pb2.GenerateRequest,
        context: Context,
        session_id: str,
    ) -> None:
        self._services = services
        self._caller = caller
        self._request = request
        self._context = context
        self._session_id = session_id
        self._epoch = 0
        self._changed = asyncio.Event()

    async def run(self) -> None:
        request, services = self._request, self._services
        model, self._epoch, applied, output = await services.driver.call(
            lambda operations: operations.position(self._caller, self._session_id)
        )
        services.admission.message(request.prompt)
        sampling = Sampling(request.temperature, request.top_k, request.seed)
        plan = services.admission.generation(
            model,
            prompt=request.prompt,
            prompt_length=request.prompt_length,
            steps_max=request.steps_max,
            sampling=sampling,
            stop_tokens=request.stop_tokens,
        )
        if request.first_step not in (0, applied + 1):
            raise StepGap(request.first_step, applied + 1)
        generation = Generation(plan, self._submit_step, self._changed.set)
        if request.prompt_length:
            self._submit(applied + 1, request.prompt_length, request.prompt, generation)
        elif not applied:
            raise InvalidField("prompt", "is empty; a session without steps needs one")
        elif output is None:
            raise StepResultNotHeld(
                f"the output of step {applied} is no longer kept; give a prompt", first_step=applied
            )
        else:
            generation.begin(applied, output)
        try:
            await self._stream(generation, model)
        finally:
            generation.stop()

    async def _stream(self, generation: Generation, model: ModelInfo) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            made = generation.take()
            ended = generation.end if generation.error is None else None
            if made or ended is not None:
                await self._write(_response(made, model, generation, last=ended is not None))
                self._services.metrics.grpc_sent.add(1, *_METHOD)
            if generation.error is not None:
                raise generation.error
            if ended is not None:
                return

    async def _write(self, response: session_pb2.GenerateResponse) -> None:
        seconds_max = self._services.config.limits.slow_reader_seconds_max
        # Not cancelled: of a write that is, gRPC keeps the message for ever.
        writing = asyncio.create_task(self._context.write(response))
        writing.add_done_callback(_looked_at)
        done, _ = await asyncio.wait({writing}, timeout=seconds_max)
        if not done:
            raise SlowReader(
                f"the client read no results for {seconds_max:g} s",
                limit="limits.slow_reader_seconds_max",
                maximum=seconds_max,
            )
        writing.result()

    def _submit_step(self, step: int, row: bytes, generation: Generation) -> None:
        self._submit(step, 1, row, generation)

    def _submit(self, first_step: int, length: int, rows: bytes, generation: Generation) -> None:
        self._services.driver.submit(
            Chunk(
                session_id=self._session_id,
                principal=self._caller,
                model=generation.plan.model,
                epoch=self._epoch,  # a later claim ends this one
                first_step=first_step,
                length=length,
                rows=rows,
                output=OutputMode.LAST,
                reply=generation,
                arrived_seconds=self._services.clock.monotonic(),
            )
        )


def _looked_at(writing: "asyncio.Task[None]") -> None:
    """Of a write that fails once nobody waits for it any more, nobody needs to be told."""
    if not writing.cancelled():
        writing.exception()


def _response(
    made: list[Made], model: ModelInfo, generation: Generation, *, last: bool
) -> session_pb2.GenerateResponse:
    response = session_pb2.GenerateResponse(step=made[0].step if made else 0)
    if model.vocabulary_size:
        response.tokens.extend(each.token for each in made)
    else:
        response.rows = b"".join(each.row for each in made)
    if last and generation.end is not None:
        response.end = session_pb2.GenerateEnd.ValueType(generation.end)
        response.applied_step = generation.applied_step
    return response
