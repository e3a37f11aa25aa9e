"""Model files that mean harm. `outside` is a folder that none of them may reach."""

from __future__ import annotations

import io
import itertools
import json
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import h5py
import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from conveyor_models.spec import WEIGHT_VALUES_MAX

SECRET: Final = "secret.bin"
PIPE: Final = "pipe"
HARM: Final = "harm"
"""Made by code in a model file, if it ever runs."""
Write = Callable[[Path, Path], Path]


def make_outside(folder: Path) -> None:
    """A file of another's, a sound HDF5 file among them, and a pipe that nobody writes to."""
    folder.mkdir()
    (folder / SECRET).write_bytes(np.ones(4096, np.float32).tobytes())
    os.mkfifo(folder / PIPE)
    with h5py.File(folder / "secret.h5", "w") as file:
        file["x"] = np.ones((3, 20), np.float32)


class Harm:
    """Runs a command as it is unpickled."""

    def __init__(self, outside: Path) -> None:
        self.command = f"touch {outside / HARM}"

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


# --- PyTorch -------------------------------------------------------------------------------------


def _torch_zip(file: Path, pickled: bytes) -> Path:
    """What torch.save writes, around a pickle by hand."""
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + pickled + b".")
        archive.writestr("archive/version", "3\n")
    return file


def pickle_in_state(folder: Path, outside: Path) -> Path:
    torch.save({"weight_ih_l0": Harm(outside)}, folder / "model.pt")
    return folder / "model.pt"


def plain_pickle(folder: Path, outside: Path) -> Path:
    (folder / "model.pt").write_bytes(pickle.dumps(Harm(outside)))
    return folder / "model.pt"


def pickle_as_safetensors(folder: Path, outside: Path) -> Path:
    return pickle_in_state(folder, outside).rename(folder / "model.safetensors")


def second_pickle(folder: Path, outside: Path) -> Path:
    """torch finds names in any case."""
    file = folder / "model.pt"
    torch.save({}, file)
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("model/DATA.PKL", pickle.dumps(Harm(outside), 2))
    return file


def many_bytes(folder: Path, outside: Path) -> Path:
    """3 GiB of zeros, called for by a function that torch's unpickler takes."""
    size = b"\x8a\x05" + (3 * 2**30).to_bytes(5, "little")
    return _torch_zip(folder / "model.pt", b"cbuiltins\nbytearray\n" + size + b"\x85R")


def memory_of_others(folder: Path, outside: Path) -> Path:
    """A tensor of whatever lies in memory."""
    made = b"ctorch\nFloatTensor\nK\x40K\x40\x86R"
    return _torch_zip(folder / "model.pt", b"}X\x0c\x00\x00\x00weight_ih_l0" + made + b"s")


def many_copies(folder: Path, outside: Path) -> Path:
    """A list of 100,000, copied 2,000 times."""
    many = b"](" + b"N" * 100_000 + b"eq\x00"
    copy = b"ccollections\nCounter\nh\x00\x85R"
    return _torch_zip(folder / "model.pt", many + b"(" + copy * 2_000 + b"l")


def many_steps(folder: Path, outside: Path) -> Path:
    return _torch_zip(folder / "model.pt", b"N" * (8 * 2**20))


def several_disks(folder: Path, outside: Path) -> Path:
    file = folder / "model.pt"
    torch.save(nn.LSTM(2, 3).state_dict(), file)
    whole = file.read_bytes()
    end = whole.rindex(b"PK\x05\x06")
    locator = b"PK\x06\x07" + struct.pack("<LQL", 1, end, 7)
    file.write_bytes(whole[:end] + locator + whole[end:])
    return file


def compressed(folder: Path, outside: Path) -> Path:
    with zipfile.ZipFile(folder / "model.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model/data.pkl", bytes(64 * 2**20))
    return folder / "model.pt"


# --- Safetensors ---------------------------------------------------------------------------------


def _safetensors(file: Path, header: bytes, size: int | None = None, data: bytes = b"") -> Path:
    length = len(header) if size is None else size
    file.write_bytes(struct.pack("<Q", length) + header + data)
    return file


