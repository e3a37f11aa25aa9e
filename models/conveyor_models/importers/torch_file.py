"""PyTorch: state dicts in files.

Safetensors hold numbers only. A .pt holds a pickle: it is read by torch's own unpickler for weights
(`weights_only`), which builds tensors and plain containers and calls nothing else, and only after
the zip around it was found to be of bounded size.
"""

from __future__ import annotations

import io
import json
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, cast

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from conveyor_models.errors import ImportFileError
from conveyor_models.importers.archive import checked_entries
from conveyor_models.importers.common import (
    FILE_BYTES_MAX,
    ImportedModel,
    checked_values,
    read_file,
    refused,
)
from conveyor_models.importers.options import ImportOptions
from conveyor_models.importers.torch_state import model_from_state
from conveyor_models.spec import WEIGHT_VALUES_MAX

HEADER_BYTES_MAX: Final = 4 * 1024 * 1024
PICKLE_BYTES_MAX: Final = 16 * 1024 * 1024
ENTRIES_MAX: Final = 65_536
TENSORS_MAX: Final = 8_192


def import_safetensors(path: Path, options: ImportOptions) -> ImportedModel:
    """A state dict in a safetensors file."""
    data = read_file(path)
    checked_values(path, _shapes(path, data))
    try:
        state = safetensors.torch.load(data)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise ImportFileError(f"not valid safetensors: {error}", path=path) from error
    return model_from_state(state, options)


def _shapes(path: Path, data: bytes) -> dict[str, list[int]]:
    """What the header announces, looked at before the library believes it."""
    if len(data) < 8:
        raise ImportFileError(f"{len(data)} bytes, too short for safetensors", path=path)
    (size,) = struct.unpack_from("<Q", data)
    if size > HEADER_BYTES_MAX:
        raise ImportFileError(
            f"header of {size} bytes, expected at most {HEADER_BYTES_MAX}", path=path
        )
    if size > len(data) - 8:
        raise ImportFileError(f"header of {size} bytes is cut off", path=path)
    try:
        parsed: object = json.loads(data[8 : 8 + size])
    except (ValueError, RecursionError) as error:
        raise ImportFileError(f"header is not valid JSON: {error}", path=path) from error
    header = cast("dict[str, Any]", parsed) if isinstance(parsed, dict) else {}
    header.pop("__metadata__", None)
    if not header or len(header) > TENSORS_MAX:
        raise ImportFileError(
            f"header announces {len(header)} tensors, expected 1 to {TENSORS_MAX}", path=path
        )
    shapes: dict[str, list[int]] = {}
    for name, entry in header.items():
        shape = cast("dict[str, Any]", entry).get("shape") if isinstance(entry, dict) else None
        if not isinstance(shape, list) or not all(
            isinstance(each, int) and each >= 0 for each in cast("list[object]", shape)
        ):
            raise ImportFileError(f"tensor {name}: no shape", path=path, key=name)
        shapes[name] = cast("list[int]", shape)
    return shapes


def import_pickle(path: Path, options: ImportOptions) -> ImportedModel:
    """A state dict in a file of `torch.save`."""
    data = read_file(path)
    if not data.startswith(b"PK\x03\x04") or not zipfile.is_zipfile(io.BytesIO(data)):
        raise ImportFileError(
            "is not the zip that torch.save writes; other pickles are never loaded", path=path
        )
    with checked_entries(path, data, ENTRIES_MAX, FILE_BYTES_MAX) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ImportFileError(f"{entry.filename} is compressed", path=path)
            if entry.filename.endswith(".pkl") and entry.file_size > PICKLE_BYTES_MAX:
                raise ImportFileError(
                    f"{entry.filename}: {entry.file_size} bytes,"
                    f" expected at most {PICKLE_BYTES_MAX}",
                    path=path,
                )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about its own storages
            found: object = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        # Whatever torch stumbles over, the file is at fault; most of it is UnpicklingError, whose
        # message advises to load without protection.
        said = str(error).partition("\n")[0]
        if "nsupported" in str(error) or "eights" in said:
            said = "it holds more than tensors, and code in a file is never run"
        raise ImportFileError(f"cannot be read as a state dict: {said[:200]}", path=path) from error
    return model_from_state(_state(path, found), options)


def _state(path: Path, found: object) -> dict[str, Tensor]:
    """The object in the file, if it is name -> tensor."""
    if not isinstance(found, Mapping):
        kind = type(found).__name__
        raise ImportFileError(f"holds {kind}, expected module.state_dict()", path=path)
    entries = cast("Mapping[object, object]", found)
    if len(entries) > TENSORS_MAX:
        raise ImportFileError(f"{len(entries)} entries, at most {TENSORS_MAX}", path=path)
    state: dict[str, Tensor] = {}
    for name, value in entries.items():
        if not isinstance(name, str):
            raise ImportFileError("has a key that is not a name", path=path)
        if not isinstance(value, Tensor):
            kind = type(value).__name__
            raise refused(name, f"is {kind}, not a tensor; save module.state_dict() alone")
        # A view may claim any size over a storage of a few bytes.
        if value.numel() > WEIGHT_VALUES_MAX:
            raise ImportFileError(f"{name}: {value.numel()} values", path=path, key=name)
        state[name] = value
    checked_values(path, {name: value.shape for name, value in state.items()})
    return state
