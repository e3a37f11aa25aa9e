"""Models with attention, and models that run whole sequences only, in the inference protocol."""

from __future__ import annotations

from collections.abc import AsyncIterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from conveyor.oip import inference_pb2
from conveyor_models import Bundle
from tests.integration.bundles import add_model
from tests.integration.conftest import StartServer
from tests.integration.oip.protocol import Protocol, output, request
from tests.integration.process import ServerProcess
from tests.integration.test_attention import BOTHWAYS, LOOKING
from tests.integration.wire import Refusal, Wire, refused, until

IDS = count(3_000_000)
INVALID_MEMORY = Refusal("INVALID_ARGUMENT", "INVALID_MEMORY")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Bundle, Bundle]:
    folder = tmp_path_factory.mktemp("attentive")
    return (
        folder,
        add_model(folder, "looking", LOOKING, seed=3),
        add_model(folder, "bothways", BOTHWAYS, seed=4),
    )


@pytest.fixture(scope="module")
def server(start_server: StartServer, models: tuple[Path, Bundle, Bundle]) -> ServerProcess:
    settings = {"limits.memory_rows_max": 12, "shutdown.grace_seconds": 2}
    return start_server(settings, models=models[0])


@pytest.fixture
async def protocol(server: ServerProcess) -> AsyncIterator[Protocol]:
    async with Protocol(server.address) as connected:
        yield connected


