"""The protocol by hand: requests that the real client cannot be made to send."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt
from grpc import aio

from conveyor.oip import inference_pb2, inference_pb2_grpc
from tests.integration.wire import WAIT_SECONDS_MAX, Metadata

DATATYPES: Final = {"float32": "FP32", "int32": "INT32"}


def request(
    model: str,
    rows: npt.NDArray[Any],
    sequence: int | str | None = None,
    *,
    start: bool = False,
    end: bool = False,
    request_id: str = "",
    version: str = "",
    shape: tuple[int, ...] | None = None,
    datatype: str = "",
    raw: bytes | None = None,
    contents: Mapping[str, Any] | None = None,
    parameters: Mapping[str, Mapping[str, Any]] | None = None,
    outputs: tuple[str, ...] = (),
    name: str = "INPUT",
) -> inference_pb2.ModelInferRequest:
    """A request of ``rows`` [steps, size]; every part of it can be replaced."""
    message = inference_pb2.ModelInferRequest(
        model_name=model, model_version=version, id=request_id
    )
    if isinstance(sequence, int):
        message.parameters["sequence_id"].int64_param = sequence
    elif sequence is not None:
        message.parameters["sequence_id"].string_param = sequence
    message.parameters["sequence_start"].bool_param = start
    message.parameters["sequence_end"].bool_param = end
    for key, fields in (parameters or {}).items():
        message.parameters[key].CopyFrom(inference_pb2.InferParameter(**fields))
    tensor = message.inputs.add(
        name=name,
        datatype=datatype or DATATYPES[str(rows.dtype)],
        shape=(1, *rows.shape) if shape is None else shape,
    )
    if contents is None:
        message.raw_input_contents.append(rows.tobytes() if raw is None else raw)
    else:
        tensor.contents.CopyFrom(inference_pb2.InferTensorContents(**contents))
        if raw is not None:
            message.raw_input_contents.append(raw)
    for output in outputs:
        message.outputs.add(name=output)
    return message


def output(answer: inference_pb2.ModelInferResponse) -> npt.NDArray[np.float32]:
    """The rows of an answer, [steps, size]."""
    (tensor,), (raw,) = answer.outputs, answer.raw_output_contents
    assert (tensor.name, tensor.datatype) == ("OUTPUT", "FP32")
    return np.frombuffer(raw, dtype="<f4").reshape(tuple(tensor.shape))[0]


class Protocol:
    """A channel to one server."""

    def __init__(self, address: str, metadata: Metadata = ()) -> None:
        options = [
            ("grpc.max_send_message_length", -1),
            ("grpc.max_receive_message_length", -1),
            ("grpc.use_local_subchannel_pool", 1),
        ]
        self.channel = aio.insecure_channel(address, options=options)
        self.stub = inference_pb2_grpc.GRPCInferenceServiceStub(self.channel)
        self.metadata = metadata

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *failure: object) -> None:
        await self.channel.close()

    async def infer(self, *arguments: Any, **parts: Any) -> inference_pb2.ModelInferResponse:
        return await self.stub.ModelInfer(request(*arguments, **parts), metadata=self.metadata)

    @asynccontextmanager
    async def stream(self, **metadata: str) -> AsyncIterator[Stream]:
        stream = Stream(self.stub.ModelStreamInfer(metadata=(*self.metadata, *metadata.items())))
        try:
            yield stream
        finally:
            stream.call.cancel()


class Stream:
    """One ModelStreamInfer call."""

    def __init__(self, call: Any) -> None:
        self.call = call

    async def send(self, *arguments: Any, **parts: Any) -> None:
        await self.call.write(request(*arguments, **parts))

    async def read(self) -> inference_pb2.ModelStreamInferResponse:
        """The next answer."""
        async with asyncio.timeout(WAIT_SECONDS_MAX):
            answer = await self.call.read()
        assert answer is not aio.EOF, "the stream ended"
        return answer

    async def answers(self, count: int) -> list[inference_pb2.ModelStreamInferResponse]:
        """The next so many."""
        return [await self.read() for _ in range(count)]

    async def end(self) -> list[inference_pb2.ModelStreamInferResponse]:
        """Half-closes and reads to the end, which has to be OK."""
        await self.call.done_writing()
        found: list[inference_pb2.ModelStreamInferResponse] = []
        async with asyncio.timeout(WAIT_SECONDS_MAX):
            while (answer := await self.call.read()) is not aio.EOF:
                found.append(answer)
        return found
