"""`inference.GRPCInferenceService`."""

import asyncio
from collections.abc import AsyncIterator

from conveyor.oip import inference_pb2
from conveyor_server.core import ModelInfo
from conveyor_server.errors import ConveyorError, NotSupported
from conveyor_server.rpc.access import principal
from conveyor_server.rpc.oip import describe
from conveyor_server.rpc.oip.refusals import Refusal, shown
from conveyor_server.rpc.oip.requests import read, version_of
from conveyor_server.rpc.oip.responses import response
from conveyor_server.rpc.oip.sequences import Sequences, resolve
from conveyor_server.rpc.oip.statistics import Statistics
from conveyor_server.rpc.oip.stream import InferStream
from conveyor_server.rpc.oip.tensors import check_outputs, read_steps
from conveyor_server.rpc.oip.underway import Request
from conveyor_server.rpc.oip.unsupported import UnsupportedCalls
from conveyor_server.rpc.service import Context, Services
from conveyor_server.rpc.streams import Streams


class InferenceServicer(UnsupportedCalls):
    """Each method converts, delegates and converts back."""

    def __init__(self, services: Services, streams: Streams) -> None:
        """`streams` keeps count of the long streams of both protocols."""
        self._services = services
        self._driver = services.driver
        self._streams = streams
        self._sequences = Sequences(services, streams)
        self._statistics = Statistics(services.clock)

    # --- what there is ---------------------------------------------------------------------------

    async def ServerLive(
        self, request: inference_pb2.ServerLiveRequest, context: Context
    ) -> inference_pb2.ServerLiveResponse:
        """See the contract."""
        return inference_pb2.ServerLiveResponse(live=True)

    async def ServerReady(
        self, request: inference_pb2.ServerReadyRequest, context: Context
    ) -> inference_pb2.ServerReadyResponse:
        """See the contract."""
        return inference_pb2.ServerReadyResponse(ready=not self._streams.draining)

    async def ModelReady(
        self, request: inference_pb2.ModelReadyRequest, context: Context
    ) -> inference_pb2.ModelReadyResponse:
        """See the contract. A model that is not there is not ready."""
        try:
            self._resolve(request.name, request.version)
        except Refusal:
            return inference_pb2.ModelReadyResponse(ready=False)
        return inference_pb2.ModelReadyResponse(ready=not self._streams.draining)

    async def ServerMetadata(
        self, request: inference_pb2.ServerMetadataRequest, context: Context
    ) -> inference_pb2.ServerMetadataResponse:
        """See the contract."""
        return describe.server_metadata()

    async def ModelMetadata(
        self, request: inference_pb2.ModelMetadataRequest, context: Context
    ) -> inference_pb2.ModelMetadataResponse:
        """See the contract."""
        model = self._resolve(request.name, request.version)
        served = await self._served()
        versions = [each.key.version for each in served if each.key.name == model.key.name]
        return describe.model_metadata(model, versions, self._services.config.limits)

    async def ModelConfig(
        self, request: inference_pb2.ModelConfigRequest, context: Context
    ) -> inference_pb2.ModelConfigResponse:
        """See the contract."""
        model = self._resolve(request.name, request.version)
        return describe.model_config(model, self._services.config.limits, self._services.device)

    async def ModelStatistics(
        self, request: inference_pb2.ModelStatisticsRequest, context: Context
    ) -> inference_pb2.ModelStatisticsResponse:
        """See the contract."""
        served = await self._served()
        self._statistics.keep(served)
        if request.name:
            model = self._resolve(request.name, request.version)
            served = [each for each in served if each.key.name == request.name]
            if request.version:
                served = [model]
        return self._statistics.message(served)

    async def RepositoryIndex(
        self, request: inference_pb2.RepositoryIndexRequest, context: Context
    ) -> inference_pb2.RepositoryIndexResponse:
        """See the contract."""
        if request.repository_name:
            raise NotSupported(
                f"there is no repository {shown(request.repository_name)!r}: this server has one,"
                " without a name; leave repository_name empty"
            )
        return describe.repository_index(await self._served())

    # --- inference -------------------------------------------------------------------------------

    async def ModelInfer(
        self, request: inference_pb2.ModelInferRequest, context: Context
    ) -> inference_pb2.ModelInferResponse:
        """See the contract."""
        received = self._services.clock.monotonic()
        self._sequences.check_serving()
        asked = read(request)
        remaining = context.time_remaining()
        # Without a deadline it is None, though grpc's types do not say so.
        if remaining is not None:  # pyright: ignore[reportUnnecessaryComparison]
            asked.timeout_seconds = min(asked.timeout_seconds or remaining, remaining)
        single = _Single()
        one = Request(asked, single, received)
        try:
            one.model = await self._sequences.model_of(asked, principal())
            await self._submit(one, one.model, request)
            await single.future
        except ConveyorError as error:
            one.error = error
            self._statistics.count(one, received)
            raise
        except asyncio.CancelledError:
            self._sequences.drop([one])
            raise
        ready = self._services.clock.monotonic()
        answer = response(one)
        self._statistics.count(one, ready)
        return answer

    # Writing through the context, a handler returns nothing to iterate over.
    async def ModelStreamInfer(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, request_iterator: AsyncIterator[inference_pb2.ModelInferRequest], context: Context
    ) -> None:
        """See the contract. Reads and writes through the context, like StreamSteps."""
        stream = InferStream(
            self._services, self._sequences, self._statistics, principal(), context, self._streams
        )
        with self._streams.joined(stream):
            await stream.serve()

    # --- helpers ---------------------------------------------------------------------------------

    async def _submit(
        self, one: Request, model: ModelInfo, message: inference_pb2.ModelInferRequest
    ) -> None:
        check_outputs(message, model)
        steps = read_steps(message, model, self._services.admission)
        caller = principal()
        self._services.results.count_for_call(caller, steps.length * model.output_row_bytes)
        if one.asked.start:
            await self._sequences.make_way(one, model, caller, steps)
        self._sequences.submit(one, model, caller, steps)

    def _resolve(self, name: str, version: str) -> ModelInfo:
        return resolve(self._driver, name, version_of(version) if version else None)

    async def _served(self) -> list[ModelInfo]:
        """The versions in service."""
        described = await self._driver.call(lambda operations: operations.describe_models())
        return [model for model, _, _ in described]


class _Single:
    """Waits for what becomes of one request."""

    def __init__(self) -> None:
        """On the running loop."""
        self.future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def answered(self, request: Request) -> None:
        """See `underway.Waiting`."""
        if self.future.done():  # the call was cancelled
            return
        if request.error is None:
            self.future.set_result(None)
        else:
            self.future.set_exception(request.error)
