"""Valid inputs that the fuzzer begins with."""

from __future__ import annotations

import io
import struct
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import safetensors.torch
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from conveyor.v1 import session_pb2
from conveyor_models.spec import parse_spec
from conveyor_server.sessions.tokens import make_token
from tests.attacks import model_files
from tests.support.models import FEATURES
from tests.support.rig import Rig, rows_of

_DIGEST_BYTES: Final = 32


def open_frame() -> session_pb2.OpenFrame:
    request = session_pb2.OpenSessionRequest(model=FEATURES.key.name, session_id="s")
    return session_pb2.OpenFrame(tag=1, session=request)


def frames() -> list[bytes]:
    """Calls of a few frames each."""
    entry = session_pb2.StepsEntry(handle=1, first_step=1, length=2, output=1)
    steps = session_pb2.StepsFrame(entries=[entry], rows=rows_of(FEATURES, 1, 2))
    again = session_pb2.StepsFrame(entries=[entry, entry], rows=rows_of(FEATURES, 1, 2, 3, 4))
    steps.timeout.FromMilliseconds(5)
    every = {
        "steps": steps,
        "open": open_frame(),
        "close": session_pb2.CloseFrame(handle=1),
        "heartbeat": session_pb2.HeartbeatFrame(nonce=7),
    }
    calls = [[{name: value}] for name, value in every.items()]
    calls += [[{"steps": steps}, {"steps": again}, {"close": every["close"]}]]
    return [
        b"".join(_behind_length(session_pb2.StreamStepsRequest(**each)) for each in call)
        for call in calls
    ]


def _behind_length(message: Any) -> bytes:
    data = message.SerializeToString()
    return struct.pack("<H", len(data)) + data


def records() -> list[bytes]:
    rig = Rig()
    rig.open()
    rig.step("s", 1, [1, 2, 3])
    return [rig.export()]


def snapshots() -> list[bytes]:
    """Records without their checksums."""
    return [each[:-_DIGEST_BYTES] for each in records()]


def tokens() -> list[bytes]:
    return [make_token("s", 1, "life").encode(), make_token("other", 2**62, "death").encode()]


# --- Models --------------------------------------------------------------------------------------


def _written(write: Callable[[Path], object], suffix: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"model{suffix}"
        write(file)
        return file.read_bytes()


def _states() -> list[dict[str, Any]]:
    torch.manual_seed(0)
    return [
        nn.LSTM(2, 3).state_dict(),
        nn.GRU(2, 3, bidirectional=True).state_dict(),
        nn.ModuleDict(
            {"embed": nn.Embedding(4, 2), "rnn": nn.LSTM(2, 2), "head": nn.Linear(2, 3)}
        ).state_dict(),
    ]


def bundles() -> list[bytes]:
    toml = (
        b'schema = 1\nname = "m"\nversion = 1\ninput = { kind = "features", size = 1 }\n'
        b'layers = [{ cell = "gru", size = 1 }]\n'
    )

    shapes = parse_spec(toml.decode(), source=Path("model.toml")).weight_shapes
    weights = safetensors.torch.save({name: torch.zeros(shape) for name, shape in shapes.items()})
    return [struct.pack("<H", len(toml)) + toml + weights]


def safetensors_files() -> list[bytes]:
    return [safetensors.torch.save(dict(state)) for state in _states()]


def torch_files() -> list[bytes]:
    return [_written(lambda file, s=state: torch.save(s, file), ".pt") for state in _states()]


def pickles() -> list[bytes]:
    """The pickle of the first of them; the target adds the storages again."""
    found: list[bytes] = []
    for data in torch_files()[:1]:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            found.append(archive.read("model/data.pkl"))
    return found


def onnx_files() -> list[bytes]:
    random = np.random.default_rng(0)
    found: list[bytes] = []
    for op, gates in (("LSTM", 4), ("GRU", 3), ("RNN", 1)):
        shapes = {"W": (1, 2 * gates, 2), "R": (1, 2 * gates, 2), "B": (1, 4 * gates)}
        constants = {k: random.normal(0, 1, v).astype(np.float32) for k, v in shapes.items()}
        constants["K"] = np.ones((2, 3), np.float32)
        constants["one"] = np.array([1], np.int64)
        nodes = [
            helper.make_node(op, ["x", "W", "R", "B"], ["y", "h"], hidden_size=2),
            helper.make_node("Squeeze", ["y", "one"], ["rows"]),
            helper.make_node("MatMul", ["rows", "K"], ["z"]),
            helper.make_node("Softmax", ["z"], ["out"], axis=-1),
        ]
        graph = helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["t", "b", 2])],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("out", "h")],
            [numpy_helper.from_array(each, name) for name, each in constants.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        found.append(model.SerializeToString())
    data = Path(__file__).parents[1] / "unit" / "models" / "files"
    found += [file.read_bytes() for file in sorted(data.glob("*.onnx"))]
    assert all(onnx.load_from_string(each).graph.node for each in found)
    return found


def keras_files() -> list[bytes]:
    return [_written(model_files.sound_keras, ".keras")]


def keras_structures() -> list[bytes]:
    return [model_files.structure().encode()]


def keras_weights() -> list[bytes]:
    return [model_files.weights_hdf5(lambda group: None)]


def hdf5_files() -> list[bytes]:
    return [_written(model_files.sound_hdf5, ".h5")]
