"""Predict: one whole sequence on a session that lives for the call."""

from conveyor.v1 import session_pb2
from conveyor_server.admission import check_model_name
from conveyor_server.core import Chunk, OpenRequest, OutputMode
from conveyor_server.errors import InvalidMemory
from conveyor_server.rpc.service import Services, Waiter


async def predict(
    services: Services, caller: str, request: session_pb2.PredictRequest
) -> session_pb2.PredictResponse:
    """Runs the sequence as one chunk, quantum by quantum, batched with everybody's."""
    if request.HasField("memory"):
        raise InvalidMemory("the model has no attention, so it takes no memory")
    services.admission.message(request.rows)
    check_model_name(request.model)
    model = services.driver.model(request.model, request.version)
    services.admission.sequence(model, request.length, request.rows, request.output)
    # The very version that the rows were checked against, whatever is the newest by then.
    wanted = OpenRequest(caller, "", model.key.name, model.key.version, ephemeral=True)
    waiter = Waiter()
    view = (await services.driver.call(lambda operations: operations.open(wanted))).view
    try:
        services.driver.submit(
            Chunk(
                session_id=view.session_id,
                principal=caller,
                model=view.model,
                epoch=view.epoch,
                first_step=1,
                length=request.length,
                rows=request.rows,
                output=OutputMode(request.output or OutputMode.ALL),
                reply=waiter.reply,
                arrived_seconds=services.clock.monotonic(),
            )
        )
        answer = await waiter.wait()
    finally:
        services.driver.post(lambda operations: operations.discard(caller, view.session_id))
    return session_pb2.PredictResponse(
        version=view.model.key.version,
        rows_length=answer.rows_length,
        rows=b"".join(answer.rows),
    )
