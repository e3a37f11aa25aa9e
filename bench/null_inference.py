"""The comparator of the inference protocol: its stream, with nothing behind it."""

from typing import Any

from grpc import aio

from conveyor.oip import inference_pb2, inference_pb2_grpc


class NullInference(inference_pb2_grpc.GRPCInferenceServiceServicer):
    """Knows as many calls as the load needs. Rows out are as long as rows in."""

    async def ModelStreamInfer(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, request_iterator: Any, context: Any
    ) -> None:
        """Answers each request with the message made for its size."""
        del request_iterator  # context.read is quicker
        ready: dict[int, inference_pb2.ModelStreamInferResponse] = {}
        while (request := await context.read()) is not aio.EOF:
            size = len(request.raw_input_contents[0])
            answer = ready.get(size)
            if answer is None:
                answer = ready[size] = _answer(request)
            await context.write(answer)


def _answer(request: inference_pb2.ModelInferRequest) -> inference_pb2.ModelStreamInferResponse:
    answer = inference_pb2.ModelStreamInferResponse()
    inner = answer.infer_response
    inner.model_name, inner.model_version, inner.id = request.model_name, "1", request.id
    inner.parameters["triton_final_response"].bool_param = True
    inner.outputs.add(name="OUTPUT", datatype="FP32", shape=request.inputs[0].shape)
    inner.raw_output_contents.append(bytes(len(request.raw_input_contents[0])))
    return answer
