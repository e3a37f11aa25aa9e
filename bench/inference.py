"""The load in the inference protocol: streams of one sequence each, a request of each in flight."""

import asyncio
from typing import Any, Final

from grpc import aio

from bench.load import FINISH_SECONDS_MAX, OPTIONS, LoadError, Window, input_rows, loop
from bench.model import MODEL, SIZE
from conveyor.oip import inference_pb2

ANSWER_TAG: Final = 0x12
"""First byte of an answer that is no error: field 2 of ModelStreamInferResponse."""
_METHOD: Final = "/inference.GRPCInferenceService/ModelStreamInfer"


class InferenceFleet:
    """Sequences with one request in flight each, on a stream of its own."""

    def __init__(self, target: str, *, streams: int) -> None:
        """One step in each request."""
        self._channel = aio.insecure_channel(target, options=OPTIONS)
        method = self._channel.stream_stream(_METHOD)
        self._streams = [_Stream(method(), number) for number in range(1, streams + 1)]

    async def open(self) -> None:
        """See ``Fleet.open``."""
        await asyncio.gather(*(stream.open() for stream in self._streams))

    async def run(self, window: Window) -> None:
        """See ``Fleet.run``."""
        await asyncio.gather(*(loop(stream.exchange, 1, window) for stream in self._streams))

    async def close(self) -> None:
        """See ``Fleet.close``."""
        await asyncio.gather(*(stream.close() for stream in self._streams))
        await self._channel.close()


class _Stream:
    """One ModelStreamInfer call."""

    def __init__(self, call: Any, sequence: int) -> None:
        self._call = call
        self._first, self._next, self._last = (
            _request(sequence, start=start, end=end)
            for start, end in ((True, False), (False, False), (False, True))
        )

    async def open(self) -> None:
        """Begins the sequence."""
        await self._exchange(self._first)

    async def exchange(self) -> None:
        """One step."""
        await self._exchange(self._next)

    async def close(self) -> None:
        """Ends the sequence and the stream."""
        await self._exchange(self._last)
        await self._call.done_writing()
        async with asyncio.timeout(FINISH_SECONDS_MAX):
            while await self._call.read() is not aio.EOF:
                pass

    async def _exchange(self, request: bytes) -> None:
        await self._call.write(request)
        answer = await self._call.read()
        if answer is aio.EOF or answer[0] != ANSWER_TAG:
            raise LoadError(f"a request was answered by {answer!r}")


def _request(sequence: int, *, start: bool, end: bool) -> bytes:
    """A request of one step as the protocol's Python client writes it."""
    request = inference_pb2.ModelInferRequest(model_name=MODEL, id="1")
    request.parameters["sequence_id"].int64_param = sequence
    request.parameters["sequence_start"].bool_param = start
    request.parameters["sequence_end"].bool_param = end
    request.inputs.add(name="INPUT", datatype="FP32", shape=(1, 1, SIZE))
    request.raw_input_contents.append(input_rows(1))
    return request.SerializeToString()