def long_header(folder: Path, outside: Path) -> Path:
    return _safetensors(folder / "model.safetensors", b"{}", 2**62)


def deep_header(folder: Path, outside: Path) -> Path:
    return _safetensors(folder / "model.safetensors", b'{"a":' * 500_000)


def shape_of_digits(folder: Path, outside: Path) -> Path:
    """Lengths whose product has four million digits."""
    shape = ",".join(["9" * 4000] * 1000)
    entry = f'{{"a":{{"dtype":"F32","shape":[{shape}],"data_offsets":[0,4]}}}}'
    return _safetensors(folder / "model.safetensors", entry.encode(), data=bytes(4))


def huge_tensor(folder: Path, outside: Path) -> Path:
    entry = {"dtype": "F32", "shape": [2**20, 2**20], "data_offsets": [0, 4]}
    header = json.dumps({"weight_hh_l0": entry}).encode()
    return _safetensors(folder / "model.safetensors", header, data=bytes(4))


# --- ONNX ----------------------------------------------------------------------------------------


def _onnx(file: Path, nodes: list[Any], end: str, constants: list[Any]) -> Path:
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["time", "batch", 3])],
        [helper.make_tensor_value_info(end, TensorProto.FLOAT, None)],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, file)
    return file


def doubled(folder: Path, outside: Path) -> Path:
    """A constant joined to itself, forty times over: 12 TiB."""
    ends = ["k", *(f"d{number}" for number in range(40))]
    nodes = [
        helper.make_node("Concat", [before, before], [after], axis=0)
        for before, after in itertools.pairwise(ends)
    ]
    constant = numpy_helper.from_array(np.ones(3, np.float32), "k")
    return _onnx(folder / "model.onnx", nodes, ends[-1], [constant])


def many_constants(folder: Path, outside: Path) -> Path:
    constants = [TensorProto(name=f"k{n}", data_type=1, dims=[0]) for n in range(100_000)]
    nodes = [helper.make_node("Add", ["k0", "k0"], ["y"])]
    return _onnx(folder / "model.onnx", nodes, "y", constants)


def long_slice(folder: Path, outside: Path) -> Path:
    """All of 2**40 steps but the first."""
    ranges = {"starts": [1], "ends": [2**40], "axes": [0]}
    constants = [numpy_helper.from_array(np.array(v, np.int64), k) for k, v in ranges.items()]
    nodes = [helper.make_node("Slice", ["x", *ranges], ["y"])]
    file = _onnx(folder / "model.onnx", nodes, "y", constants)
    model = onnx.load(file)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2**40
    onnx.save(model, file)
    return file


def _kept_in(folder: Path, location: str) -> Path:
    """Weights of an LSTM in another file."""
    shapes = {"W": (1, 20, 3), "R": (1, 20, 5)}
    tensors = {
        name: TensorProto(name=name, data_type=1, dims=shape, data_location=TensorProto.EXTERNAL)
        for name, shape in shapes.items()
    }
    for tensor in tensors.values():
        tensor.external_data.add(key="location", value=location)
        length = 4 * int(np.prod(tensor.dims))
        tensor.external_data.add(key="length", value=str(length))
    node = helper.make_node("LSTM", ["x", "W", "R"], ["y"], hidden_size=5)
    return _onnx(folder / "model.onnx", [node], "y", list(tensors.values()))


def beside_and_up(folder: Path, outside: Path) -> Path:
    return _kept_in(folder, f"../{outside.name}/{SECRET}")


def absolute(folder: Path, outside: Path) -> Path:
    return _kept_in(folder, str(outside / SECRET))


def through_a_link(folder: Path, outside: Path) -> Path:
    (folder / "weights.bin").symlink_to(outside / SECRET)
    return _kept_in(folder, "weights.bin")


def through_a_linked_folder(folder: Path, outside: Path) -> Path:
    (folder / "weights").symlink_to(outside)
    return _kept_in(folder, f"weights/{SECRET}")


def from_a_pipe(folder: Path, outside: Path) -> Path:
    os.mkfifo(folder / "weights.bin")
    return _kept_in(folder, "weights.bin")


