"""The calls of the protocol that this server refuses, each saying why."""

from typing import Final, NoReturn

from conveyor.oip import inference_pb2, inference_pb2_grpc
from conveyor_server.errors import NotSupported
from conveyor_server.rpc.service import Context

NO_SHARED_MEMORY: Final = "this server does not support shared memory; send tensors in messages"
NO_SETTINGS: Final = "this server's settings cannot be changed by calls; change its configuration"
NO_LOADING: Final = "this server loads what is in models.folder: add a bundle there, or remove it"


class UnsupportedCalls(inference_pb2_grpc.GRPCInferenceServiceServicer):
    """Everything that is not served; clients must be told so, and not of a mistake of ours."""

    async def RepositoryModelLoad(
        self, request: inference_pb2.RepositoryModelLoadRequest, context: Context
    ) -> NoReturn:
        """Refuses."""
        raise NotSupported(NO_LOADING)

    async def RepositoryModelUnload(
        self, request: inference_pb2.RepositoryModelUnloadRequest, context: Context
    ) -> NoReturn:
        """Refuses."""
        raise NotSupported(NO_LOADING)

    async def SystemSharedMemoryStatus(
        self, request: inference_pb2.SystemSharedMemoryStatusRequest, context: Context
    ) -> NoReturn:
        """Refuses."""
        raise NotSupported(NO_SHARED_MEMORY)

    async def SystemSharedMemoryRegister(
        self, request: inference_pb2.SystemSharedMemoryRegisterRequest, context: Context
    ) -> NoReturn:
        """Refuses."""
        raise NotSupported(NO_SHARED_MEMORY)

    async def SystemSharedMemoryUnregister(
        self, request: inference_pb2.SystemSharedMemoryUnregisterRequest, context: Context
    ) -> NoReturn:
        """Refuses."""
        raise NotSupported(NO_SHARED_MEMORY)

    async def CudaSharedMemoryStatus(
        self, request: inference_pb2.CudaSharedMemoryStatusRequest, context: Context
    ) -> NoReturn:
        """Refuses."""
        raise NotSupported(NO_SHARED_MEMORY)

    async def CudaSharedMemoryRegister(
        self, request: inference_pb2.CudaSharedMemoryRegisterRequest, context: Context
    ) -> NoReturn:
        """Refuses."""
        raise NotSupported(NO_SHARED_MEMORY)

    async def CudaSharedMemoryUnregister(
        self, request: inference_pb2.CudaSharedMemoryUnregisterRequest, context: Context
    ) -> NoReturn:
        """Refuses."""
        raise NotSupported(NO_SHARED_MEMORY)

    async def TraceSetting(
        self, request: inference_pb2.TraceSettingRequest, context: Context
    ) -> NoReturn:
        """Refuses."""
        raise NotSupported(NO_SETTINGS)

    async def LogSettings(
        self, request: inference_pb2.LogSettingsRequest, context: Context
    ) -> NoReturn:
        """Refuses."""
        raise NotSupported(NO_SETTINGS)
