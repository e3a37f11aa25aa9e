"""The server and its models, described the way this protocol does."""

from importlib import metadata
from typing import Final

from conveyor.oip import config_pb2, inference_pb2
from conveyor_server.config import LimitsConfig
from conveyor_server.core import InputKind, ModelInfo
from conveyor_server.rpc.oip.tensors import DATATYPES, INPUT, MEMORY, OUTPUT

PLATFORM: Final = "conveyor"
EXTENSIONS: Final = ("sequence", "sequence(string_id)", "model_configuration", "statistics")
ANY: Final = -1
_CONFIG_TYPES: Final = {
    InputKind.FEATURES: config_pb2.TYPE_FP32,
    InputKind.TOKENS: config_pb2.TYPE_INT32,
}


def server_metadata() -> inference_pb2.ServerMetadataResponse:
    """Name, version and what of the protocol's extensions there is."""
    return inference_pb2.ServerMetadataResponse(
        name="conveyor", version=metadata.version("conveyor"), extensions=EXTENSIONS
    )


def model_metadata(
    model: ModelInfo, versions: list[int], limits: LimitsConfig
) -> inference_pb2.ModelMetadataResponse:
    """A model's tensors; their first dimension is the batch's, which a client leaves at 1."""
    tensor = inference_pb2.ModelMetadataResponse.TensorMetadata
    steps = _steps(model, limits)
    datatype = DATATYPES[model.input_kind]
    inputs = [tensor(name=INPUT, datatype=datatype, shape=(ANY, steps, model.input_size))]
    if model.memory_row_size:
        inputs.append(tensor(name=MEMORY, datatype="FP32", shape=(ANY, ANY, model.memory_row_size)))
    return inference_pb2.ModelMetadataResponse(
        name=model.key.name,
        versions=[str(version) for version in versions],
        platform=PLATFORM,
        inputs=inputs,
        outputs=[tensor(name=OUTPUT, datatype="FP32", shape=(ANY, steps, model.output_size))],
    )


def model_config(
    model: ModelInfo, limits: LimitsConfig, device: str
) -> inference_pb2.ModelConfigResponse:
    """A model's configuration: as much of it as clients look at."""
    steps = _steps(model, limits)
    kind = config_pb2.ModelInstanceGroup.KIND_CPU
    if device.startswith("cuda"):
        kind = config_pb2.ModelInstanceGroup.KIND_GPU
    config = config_pb2.ModelConfig(
        name=model.key.name,
        platform=PLATFORM,
        backend=PLATFORM,
        version_policy=config_pb2.ModelVersionPolicy(all=config_pb2.ModelVersionPolicy.All()),
        max_batch_size=1,
        output=[
            config_pb2.ModelOutput(
                name=OUTPUT, data_type=config_pb2.TYPE_FP32, dims=(steps, model.output_size)
            )
        ],
        instance_group=[config_pb2.ModelInstanceGroup(name=PLATFORM, kind=kind, count=1)],
        model_transaction_policy=config_pb2.ModelTransactionPolicy(decoupled=False),
    )
    config.input.add(
        name=INPUT, data_type=_CONFIG_TYPES[model.input_kind], dims=(steps, model.input_size)
    )
    if model.memory_row_size:
        # Only the first request of a sequence has it.
        dims = (ANY, model.memory_row_size)
        config.input.add(name=MEMORY, data_type=config_pb2.TYPE_FP32, dims=dims, optional=True)
    if model.streamable:
        batching = config.sequence_batching
        batching.oldest.max_candidate_sequences = min(limits.sessions_max, 2**31 - 1)
        batching.max_sequence_idle_microseconds = round(limits.idle_seconds_default * 1e6)
    return inference_pb2.ModelConfigResponse(config=config)


def repository_index(models: list[ModelInfo]) -> inference_pb2.RepositoryIndexResponse:
    """The versions in service."""
    return inference_pb2.RepositoryIndexResponse(
        models=[
            inference_pb2.RepositoryIndexResponse.ModelIndex(
                name=model.key.name, version=str(model.key.version), state="READY"
            )
            for model in models
        ]
    )


def _steps(model: ModelInfo, limits: LimitsConfig) -> int:
    """The dimension of steps: any number of them, where more than one are taken at a time."""
    return 1 if min(model.chunk_steps_max, limits.chunk_steps_max) == 1 else ANY