def from_a_device(folder: Path, outside: Path) -> Path:
    (folder / "weights.bin").symlink_to("/dev/zero")
    return _kept_in(folder, "weights.bin")


# --- Keras ---------------------------------------------------------------------------------------


def structure(units: int = 5) -> str:
    float32 = {"module": "keras", "class_name": "DTypePolicy", "config": {"name": "float32"}}
    lstm = {
        "name": "lstm",
        "units": units,
        "activation": "tanh",
        "recurrent_activation": "sigmoid",
        "use_bias": True,
        "return_sequences": True,
        "return_state": False,
        "go_backwards": False,
        "stateful": False,
        "dtype": float32,
    }
    layers = [
        {
            "module": "keras.layers",
            "class_name": "InputLayer",
            "config": {"batch_shape": [None, None, 3], "dtype": "float32", "name": "x"},
        },
        {"module": "keras.layers", "class_name": "LSTM", "config": lstm},
    ]
    whole = {"name": "sequential", "layers": layers}
    return json.dumps({"module": "keras", "class_name": "Sequential", "config": whole})


def _keras(file: Path, weights: bytes, config: str | None = None) -> Path:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("metadata.json", '{"keras_version": "3.9.0"}')
        archive.writestr("config.json", structure() if config is None else config)
        archive.writestr("model.weights.h5", weights)
    return file


def zeros(folder: Path, outside: Path) -> Path:
    """2 MB that unpack to 2 GiB."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = packer.compress(bytes(2**26)) + packer.flush(zlib.Z_FULL_FLUSH)
    data = block * 32 + zlib.compressobj(9, zlib.DEFLATED, -15).flush()
    file = _keras(folder / "model.keras", data)
    whole = bytearray(file.read_bytes())
    # Says, here and in the directory at the end, that the bytes are deflated and how many they are.
    name = b"model.weights.h5"
    for at, method, sizes in ((whole.index(name) - 30, 8, 18), (whole.rindex(name) - 46, 10, 20)):
        struct.pack_into("<H", whole, at + method, zipfile.ZIP_DEFLATED)
        struct.pack_into("<II", whole, at + sizes, len(data), 2**31)
    file.write_bytes(whole)
    return file


def deep_structure(folder: Path, outside: Path) -> Path:
    return _keras(folder / "model.keras", b"", '{"a":' * 100_000)


def outside_names(folder: Path, outside: Path) -> Path:
    file = _keras(folder / "model.keras", b"")
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr(f"../{outside.name}/{HARM}", b"")
    return file


def weights_hdf5(write: Callable[[Any], None]) -> bytes:
    data = io.BytesIO()
    with h5py.File(data, "w") as file:
        group = file.create_group("layers/lstm/cell/vars")
        write(group)
        for place, shape in enumerate([(3, 20), (5, 20), (20,)]):
            if str(place) not in group:
                group[str(place)] = np.zeros(shape, np.float32)
    return data.getvalue()


def hdf5_link(folder: Path, outside: Path) -> Path:
    link = h5py.ExternalLink(str(outside / "secret.h5"), "/x")
    return _keras(folder / "model.keras", weights_hdf5(lambda group: group.__setitem__("0", link)))


def hdf5_link_to_a_pipe(folder: Path, outside: Path) -> Path:
    link = h5py.ExternalLink(str(outside / PIPE), "/x")
    return _keras(folder / "model.keras", weights_hdf5(lambda group: group.__setitem__("0", link)))


def hdf5_storage(folder: Path, outside: Path) -> Path:
    def write(group: Any) -> None:
        group.create_dataset("0", (3, 20), "f4", external=[(str(outside / SECRET), 0, 240)])

    return _keras(folder / "model.keras", weights_hdf5(write))


def hdf5_virtual(folder: Path, outside: Path) -> Path:
    def write(group: Any) -> None:
        layout = h5py.VirtualLayout((3, 20), "f4")
        layout[:] = h5py.VirtualSource(str(outside / "secret.h5"), "x", (3, 20))
        group.create_virtual_dataset("0", layout)

    return _keras(folder / "model.keras", weights_hdf5(write))


def hdf5_soft_link(folder: Path, outside: Path) -> Path:
    def write(group: Any) -> None:
        group["0"] = h5py.SoftLink("/layers/lstm/cell/vars/0")

    return _keras(folder / "model.keras", weights_hdf5(write))


def _whole_hdf5(folder: Path, change: Callable[[Any], None]) -> Path:
    """An .h5 of a whole model as Keras 2 writes it."""
    with h5py.File(folder / "model.h5", "w") as file:
        file.attrs["keras_version"] = "2.15.0"
        file.attrs["model_config"] = structure()
        change(file)
    return folder / "model.h5"


def sound_keras(file: Path) -> Path:
    """Nothing is wrong with it."""
    return _keras(file, weights_hdf5(lambda _: None))


def sound_hdf5(file: Path) -> Path:
    """Nothing is wrong with it either."""

    def change(whole: Any) -> None:
        group = whole.create_group("model_weights/lstm")
        shapes = {"kernel": (3, 20), "recurrent_kernel": (5, 20), "bias": (20,)}
        for name, shape in shapes.items():
            group[f"lstm/{name}:0"] = np.zeros(shape, np.float32)
        group.attrs["weight_names"] = [f"lstm/{name}:0".encode() for name in shapes]

    return _whole_hdf5(file.parent, change).rename(file)


def hdf5_all_elsewhere(folder: Path, outside: Path) -> Path:
    def change(file: Any) -> None:
        file["model_weights"] = h5py.ExternalLink(str(outside / "secret.h5"), "/")

    return _whole_hdf5(folder, change)


def hdf5_no_structure_elsewhere(folder: Path, outside: Path) -> Path:
    """What there is is looked at for advice; it must not be another file's."""
    with h5py.File(folder / "model.h5", "w") as file:
        for name in ("layers", "_layer_checkpoint_dependencies", "vars"):
            file[name] = h5py.ExternalLink(str(outside / PIPE), "/")
    return folder / "model.h5"


