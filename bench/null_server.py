"""The comparator: our contracts on our server stack, with nothing behind them.

It runs grpc.aio with the very options of the real server and answers each frame with a ready-made
one of the size that the real server's answer has, so what it reaches is what the transport allows.
Given a bundle it runs the engine for each frame, and still nothing else.

    python -m bench.null_server READY_FILE [BUNDLE]
"""

import asyncio
import json
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from grpc import aio

from bench.null_inference import NullInference
from conveyor.oip import inference_pb2_grpc
from conveyor.v1 import session_pb2, session_pb2_grpc
from conveyor_models import load_bundle
from conveyor_server.app import GIL_SWITCH_SECONDS
from conveyor_server.config import LimitsConfig
from conveyor_server.core import ModelKey
from conveyor_server.engine.engine import TorchEngine
from conveyor_server.engine.port import Work
from conveyor_server.rpc.server import transport_options


class NullSessions(session_pb2_grpc.SessionServiceServicer):
    """Knows as many calls as the load needs. Rows out are as long as rows in."""

    def __init__(self) -> None:
        self._responses: dict[int, session_pb2.StepResponse] = {}

    async def StreamSteps(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, request_iterator: Any, context: Any
    ) -> None:
        """Answers opens with fresh handles and each steps frame with the one made for its size."""
        del request_iterator  # context.read is quicker
        ready: dict[tuple[int, int], session_pb2.StreamStepsResponse] = {}
        opened = 0
        while (request := await context.read()) is not aio.EOF:
            kind = request.WhichOneof("frame")
            if kind == "steps":
                answer = self._answer(request.steps, ready)
            elif kind == "open":
                opened += 1
                answer = session_pb2.StreamStepsResponse(
                    opened=session_pb2.OpenedFrame(tag=request.open.tag, handle=opened)
                )
            else:
                answer = session_pb2.StreamStepsResponse(
                    closed=session_pb2.ClosedFrame(handle=request.close.handle)
                )
            await context.write(answer)

    def _answer(
        self,
        frame: session_pb2.StepsFrame,
        ready: dict[tuple[int, int], session_pb2.StreamStepsResponse],
    ) -> session_pb2.StreamStepsResponse:
        key = (len(frame.entries), len(frame.rows))
        answer = ready.get(key)
        if answer is None:
            answer = ready[key] = _results(frame)
        return answer

    async def OpenSession(self, request: Any, context: Any) -> Any:
        """Says that the session is open."""
        session = session_pb2.Session(session_id=request.session_id)
        return session_pb2.OpenSessionResponse(session=session)

    async def CloseSession(self, request: Any, context: Any) -> Any:
        """Says that it is closed."""
        return session_pb2.CloseSessionResponse()

    async def Step(self, request: Any, context: Any) -> Any:
        """Answers with the message made for the size of these rows."""
        answer = self._responses.get(len(request.rows))
        if answer is None:
            answer = self._responses[len(request.rows)] = session_pb2.StepResponse(
                first_step=request.first_step,
                length=request.length,
                rows_length=request.length,
                rows=bytes(len(request.rows)),
            )
        return answer


class EngineSessions(NullSessions):
    """Runs the engine on each frame's one session; every stream has the same slot."""

    def __init__(self, bundle_folder: Path) -> None:
        super().__init__()
        bundle = load_bundle(bundle_folder)
        self._engine = TorchEngine(torch.device("cpu"), cpu_threads=1, slots=1)
        self._key = ModelKey(bundle.spec.name, bundle.spec.version)
        self._engine.add(self._key, self._engine.prepare(bundle))
        slot = self._engine.acquire(self._key)
        assert slot is not None
        self._slot = slot

    def _answer(
        self,
        frame: session_pb2.StepsFrame,
        ready: dict[tuple[int, int], session_pb2.StreamStepsResponse],
    ) -> session_pb2.StreamStepsResponse:
        answer = super()._answer(frame, ready)
        steps = frame.entries[0].length
        (done,) = self._engine.run(self._key, [Work(self._slot, steps, frame.rows, steps)])
        answer.results.rows = done.rows
        return answer


def _results(frame: session_pb2.StepsFrame) -> session_pb2.StreamStepsResponse:
    entries = [
        session_pb2.ResultsEntry(
            handle=entry.handle,
            first_step=entry.first_step,
            length=entry.length,
            rows_length=entry.length,
        )
        for entry in frame.entries
    ]
    results = session_pb2.ResultsFrame(entries=entries, rows=bytes(len(frame.rows)))
    return session_pb2.StreamStepsResponse(results=results)


def _sessions(bundle: Path | None) -> Any:
    if bundle is None:
        return NullSessions()  # pyright: ignore[reportAbstractUsage]
    return EngineSessions(bundle)  # pyright: ignore[reportAbstractUsage]


async def serve(ready_file: Path, bundle: Path | None) -> None:
    """Serves on a free port until SIGTERM."""
    sys.setswitchinterval(GIL_SWITCH_SECONDS)
    limits = LimitsConfig()
    server = aio.server(
        options=transport_options(limits),
        maximum_concurrent_rpcs=limits.concurrent_calls_max,
    )
    sessions = _sessions(bundle)
    session_pb2_grpc.add_SessionServiceServicer_to_server(sessions, server)
    inference = NullInference()  # pyright: ignore[reportAbstractUsage]
    inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(inference, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    partial = ready_file.with_name(ready_file.name + ".partial")
    partial.write_text(json.dumps({"address": f"127.0.0.1:{port}"}), encoding="utf-8")
    partial.replace(ready_file)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await stop.wait()
    await server.stop(0)


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]), Path(sys.argv[2]) if sys.argv[2:] else None))
