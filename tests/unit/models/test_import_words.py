"""What an importer says of a file names no type of a library, and passes on no library's text."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from safetensors.torch import save_file
from torch import nn

from conveyor_models import BundleError
from conveyor_models.importers import import_model
from conveyor_models.importers.common import kind_of
from tests.unit.models.onnx_files import cell_model, graph_model, weights

WORDS = {
    torch.float16: "16-bit floats",
    torch.bfloat16: "16-bit floats",
    torch.float32: "32-bit floats",
    torch.float64: "64-bit floats",
    torch.float8_e4m3fn: "8-bit floats",
    torch.int64: "64-bit integers",
    torch.uint8: "8-bit unsigned integers",
    torch.qint8: "quantised 8-bit integers",
    torch.bool: "booleans",
    torch.complex64: "64-bit complex numbers",
    np.dtype("<f8"): "64-bit floats",
    np.dtype(">i2"): "16-bit integers",
    np.dtype("bool"): "booleans",
    np.dtype("O"): "values that are not numbers",
    np.dtype("<U3"): "values that are not numbers",
    np.dtype([("a", "f4")]): "values that are not numbers",
}
OF_A_LIBRARY = re.compile(
    r"torch\.\w*\d|dtype|\b(u?int|float|complex)\d|\[Errno|numpy|Traceback|protobuf|h5py|\bindex\b"
    r"|Unpickl|Magic|offset"
)


@pytest.mark.parametrize("kind", WORDS, ids=str)
def test_types_have_words(kind: Any) -> None:
    assert kind_of(kind) == WORDS[kind]


def state_dict(**changes: torch.Tensor) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / "m.pt"
        torch.save(nn.LSTM(3, 4).state_dict() | changes, path)
        return path

    return write


def graph(make: Callable[[], onnx.ModelProto]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / "m.onnx"
        path.write_bytes(make().SerializeToString())
        return path

    return write


def content(name: str, data: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return write


def with_nodes(*nodes: Any, kind: int = TensorProto.FLOAT, **constants: Any) -> onnx.ModelProto:
    own = weights("GRU", 3, 4)
    cell = helper.make_node("GRU", ["z", *own], ["y"], name="cell", hidden_size=3)
    return graph_model([*nodes, cell], [("x", kind, ["t", "b", 4])], ["y"], own | constants)


def broken_tensor() -> onnx.ModelProto:
    model = cell_model("GRU", weights("GRU", 3, 4))
    model.graph.initializer[0].raw_data = b"abc"
    return model


def cut_safetensors(folder: Path) -> Path:
    path = folder / "m.safetensors"
    save_file(nn.LSTM(3, 4).state_dict(), path)
    path.write_bytes(path.read_bytes()[:-8])
    return path


def damaged_pickle(folder: Path) -> Path:
    path, source = folder / "m.pt", state_dict()(folder)
    with zipfile.ZipFile(source) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data[:40] if name.endswith("data.pkl") else data)
    return path


def hdf5_of_nothing(folder: Path) -> Path:
    path = folder / "m.h5"
    with h5py.File(path, "w") as file:
        file["a"] = np.zeros(3)
    path.write_bytes(path.read_bytes()[:300])
    return path


HIDDEN, PRECISE = torch.zeros(16, 4), torch.full((16, 4), 1 + 2**-40, dtype=torch.float64)
FILES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a state dict of integers": (
        state_dict(weight_hh_l0=HIDDEN.long()),
        "weight_hh_l0: holds 64-bit integers, expected floats",
    ),
    "a state dict of complex numbers": (
        state_dict(weight_hh_l0=HIDDEN.cfloat()),
        "weight_hh_l0: holds 64-bit complex numbers",
    ),
    "a state dict of sparse tensors": (
        state_dict(weight_hh_l0=HIDDEN.to_sparse()),
        "weight_hh_l0: holds a sparse tensor",
    ),
    "a state dict that float32 does not hold": (
        state_dict(weight_hh_l0=PRECISE),
        "weight_hh_l0: holds 64-bit floats, some of which 32 bits cannot hold",
    ),
    "a damaged pickle": (damaged_pickle, "cannot be read as a state dict: it is damaged"),
    "a damaged zip": (content("m.pt", b"PK\x03\x04" + bytes(40)), "is not a sound zip"),
    "cut safetensors": (cut_safetensors, "is not valid safetensors"),
    "HDF5 that is cut off": (hdf5_of_nothing, "cannot be read: not HDF5 as Keras"),
    "no ONNX": (content("m.onnx", b"\xff" * 40), "is not an ONNX file, or damaged"),
    "an input of doubles": (
        graph(lambda: with_nodes(helper.make_node("Neg", ["x"], ["z"]), kind=TensorProto.DOUBLE)),
        "x: takes 64-bit floats, expected 32-bit floats",
    ),
    "a cast to doubles": (
        graph(
            lambda: with_nodes(
                helper.make_node("Cast", ["x"], ["z"], "wide", to=TensorProto.DOUBLE)
            )
        ),
        "wide: Cast: what flows, to 64-bit floats; expected 32-bit floats",
    ),
    "a constant of booleans": (
        graph(
            lambda: with_nodes(
                helper.make_node("Add", ["flags", "flags"], ["two"], "sum"),
                helper.make_node("Mul", ["x", "two"], ["z"], "times"),
                flags=np.ones(4, np.bool_),
            )
        ),
        "sum: Add: of booleans and booleans",
    ),
    "weights of integers": (
        graph(lambda: cell_model("GRU", weights("GRU", 3, 4) | {"B": np.zeros((1, 18), np.int64)})),
        r"cell: B: 64-bit integers of shape \[1, 18\], which does not fit",
    ),
    "a state of doubles": (
        graph(
            lambda: cell_model(
                "GRU", weights("GRU", 3, 4) | {"initial_h": np.ones((1, 1, 3), np.int32)}
            )
        ),
        r"cell: initial_h: 32-bit integers of shape \[1, 1, 3\], which does not fit",
    ),
    "data that do not fit their shape": (
        graph(broken_tensor),
        "W: its data do not fit its shape and type",
    ),
    "shapes that contradict each other": (
        graph(
            lambda: with_nodes(
                helper.make_node("Add", ["p", "q"], ["k"], "sum"),
                helper.make_node("Mul", ["x", "k"], ["z"], "times"),
                p=np.ones(3, "f4"),
                q=np.ones(4, "f4"),
            )
        ),
        "its graph contradicts itself",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_messages_are_in_words_for_people(case: str, tmp_path: Path) -> None:
    write, said = FILES[case]
    with pytest.raises(BundleError, match=said) as raised:
        import_model(write(tmp_path))
    message = str(raised.value).replace(str(tmp_path), "")
    assert not OF_A_LIBRARY.search(message), message