def hdf5_packed(folder: Path, outside: Path) -> Path:
    """Zeros that unpack to more than the file."""

    def write(group: Any) -> None:
        group.create_dataset("0", data=np.zeros((3, 20), np.float32), chunks=(3, 20), compression=9)

    return _keras(folder / "model.keras", weights_hdf5(write))


def hdf5_never_written(folder: Path, outside: Path) -> Path:
    """4 GiB of a fill value."""
    file = weights_hdf5(lambda group: group.create_dataset("0", (3, 2**28), "f4", fillvalue=1.0))
    return _keras(folder / "model.keras", file, structure(2**26))


IMPORTS: Final[dict[str, tuple[Write, str]]] = {
    "pickle in a state dict": (pickle_in_state, "never run"),
    "plain pickle": (plain_pickle, "never loaded"),
    "pickle called safetensors": (pickle_as_safetensors, "is of torch.save"),
    "second pickle": (second_pickle, "writes one data.pkl"),
    "pickle of 3 GiB": (many_bytes, "holds an object of builtins.bytearray"),
    "pickle of memory": (memory_of_others, "names torch.FloatTensor"),
    "pickle that copies": (many_copies, "more than 2000000 steps"),
    "pickle of many steps": (many_steps, "more than 2000000 steps"),
    "zip on several disks": (several_disks, "is not a sound zip"),
    "zip bomb of torch": (compressed, "is compressed"),
    "header of 2**62 bytes": (long_header, "expected at most 4194304"),
    "header of braces": (deep_header, "not valid JSON"),
    "shape of many digits": (shape_of_digits, "no shape"),
    "tensor of 4 TiB": (huge_tensor, f"at most {WEIGHT_VALUES_MAX}"),
    "constant doubled 40 times": (doubled, "expected at most 4 for each that the file holds"),
    "100,000 constants": (many_constants, "expected at most 32768"),
    "slice of 2**40 steps": (long_slice, "expected an output of rows"),
    "weights at ../": (beside_and_up, "outside the model's folder"),
    "weights at /": (absolute, "outside the model's folder"),
    "weights through a link": (through_a_link, "leaves"),
    "weights through a linked folder": (through_a_linked_folder, "leaves"),
    "weights from a pipe": (from_a_pipe, "not a regular file"),
    "weights from a device": (from_a_device, "leaves"),
    "2 GiB of zeros": (zeros, "unpacks to 2147"),
    "structure of braces": (deep_structure, "not valid JSON"),
    "names that point outside": (outside_names, "points outside"),
    "HDF5 link": (hdf5_link, "is a link"),
    "HDF5 link to a pipe": (hdf5_link_to_a_pipe, "is a link"),
    "HDF5 storage elsewhere": (hdf5_storage, "is not plain"),
    "HDF5 virtual dataset": (hdf5_virtual, "is not plain"),
    "HDF5 soft link to itself": (hdf5_soft_link, "is a link"),
    "HDF5 all elsewhere": (hdf5_all_elsewhere, "is a link"),
    "HDF5 without structure, elsewhere": (hdf5_no_structure_elsewhere, "model.h5"),
    "HDF5 packed": (hdf5_packed, "is not plain"),
    "HDF5 never written": (hdf5_never_written, "expected 1 to 65536"),
}
"""What is imported, and a part of the refusal."""


