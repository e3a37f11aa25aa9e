"""Files that are not what an importer reads: what they are, and what to do instead.

Nothing here runs, loads or unpacks a file's content: beginnings of files, names in zips and the
names of classes in pickles are all that is looked at.
"""

from __future__ import annotations

import itertools
import pickletools
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from conveyor_models.importers.archive import checked_entries
from conveyor_models.importers.common import FILE_BYTES_MAX, listed

ENTRIES_MAX: Final = 65_536
OPCODES_MAX: Final = 200_000
FOLDER_ENTRIES_MAX: Final = 1_000
_LEGACY_TORCH: Final = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""The number with which torch.save began its files before the zip."""
_AGAIN: Final = "`torch.save(torch.load(FILE), 'weights.pt')`"
_HARMLESS: Final = ("torch", "collections")
"""Packages whose classes a state dict may name, without those below."""
_HARMFUL: Final = ("torch.nn.modules", "torch.optim", "torch.fx", "torch.ao", "torch.distributed")
_BEGINNINGS: Final = (
    (0, b"\x89HDF\r\n\x1a\n", "is an HDF5 file, as Keras writes: name it .h5"),
    (0, b"\x93NUMPY", "is an array of numpy: save module.state_dict() with torch.save instead"),
    (0, b"version https://git-lfs", "is a pointer of Git LFS, not the file: run `git lfs pull`"),
    (0, b"GGUF", "is a GGUF file: save module.state_dict() of the PyTorch model instead"),
    (0, b"\x1f\x8b", "is compressed with gzip: unpack it first"),
    (0, b"BZh", "is compressed with bzip2: unpack it first"),
    (0, b"\xfd7zXZ", "is compressed with xz: unpack it first"),
    (0, b"7z\xbc\xaf", "is a 7z archive: unpack it first"),
    (0, b"\x28\xb5\x2f\xfd", "is compressed with zstd: unpack it first"),
    (0, b"<", "is a page of HTML or XML, not a model: download the file itself"),
    (4, b"TFL3", "is a model of TensorFlow Lite: call model.save('model.keras') in Keras instead"),
    (2, _LEGACY_TORCH, f"is of torch.save before PyTorch 1.6; write it again: {_AGAIN}"),
    (
        257,
        b"ustar",
        "is a tar archive. One of torch.save before PyTorch 0.1.10 is written again with"
        f" {_AGAIN}; unpack any other",
    ),
)
"""Offset, bytes that stand there, what the file is."""


def folder_advice(path: Path) -> str:
    """What a folder seems to be, and what to import instead of it."""
    try:
        names = sorted(each.name for each in itertools.islice(path.iterdir(), FOLDER_ENTRIES_MAX))
    except OSError:
        names = []
    if "saved_model.pb" in names or "keras_metadata.pb" in names:
        return "is a SavedModel of TensorFlow; call model.save('model.keras') in Keras instead"
    index = next((name for name in names if name.endswith(".index.json")), None)
    if index is not None:
        return f"is a folder of a model in several files; {index_advice(path / index)}"
    if "data.pkl" in names:
        return "is an unpacked file of torch.save; import the file itself"
    found = [name for name in names if name.endswith((".safetensors", ".pt", ".pth", ".onnx"))]
    there = f"; it holds {listed(found)}" if found else ""
    return f"is a folder, expected a file{there}"


def index_advice(path: Path) -> str:
    """What to do with the index of a model in several files."""
    kind = "pytorch" if "pytorch" in path.name else "safetensors"
    if kind == "safetensors":
        load = "safetensors.torch.load_file(f)"
        pattern = path.name.replace(".safetensors.index.json", "-*.safetensors")
    else:
        load = "torch.load(f)"
        pattern = path.name.replace(".bin.index.json", "-*.bin")
    return (
        f"{path.name} names the files that hold the tensors and holds none; make one of them:"
        f" `torch.save({{k: v for f in glob.glob({pattern!r}) for k, v in {load}.items()}},"
        " 'weights.pt')`"
    )


def beginning_advice(path: Path, data: bytes) -> str | None:
    """What a file that is no zip is, by its first bytes; None if that is not known."""
    if not data:
        return "is empty"
    for offset, beginning, what in _BEGINNINGS:
        if data.startswith(beginning, offset):
            return what.replace("FILE", repr(path.name))
    if data[8:10] == b'{"' and int.from_bytes(data[:8], "little") < len(data):
        return "holds safetensors: name it .safetensors"
    if data.lstrip(b" \r\n\t")[:1] in (b"{", b"["):
        if b'"weight_map"' in data or path.name.endswith(".index.json"):
            return index_advice(path)
        return "is JSON, which holds no tensors; import the file that holds the weights"
    if data[:1] == b"\x08" and data[2:3] in (b"\x12", b"\x3a", b"\x42"):
        return "looks like ONNX: name it .onnx"
    if data[:1] in (b"\x80", b"(", b"c", b"}", b"]"):
        return (
            "is a plain pickle, not the zip that torch.save writes; other pickles are never loaded."
            " If it is yours: `torch.save(module.state_dict(), 'weights.pt')`"
        )
    return None


def foreign_advice(path: Path, data: bytes) -> str | None:
    """What a file is whose name is of no format that is read; None if that is not known."""
    if not data.startswith(b"PK\x03\x04"):
        return beginning_advice(path, data)
    with checked_entries(path, data, ENTRIES_MAX, FILE_BYTES_MAX) as archive:
        return zip_advice(path, archive.namelist()) or "is of torch.save: name it .pt"


def zip_advice(path: Path, names: Iterable[str]) -> str | None:
    """What a zip is that is not of torch.save, by the names of its entries; None for torch.save."""
    name = path.name
    inner = [each.partition("/")[2] for each in names]
    whole = set(names)
    if any(each == "archive_format" or each.startswith("models/") for each in inner) or any(
        each.startswith("serialized_exported_program") for each in whole
    ):
        return (
            "is a program of torch.export (.pt2); the weights alone can be imported:"
            f" `torch.save(dict(torch.export.load({name!r}).state_dict), 'weights.pt')`"
        )
    if any(each.startswith("code/") for each in inner) or "constants.pkl" in inner:
        kind = "TorchScript for mobile devices" if "bytecode.pkl" in inner else "TorchScript"
        return (
            f"is {kind}, which is code; the weights alone can be imported:"
            f" `torch.save(torch.jit.load({name!r}).state_dict(), 'weights.pt')`"
        )
    if any(each.startswith(".data/extern_modules") for each in inner):
        return (
            "is a package of torch.package, which is code; load the model from it and run"
            " `torch.save(model.state_dict(), 'weights.pt')`"
        )
    if "MAR-INF/MANIFEST.json" in whole:
        return "is an archive of TorchServe; unpack it and import the state dict in it"
    if "model.weights.h5" in whole or "config.json" in whole:
        return "is a file of Keras: name it .keras"
    if any(each.endswith(".npy") for each in whole):
        return (
            "is an archive of numpy; write a state dict instead:"
            f" `torch.save({{k: torch.from_numpy(v) for k, v in numpy.load({name!r}).items()}},"
            " 'weights.pt')`"
        )
    if not any(each == "data.pkl" for each in inner):
        return f"is a zip that torch.save has not written (it holds {listed(sorted(whole))})"
    return None


def class_in_pickle(pickled: bytes) -> str | None:
    """The first class or function that a pickle names and no state dict has; nothing is run."""
    recent: list[str] = []
    try:
        for opcode, argument, _ in itertools.islice(pickletools.genops(pickled), OPCODES_MAX):
            found: str | None = None
            if opcode.name == "GLOBAL":
                found = str(argument).replace(" ", ".", 1)
            elif opcode.name == "STACK_GLOBAL" and len(recent) == 2:
                found = ".".join(recent)
            elif isinstance(argument, str):
                recent = [*recent[-1:], argument]
            if found is not None and not _is_plain(found):
                return found[:200]
    except (ValueError, KeyError, IndexError, OverflowError, UnicodeError):
        return None  # it is damaged
    return None


def _is_plain(name: str) -> bool:
    """Whether a state dict may hold it."""
    return name.partition(".")[0] in _HARMLESS and not name.startswith(_HARMFUL)


def pickle_advice(path: Path, pickled: bytes) -> str:
    """What a pickle of torch.save holds beside tensors, and what to save instead."""
    found = class_in_pickle(pickled)
    load = f"torch.load({path.name!r}, weights_only=False)"
    if found is None:
        return (
            "holds more than tensors, and code in a file is never run; where you trust it:"
            f" `torch.save({load}.state_dict(), 'weights.pt')`"
        )
    return (
        f"holds an object of {found}: a whole module or a checkpoint with more than tensors, and"
        " code in a file is never run. In the program that it is from: for a module"
        f" `torch.save({load}.state_dict(), 'weights.pt')`, for a checkpoint"
        f" `torch.save({load}['state_dict'], 'weights.pt')`"
    )
