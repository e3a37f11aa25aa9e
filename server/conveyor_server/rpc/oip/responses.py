"""Answers of this protocol."""

from typing import Final

from conveyor.oip import inference_pb2
from conveyor_server.core import ModelInfo
from conveyor_server.rpc.oip.tensors import OUTPUT, output_shape
from conveyor_server.rpc.oip.underway import Request

READY_MADE_MAX: Final = 64
"""Kinds of answers that a stream keeps ready."""
READY_MADE_BYTES_MAX: Final = 64 * 2**10
"""Larger ones are made each time: those that are kept hold the rows of the last one."""


def response(request: Request) -> inference_pb2.ModelInferResponse:
    """What a request that succeeded is answered."""
    model = request.model
    assert model is not None
    answer = inference_pb2.ModelInferResponse(id=request.asked.request_id)
    _describe(answer, model, request.length, stacked=request.stacked)
    answer.raw_output_contents.append(b"".join(request.rows))
    return answer


class StreamResponses:
    """Makes the answers of one stream.

    Of the answers to steps of one model only the id and the rows differ, so one message for each
    model and length is filled in anew each time: the one made before is written by then.
    """

    def __init__(self) -> None:
        """Nothing is ready-made yet."""
        self._ready: dict[
            tuple[int, int, bool], tuple[ModelInfo, inference_pb2.ModelStreamInferResponse]
        ] = {}

    def answer(self, request: Request) -> inference_pb2.ModelStreamInferResponse:
        """What a request that succeeded is answered; valid until the next one is made."""
        model = request.model
        assert model is not None
        key = (id(model), request.length, request.stacked)
        ready = self._ready.get(key)
        message = self._make(request, model) if ready is None else ready[1]
        inner = message.infer_response
        inner.id = request.asked.request_id
        rows = request.rows
        inner.raw_output_contents[0] = rows[0] if len(rows) == 1 else b"".join(rows)
        return message

    def failure(self, request: Request) -> inference_pb2.ModelStreamInferResponse:
        """What a request that failed is answered."""
        assert request.error is not None
        return inference_pb2.ModelStreamInferResponse(
            error_message=request.error.message,
            infer_response=inference_pb2.ModelInferResponse(id=request.asked.request_id),
        )

    def _make(self, request: Request, model: ModelInfo) -> inference_pb2.ModelStreamInferResponse:
        message = inference_pb2.ModelStreamInferResponse()
        inner = message.infer_response
        _describe(inner, model, request.length, stacked=request.stacked)
        inner.parameters["triton_final_response"].bool_param = True
        inner.raw_output_contents.append(b"")
        if request.length * model.output_row_bytes <= READY_MADE_BYTES_MAX:
            if len(self._ready) >= READY_MADE_MAX:
                self._ready.clear()
            # The model too, so that its id is nobody else's.
            self._ready[id(model), request.length, request.stacked] = (model, message)
        return message


def _describe(
    answer: inference_pb2.ModelInferResponse, model: ModelInfo, length: int, *, stacked: bool
) -> None:
    answer.model_name = model.key.name
    answer.model_version = str(model.key.version)
    answer.outputs.add(
        name=OUTPUT, datatype="FP32", shape=output_shape(model, length, stacked=stacked)
    )