# --- Bundles -------------------------------------------------------------------------------------


def _toml(path: Path, name: str) -> None:
    path.write_text(
        f'schema = 1\nname = "{name}"\nversion = 1\ninput = {{ kind = "features", size = 3 }}\n'
        'layers = [{ cell = "lstm", size = 5 }]\n'
    )


def _bundle(folder: Path, weights: Callable[[Path], object]) -> None:
    folder.mkdir()
    _toml(folder / "model.toml", folder.name)
    weights(folder / "weights.safetensors")


BUNDLES: Final[dict[str, tuple[Callable[[Path, Path], object], str]]] = {
    "linked-weights": (
        lambda folder, outside: _bundle(folder, lambda f: f.symlink_to(outside / SECRET)),
        "leaves the bundle's folder",
    ),
    "linked-toml": (
        lambda folder, outside: (
            folder.mkdir(),
            (folder / "model.toml").symlink_to(outside / SECRET),
        ),
        "leaves the bundle's folder",
    ),
    "pipe-weights": (lambda folder, _: _bundle(folder, os.mkfifo), "not a regular file"),
    "pipe-toml": (
        lambda folder, _: (folder.mkdir(), os.mkfifo(folder / "model.toml")),
        "not a regular file",
    ),
    "linked-pipe": (
        lambda folder, outside: _bundle(folder, lambda f: f.symlink_to(outside / PIPE)),
        "leaves the bundle's folder",
    ),
    "device": (
        lambda folder, _: _bundle(folder, lambda f: f.symlink_to("/dev/zero")),
        "leaves the bundle's folder",
    ),
    "folder-weights": (lambda folder, _: _bundle(folder, Path.mkdir), "is a directory"),
    "linked-folder": (
        lambda folder, outside: folder.symlink_to(outside),
        "leaves the repository",
    ),
    "linked-version": (
        lambda folder, outside: (folder.mkdir(), (folder / "1").symlink_to(outside)),
        "leaves the repository",
    ),
    "folder-loop": (
        lambda folder, _: (folder.mkdir(), (folder / "1").symlink_to(folder)),
        "missing",
    ),
    "link-loop": (
        lambda folder, _: _bundle(folder, lambda f: f.symlink_to(f)),
        "missing",
    ),
    "pickle-weights": (
        lambda folder, outside: _bundle(
            folder, lambda f: f.write_bytes(pickle.dumps(Harm(outside)))
        ),
        "not a safetensors file",
    ),
    "long-header": (
        lambda folder, _: _bundle(folder, lambda f: _safetensors(f, b"{}", 2**62)),
        "header would have 4,611,686,018,427,387,904 bytes",
    ),
    "deep-toml": (
        lambda folder, _: (
            folder.mkdir(),
            (folder / "model.toml").write_text("a = " + "[" * 100_000),
        ),
        "model.toml",
    ),
    "large-toml": (
        lambda folder, _: (folder.mkdir(), (folder / "model.toml").write_bytes(bytes(2**23))),
        "expected at most 4194304",
    ),
}
"""What lies in the repository by that name, and a part of the problem."""