def random(*shape: int, seed: int = 0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def looking(
    steps: npt.NDArray[Any],
    sequence: int,
    memory: npt.NDArray[Any] | None = None,
    *,
    first: bool = False,
    shape: tuple[int, ...] | None = None,
    datatype: str = "FP32",
    **parts: Any,
) -> inference_pb2.ModelInferRequest:
    """A request with a memory [rows, 5] beside its steps, or ``first`` before them."""
    message = request("looking", steps, sequence, **parts)
    if memory is not None:
        tensor = inference_pb2.ModelInferRequest.InferInputTensor(
            name="MEMORY", datatype=datatype, shape=(1, *memory.shape) if shape is None else shape
        )
        message.inputs.insert(0 if first else 1, tensor)
        message.raw_input_contents.insert(0 if first else 1, memory.tobytes())
    return message


def reference(bundle: Bundle, x: Any, memory: Any = None) -> npt.NDArray[np.float32]:
    """What `conveyor_models.Network` makes of one sequence, [steps, outputs]."""
    network, steps = bundle.network(), torch.from_numpy(x.copy())[:, None]
    if memory is None:
        return network.predict(steps)[:, 0].numpy()
    rows = torch.from_numpy(memory.copy())[None]
    return network.run(steps, memory=network.memory(rows))[1][:, 0].numpy()


async def test_a_memory_comes_with_the_start(
    protocol: Protocol, server: ServerProcess, models: tuple[Path, Bundle, Bundle]
) -> None:
    x, memory, number = random(6, 3), random(7, 5, seed=1), next(IDS)
    infer = protocol.stub.ModelInfer
    out = [await infer(looking(x[:2], number, memory, start=True))]
    out.append(await infer(looking(x[2:], number)))
    found = np.concatenate([output(each) for each in out])
    np.testing.assert_allclose(found, reference(models[1], x, memory), rtol=0, atol=1e-5)
    async with Wire(server.address) as wire:
        assert (await wire.get(f"oip.i:looking:{number}")).memory_rows == 7


async def test_a_start_brings_a_memory_of_its_own(
    protocol: Protocol, models: tuple[Path, Bundle, Bundle]
) -> None:
    """By calls, and on a stream with nothing answered between."""
    x, number = random(2, 3), next(IDS)
    memories = [random(rows, 5, seed=rows) for rows in (3, 9, 1)]
    expected = [reference(models[1], x, memory) for memory in memories]
    for memory, wanted in zip(memories, expected, strict=True):
        answer = await protocol.stub.ModelInfer(looking(x, number, memory, start=True))
        np.testing.assert_allclose(output(answer), wanted, rtol=0, atol=1e-5)
    async with protocol.stream() as stream:
        for position, memory in enumerate(memories):
            message = looking(x, number, memory, start=True, first=position == 1)
            await stream.call.write(message)
        answers = await stream.end()
    for answer, wanted in zip(answers, expected, strict=True):
        assert not answer.error_message
        np.testing.assert_allclose(output(answer.infer_response), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["FP64", "typed"])
async def test_a_memory_of_another_type_is_converted(protocol: Protocol, kind: str) -> None:
    x, memory = random(1, 3), np.arange(10.0).reshape(2, 5)
    infer = protocol.stub.ModelInfer
    plain = looking(x, next(IDS), memory.astype(np.float32), start=True)
    other = looking(x, next(IDS), memory, start=True, datatype="FP64")
    if kind == "typed":
        del other.raw_input_contents[:]
        other.inputs[0].contents.fp32_contents.extend(x[0].tolist())
        other.inputs[1].contents.fp64_contents.extend(memory.ravel().tolist())
    assert output(await infer(other)).tobytes() == output(await infer(plain)).tobytes()


WRONG: dict[str, tuple[dict[str, Any], Refusal]] = {
    "none": ({"memory": None}, INVALID_MEMORY),
    "no row": ({"memory": random(0, 5)}, INVALID_MEMORY),
    "a row too many": (
        {"memory": random(13, 5)},
        Refusal("RESOURCE_EXHAUSTED", "MEMORY_TOO_LARGE"),
    ),
    "a wrong size": ({"memory": random(2, 4)}, Refusal("INVALID_ARGUMENT", "INVALID_SHAPE")),
    "too few bytes": (
        {"memory": random(2, 5), "shape": (1, 3, 5)},
        Refusal("INVALID_ARGUMENT", "INVALID_SHAPE"),
    ),
    "two in the batch": (
        {"memory": random(2, 5), "shape": (2, 1, 5)},
        Refusal("INVALID_ARGUMENT", "INVALID_SHAPE"),
    ),
    "NaN": (
        {"memory": np.full((1, 5), np.nan, np.float32)},
        Refusal("INVALID_ARGUMENT", "NON_FINITE_INPUT"),
    ),
    "texts": (
        {"memory": random(2, 5), "datatype": "BYTES"},
        Refusal("INVALID_ARGUMENT", "INVALID_FIELD"),
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
async def test_a_wrong_memory_is_refused_and_changes_nothing(
    protocol: Protocol, server: ServerProcess, wrong: str
) -> None:
    x, number = random(1, 3), next(IDS)
    parts, expected = WRONG[wrong]
    infer = protocol.stub.ModelInfer
    await infer(looking(x, number, random(3, 5), start=True))
    assert await refused(infer(looking(x, number, start=True, **parts))) == expected
    async with Wire(server.address) as wire:
        view = await wire.get(f"oip.i:looking:{number}")
        assert (view.applied_step, view.memory_rows) == (1, 3)


@pytest.mark.parametrize("streamed", [False, True], ids=["call", "stream"])
@pytest.mark.parametrize("wrong", ["NaN", "no step", "too few bytes"])
async def test_a_start_with_wrong_steps_leaves_the_live_sequence_as_it_was(
    protocol: Protocol, server: ServerProcess, wrong: str, *, streamed: bool
) -> None:
    number, memory = next(IDS), random(3, 5)
    infer = protocol.stub.ModelInfer
    await infer(looking(random(2, 3), number, memory, start=True))
    x = {"NaN": np.full((1, 3), np.nan, np.float32), "no step": random(0, 3)}.get(wrong)
    message = looking(random(1, 3) if x is None else x, number, random(4, 5), start=True)
    if wrong == "too few bytes":
        message.raw_input_contents[0] = b"\0\0\0\0"
    if streamed:
        async with protocol.stream() as stream:
            await stream.call.write(message)
            assert (await stream.read()).error_message
    else:
        assert (await refused(infer(message))).code == "INVALID_ARGUMENT"
    async with Wire(server.address) as wire:
        view = await wire.get(f"oip.i:looking:{number}")
        assert (view.applied_step, view.memory_rows) == (2, 3)


async def test_a_memory_is_for_the_start_and_for_attention_only(protocol: Protocol) -> None:
    x, number, memory = random(1, 3), next(IDS), random(3, 5)
    infer = protocol.stub.ModelInfer
    await infer(looking(x, number, memory, start=True))
    found = await refused(infer(looking(x, number, memory)))
    assert "START flag only" in found.message
    message = looking(x, number, memory)
    message.inputs[1].name = "INPUT"
    assert "unexpected inference input" in (await refused(infer(message))).message
    message = looking(x, number, memory, start=True)
    message.model_name = "bothways"
    del message.parameters["sequence_id"]
    assert "unexpected inference input 'MEMORY'" in (await refused(infer(message))).message
    message = looking(x, number, memory, start=True)
    del message.inputs[0], message.raw_input_contents[0]
    assert "input 'INPUT' of model" in (await refused(infer(message))).message


async def test_both_kinds_are_described(protocol: Protocol) -> None:
    stub = protocol.stub
    config = (await stub.ModelConfig(inference_pb2.ModelConfigRequest(name="looking"))).config
    assert [(each.name, list(each.dims), each.optional) for each in config.input] == [
        ("INPUT", [-1, 3], False),
        ("MEMORY", [-1, 5], True),
    ]
    metadata = await stub.ModelMetadata(inference_pb2.ModelMetadataRequest(name="looking"))
    assert [(each.name, list(each.shape)) for each in metadata.inputs] == [
        ("INPUT", [-1, -1, 3]),
        ("MEMORY", [-1, -1, 5]),
    ]
    assert config.HasField("sequence_batching")
    whole = (await stub.ModelConfig(inference_pb2.ModelConfigRequest(name="bothways"))).config
    assert whole.WhichOneof("scheduling_choice") is None
    assert [each.name for each in whole.input] == ["INPUT"]


async def test_whole_sequences_run_without_an_id(
    protocol: Protocol, models: tuple[Path, Bundle, Bundle]
) -> None:
    lengths = (5, 1, 40)
    xs = [random(length, 3, seed=length) for length in lengths]
    expected = [reference(models[2], x) for x in xs]
    for x, wanted in zip(xs, expected, strict=True):
        answer = await protocol.infer("bothways", x)
        np.testing.assert_allclose(output(answer), wanted, rtol=0, atol=1e-5)
    async with protocol.stream() as stream:
        for number, x in enumerate(xs):
            await stream.send("bothways", x, request_id=f"{number}")
        answers = await stream.end()
    assert [each.infer_response.id for each in answers] == ["0", "1", "2"]
    for answer, wanted in zip(answers, expected, strict=True):
        np.testing.assert_allclose(output(answer.infer_response), wanted, rtol=0, atol=1e-5)


async def test_a_whole_sequence_is_no_part_of_another(protocol: Protocol) -> None:
    x = random(3, 3)
    found = await refused(protocol.infer("bothways", x, 5, start=True))
    assert found == Refusal("FAILED_PRECONDITION", "MODEL_NOT_STREAMABLE")
    assert "without a sequence_id" in found.message
    empty = await refused(protocol.infer("bothways", x[:0]))
    assert empty == Refusal("INVALID_ARGUMENT", "EMPTY_CHUNK")


async def test_a_whole_sequence_of_a_cancelled_stream_is_dropped(
    protocol: Protocol, server: ServerProcess
) -> None:
    before = server.metric("conveyor_steps_total", model="bothways")
    async with protocol.stream() as stream:
        for _ in range(3):
            await stream.send("bothways", random(60_000, 3))
        await until(lambda: server.metric("conveyor_inbox_chunks") > 0)
        stream.call.cancel()
    await until(lambda: server.metric("conveyor_inbox_chunks") == 0)
    assert server.metric("conveyor_steps_total", model="bothways") < before + 3 * 60_000
