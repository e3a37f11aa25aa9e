"""Files that are not state dicts: each is recognised, and the message says what to run instead."""

from __future__ import annotations

import glob
import io
import json
import pickle
import re
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from conveyor_models import BundleError, BundleFileError, ImportFileError, UnsupportedModuleError
from conveyor_models.importers import ImportOptions, import_model


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 5)
        self.fc = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.lstm(x)[0])


NET = Net()


class Settings:
    """What a training program may put into its checkpoints."""


# --- Files that are recognised -------------------------------------------------------------------


def torchscript(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is deprecated
        torch.jit.save(torch.jit.script(NET), path)


def traced(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(NET, torch.randn(4, 1, 3)), path)


def exported(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the flat weights of nn.LSTM
        torch.export.save(torch.export.export(NET, (torch.randn(4, 1, 3),)), path)


def legacy(path: Path) -> None:
    torch.save(NET.state_dict(), path, _use_new_zipfile_serialization=False)


def tar(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"), io.BytesIO())


def with_settings(path: Path) -> None:
    torch.save({"state_dict": NET.state_dict(), "hyper_parameters": Settings()}, path)


def onnx_file(path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
    )
    path.write_bytes(helper.make_model(graph, producer_name="p").SerializeToString())


def numpy_archive(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, w=np.ones(3))


def zipped(*names: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            for name in names:
                archive.writestr(name, b"x")

    return write


def repacked(path: Path) -> None:
    data = io.BytesIO()
    torch.save(NET.state_dict(), data)
    with (
        zipfile.ZipFile(data) as old,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))


def several_disks(path: Path) -> None:
    data = io.BytesIO()
    torch.save(NET.state_dict(), data)
    whole = bytearray(data.getvalue())
    at = whole.rindex(b"PK\x05\x06")
    struct.pack_into("<HH", whole, at + 4, 1, 1)
    locator = whole.rfind(b"PK\x06\x07")
    if locator >= 0:
        struct.pack_into("<I", whole, locator + 16, 2)
    path.write_bytes(whole)


def index(path: Path) -> None:
    path.write_text(json.dumps({"metadata": {}, "weight_map": {"w": "model-1.safetensors"}}))


def saved(value: object) -> Callable[[Path], None]:
    return lambda path: torch.save(value, path)


def written(data: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(data) and None


STATE = NET.state_dict()
LOAD = "torch.load('{}', weights_only=False)"
FOREIGN: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "torchscript": (
        "m.pt",
        torchscript,
        "is TorchScript, .*`torch.save(torch.jit.load('m.pt').state_dict(), 'weights.pt')`",
    ),
    "traced torchscript": ("m.pth", traced, "is TorchScript, .*torch.jit.load('m.pth')"),
    "torchscript by another name": ("m.jit", torchscript, "is TorchScript, "),
    "mobile torchscript": (
        "m.ptl",
        zipped("m/data.pkl", "m/code/__torch__.py", "m/bytecode.pkl"),
        "is TorchScript for mobile devices",
    ),
    "an exported program": (
        "m.pt2",
        exported,
        "torch.export (.pt2); .*dict(torch.export.load('m.pt2').state_dict)",
    ),
    "an exported program of older versions": (
        "m.pt",
        zipped("serialized_exported_program.json", "serialized_state_dict.pt"),
        "is a program of torch.export",
    ),
    "a package": ("m.pt", zipped("m/.data/extern_modules"), "is a package of torch.package"),
    "an archive of torchserve": ("m.mar", zipped("MAR-INF/MANIFEST.json"), "of TorchServe"),
    "a whole module": (
        "m.pt",
        saved(NET),
        "holds an object of tests.unit.models.test_import_foreign.Net: .*never run.*`torch.save("
        + LOAD.format("m.pt")
        + ".state_dict(), 'weights.pt')`",
    ),
    "a whole module of torch": (
        "m.pt",
        saved(nn.LSTM(3, 4)),
        "holds an object of torch.nn.modules.rnn.LSTM: .*never run",
    ),
    "a checkpoint with classes": (
        "m.ckpt",
        with_settings,
        "holds an object of .*Settings: .*"
        + LOAD.format("m.ckpt")
        + "['state_dict'], 'weights.pt')",
    ),
    "a checkpoint with numbers of numpy": (
        "m.pt",
        saved({"state_dict": STATE, "loss": np.float64(0.25)}),
        "holds an object of numpy.",
    ),
    "an optimizer itself": (
        "m.pt",
        saved(torch.optim.SGD(NET.parameters(), 0.1)),
        "holds an object of torch.optim.sgd.SGD",
    ),
    "a checkpoint of two networks": (
        "m.pt",
        saved({"actor": STATE, "critic": STATE}),
        "several state dicts (actor, critic): .*torch.load('m.pt')['actor']",
    ),
    "an optimizer": (
        "m.pt",
        saved(torch.optim.Adam(NET.parameters()).state_dict()),
        "state: is dict, not a tensor; save module.state_dict()",
    ),
    "a list of tensors": (
        "m.pt",
        saved(list(STATE.values())),
        "holds list, expected a state dict: `torch.save(module.state_dict(), 'weights.pt')`",
    ),
    "one tensor": ("m.pt", saved(torch.ones(3)), "holds Tensor, expected a state dict"),
    "numbered tensors": ("m.pt", saved({0: torch.ones(3)}), "has the key '0'"),
    "torch.save before the zip": (
        "m.pt",
        legacy,
        "before PyTorch 1.6; .*`torch.save(torch.load('m.pt'), 'weights.pt')`",
    ),
    "a tar": ("m.pt.tar", tar, "is a tar archive.*torch.load('m.pt.tar')"),
    "a plain pickle": ("m.pkl", written(pickle.dumps({"a": 1})), "is a plain pickle"),
    "an old pickle": ("m.pt", written(pickle.dumps({"a": 1}, 0)), "is a plain pickle"),
    "a compressed zip": ("m.pt", repacked, "is compressed, and torch.save compresses nothing"),
    "a zip over several disks": ("m.pt", several_disks, "is not a sound zip"),
    "some other zip": ("m.pt", zipped("readme.txt"), "torch.save has not written .*readme.txt"),
    "keras": ("m.pt", zipped("config.json", "model.weights.h5"), "file of Keras: name it .keras"),
    "numpy": ("m.npz", numpy_archive, "archive of numpy; .*numpy.load('m.npz')"),
    "an array": ("m.npy", written(b"\x93NUMPY\x01\x00"), "array of numpy"),
    "hdf5": ("m.pt", written(b"\x89HDF\r\n\x1a\n" + bytes(90)), "HDF5 file, .*name it .h5"),
    "onnx": ("m.pt", onnx_file, "looks like ONNX: name it .onnx"),
    "safetensors": (
        "m.bin",
        lambda path: safetensors.torch.save_file(STATE, path),
        "holds safetensors: name it .safetensors",
    ),
    "torch.save as safetensors": (
        "m.safetensors",
        saved(STATE),
        "is of torch.save: name it .pt",
    ),
    "torch.save by no name": ("model", saved(STATE), "is of torch.save: name it .pt"),
    "an index": (
        "model.safetensors.index.json",
        index,
        "names the files .*glob.glob('model-*.safetensors')",
    ),
    "json": ("config.json", written(b'{"hidden_size": 4}'), "is JSON, which holds no tensors"),
    "a pointer of git lfs": (
        "m.safetensors",
        written(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        "a pointer of Git LFS, .*git lfs pull",
    ),
    "a page": ("m.pt", written(b"<!DOCTYPE html><html>"), "a page of HTML"),
    "gzip": ("m.pt.gz", written(b"\x1f\x8b\x08" + bytes(20)), "compressed with gzip"),
    "tensorflow lite": ("m.tflite", written(b"\x1c\0\0\0TFL3"), "TensorFlow Lite"),
    "nothing": ("m.pt", written(b""), "is empty"),
}


@pytest.mark.parametrize(("name", "write", "said"), FOREIGN.values(), ids=FOREIGN.keys())
def test_a_file_of_another_kind_is_recognised(
    name: str, write: Callable[[Path], None], said: str, tmp_path: Path
) -> None:
    file = tmp_path / name
    write(file)
    with pytest.raises(BundleError) as caught:
        import_model(file)
    assert isinstance(caught.value, ImportFileError | UnsupportedModuleError)
    for part in said.split(".*"):
        assert part in str(caught.value)


def command_in(message: str) -> str:
    """The line of Python that a message advises."""
    found = re.search(r"`(torch\.save\(.*?)`", message)
    assert found is not None, message
    return found[1]


@pytest.mark.parametrize(
    "kind",
    ["torchscript", "traced torchscript", "an exported program", "torch.save before the zip"],
)
def test_the_line_that_a_message_advises_makes_a_file_that_is_imported(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, write, _ = FOREIGN[kind]
    write(tmp_path / name)
    with pytest.raises(ImportFileError) as caught:
        import_model(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch.jit is deprecated
        exec(command_in(str(caught.value)), {"torch": torch})
    model = import_model(tmp_path / "weights.pt")
    assert model.head is not None
    assert torch.equal(model.head, STATE["fc.weight"])


def test_the_shards_of_an_index_are_joined_by_the_line_advised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = list(STATE)
    for number, part in enumerate((names[:3], names[3:]), 1):
        shard = {name: STATE[name] for name in part}
        safetensors.torch.save_file(shard, tmp_path / f"model-{number}-of-2.safetensors")
    index(tmp_path / "model.safetensors.index.json")
    with pytest.raises(BundleFileError, match="a folder of a model in several files") as caught:
        import_model(tmp_path)
    monkeypatch.chdir(tmp_path)
    exec(command_in(str(caught.value)), {"torch": torch, "safetensors": safetensors, "glob": glob})
    assert import_model(tmp_path / "weights.pt").head is not None


@pytest.mark.parametrize(
    ("inside", "said"),
    [
        (("saved_model.pb",), "is a SavedModel of TensorFlow"),
        (("data.pkl", "data"), "is an unpacked file of torch.save"),
        (("weights.pt", "readme"), "is a folder, expected a file; it holds weights.pt"),
        ((), "is a folder, expected a file"),
    ],
)
def test_a_folder_is_told_what_is_in_it(inside: tuple[str, ...], said: str, tmp_path: Path) -> None:
    for name in inside:
        (tmp_path / name).touch()
    with pytest.raises(BundleFileError, match=said):
        import_model(tmp_path)


# --- Checkpoints ---------------------------------------------------------------------------------

CHECKPOINTS: dict[str, dict[str, Any]] = {
    "state_dict": {"state_dict": STATE, "epoch": 3, "best": torch.tensor(0.5)},
    "model_state_dict": {
        "model_state_dict": STATE,
        "optimizer_state_dict": torch.optim.Adam(NET.parameters()).state_dict(),
    },
    "lightning": {
        "epoch": 1,
        "global_step": 20,
        "pytorch-lightning_version": "2.5",
        "state_dict": {f"model.{name}": tensor for name, tensor in STATE.items()},
        "callbacks": {},
        "lr_schedulers": [],
    },
}


@pytest.mark.parametrize("given", CHECKPOINTS.values(), ids=CHECKPOINTS.keys())
@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".bin"])
def test_the_one_state_dict_of_a_checkpoint_is_imported(
    given: dict[str, Any], suffix: str, tmp_path: Path
) -> None:
    torch.save(given, tmp_path / f"last{suffix}")
    model = import_model(tmp_path / f"last{suffix}")
    assert torch.equal(model.weights["head.weight"], STATE["fc.weight"])
    assert model.notes[0].startswith("a checkpoint: its one state dict")
    assert "; left out: " in model.notes[0]


def test_the_name_that_a_tied_weight_lost_is_restored(tmp_path: Path) -> None:
    module = nn.ModuleDict({"a": nn.Embedding(7, 4), "b": nn.LSTM(4, 4), "c": nn.Linear(4, 7)})
    module["c"].weight = module["a"].weight
    safetensors.torch.save_model(module, str(tmp_path / "m.safetensors"))
    assert len(safetensors.torch.load_file(tmp_path / "m.safetensors")) == 6
    options = ImportOptions(order=("a", "b", "c"), embedding="a")
    model = import_model(tmp_path / "m.safetensors", options)
    assert model.embedding is not None
    assert model.head is not None
    assert torch.equal(model.embedding, model.head)
    assert any("is tied to" in note for note in model.notes)


def test_a_damaged_pickle_has_no_class_to_name(tmp_path: Path) -> None:
    for pickled in (b"\x80\x02", b"\x80\x02c\xff\n\n", b"\x80\x04\x95" + b"\xff" * 8, b"."):
        with zipfile.ZipFile(tmp_path / "m.pt", "w") as archive:
            archive.writestr("m/data.pkl", pickled)
            archive.writestr("m/version", b"3\n")
        with pytest.raises(ImportFileError):
            import_model(tmp_path / "m.pt")


def test_bytes_turned_over_in_a_file_never_bring_down_the_importer(tmp_path: Path) -> None:
    file = tmp_path / "m.pt"
    torch.save(STATE, file)
    whole = file.read_bytes()
    directory = whole.rindex(b"PK\x01\x02")
    generator = torch.Generator().manual_seed(4)
    for _ in range(150):
        data = bytearray(whole)
        at = int(torch.randint(directory - 400, len(data), (1,), generator=generator))
        data[at] ^= 1 << int(torch.randint(8, (1,), generator=generator))
        file.write_bytes(data)
        try:
            import_model(file)
        except BundleError:
            continue
