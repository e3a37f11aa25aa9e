"""`conveyor.v1.ModelService`."""

from conveyor.v1 import model_pb2, model_pb2_grpc
from conveyor_server.admission.fields import check_model_name, page_size
from conveyor_server.core import ModelInfo
from conveyor_server.errors import InvalidField
from conveyor_server.rpc.convert import model_message
from conveyor_server.rpc.service import Context, Services


class ModelServicer(model_pb2_grpc.ModelServiceServicer):
    """Describes what is loaded."""

    def __init__(self, services: Services) -> None:
        """Reads through the scheduler, like everybody."""
        self._services = services

    async def ListModels(
        self, request: model_pb2.ListModelsRequest, context: Context
    ) -> model_pb2.ListModelsResponse:
        """See the contract. A page token is the position of the page's first model."""
        size = page_size(request.page_size)
        token = request.page_token or "0"
        if not (token.isascii() and token.isdecimal() and len(token) < 10):
            raise InvalidField(
                "page_token", "is not valid; pass next_page_token of the answer before"
            )
        start = int(token)
        described = await self._services.driver.call(
            lambda operations: operations.describe_models()
        )
        page = described[start : start + size]
        return model_pb2.ListModelsResponse(
            models=[self._message(*each) for each in page],
            next_page_token=str(start + size) if start + size < len(described) else "",
        )

    async def GetModel(
        self, request: model_pb2.GetModelRequest, context: Context
    ) -> model_pb2.GetModelResponse:
        """See the contract. A version that sessions still run on is described, newest or not."""
        check_model_name(request.name)
        described = await self._services.driver.call(
            lambda operations: operations.describe_model(request.name, request.version)
        )
        return model_pb2.GetModelResponse(model=self._message(*described))

    def _message(self, info: ModelInfo, sessions: int, newest: bool) -> model_pb2.Model:
        return model_message(
            info,
            sessions=sessions,
            slots=self._services.engine.slots_total(info.key),
            newest=newest,
            device=self._services.device,
            limits=self._services.config.limits,
        )
