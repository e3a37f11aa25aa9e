"""Predict: one whole sequence, of which nothing is kept."""

import asyncio

from conveyor.v1 import session_pb2
from conveyor_server.admission.fields import check_model_name
from conveyor_server.core import Chunk, ModelInfo, OutputMode, WholeSequence
from conveyor_server.errors import ConveyorError, InvalidMemory
from conveyor_server.rpc.convert import memory_rows
from conveyor_server.rpc.service import Services, Waiter, session_for_call


async def predict(
    services: Services,
    caller: str,
    request: session_pb2.PredictRequest,
    remaining_seconds: float | None = None,
) -> session_pb2.PredictResponse:
    """Checks the sequence and runs it.

    Args:
        services: The rooms below.
        caller: Its principal.
        request: What to run.
        remaining_seconds: Until the caller waits no more, if that is known.
    """
    services.admission.message(request.rows)
    check_model_name(request.model)
    model = services.driver.model(request.model, request.version)
    services.admission.sequence(model, request.length, request.rows, request.output)
    output = OutputMode(request.output or OutputMode.ALL)
    outputs = {OutputMode.ALL: request.length, OutputMode.LAST: 1, OutputMode.NONE: 0}[output]
    services.results.count_for_call(caller, outputs * model.output_row_bytes)
    if model.streamable:
        return await _on_a_session(services, caller, request, model, output)
    if request.HasField("memory"):
        raise InvalidMemory(f"model {model.key.name!r} has no attention, so leave the memory out")
    return await _whole(services, request, model, outputs, remaining_seconds)


async def _on_a_session(
    services: Services,
    caller: str,
    request: session_pb2.PredictRequest,
    model: ModelInfo,
    output: OutputMode,
) -> session_pb2.PredictResponse:
    """Runs it as one chunk of a session of its own, quantum by quantum, batched with others."""
    memory = services.admission.memory(memory_rows(request), request.rows)
    # The very version that the rows were checked against, whatever is the newest by then.
    name, version = model.key
    waiter = Waiter()
    async with session_for_call(services, caller, name, version, memory) as view:
        services.driver.submit(
            Chunk(
                session_id=view.session_id,
                principal=caller,
                model=view.model,
                epoch=view.epoch,
                first_step=1,
                length=request.length,
                rows=request.rows,
                output=output,
                reply=waiter.reply,
                arrived_seconds=services.clock.monotonic(),
            )
        )
        answer = await waiter.wait()
    return session_pb2.PredictResponse(
        version=view.model.key.version,
        rows_length=answer.rows_length,
        rows=b"".join(answer.rows),
    )


async def _whole(
    services: Services,
    request: session_pb2.PredictRequest,
    model: ModelInfo,
    outputs: int,
    remaining_seconds: float | None,
) -> session_pb2.PredictResponse:
    """Runs it through a model that cannot be stepped, a slice at a time."""
    done: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def settle(outcome: bytes | ConveyorError) -> None:
        if done.done():  # the call was cancelled
            return
        if isinstance(outcome, ConveyorError):
            done.set_exception(outcome)
        else:
            done.set_result(outcome)

    now = services.clock.monotonic()
    sequence = WholeSequence(
        model=model,
        rows=request.rows,
        length=request.length,
        outputs=outputs,
        settle=settle,
        arrived_seconds=now,
        deadline_seconds=None if remaining_seconds is None else now + remaining_seconds,
    )
    try:
        await services.driver.call(lambda operations: operations.predict(sequence))
        rows = await done
    finally:
        services.driver.post(lambda operations: operations.drop_prediction(sequence))
    return session_pb2.PredictResponse(
        version=model.key.version, rows_length=sequence.outputs, rows=rows
    )
