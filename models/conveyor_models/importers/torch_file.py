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
from conveyor_models.importers.archive import checked_entries, unpacked
from conveyor_models.importers.common import (
    FILE_BYTES_MAX,
    ImportedModel,
    checked_values,
    listed,
    read_file,
    refused,
)
from conveyor_models.importers.foreign import (
    ENTRIES_MAX,
    beginning_advice,
    pickle_advice,
    zip_advice,
)
from conveyor_models.importers.options import ImportOptions
from conveyor_models.importers.pickles import check_pickle
from conveyor_models.importers.torch_state import model_from_state
from conveyor_models.spec import WEIGHT_VALUES_MAX

HEADER_BYTES_MAX: Final = 4 * 1024 * 1024
PICKLE_BYTES_MAX: Final = 16 * 1024 * 1024
TENSORS_MAX: Final = 8_192
DIMENSIONS_MAX: Final = 64
"""Of a tensor; torch takes no more."""


def import_safetensors(path: Path, options: ImportOptions) -> ImportedModel:
    """A state dict in a safetensors file."""
    data = read_file(path)
    if data[8:9] != b"{":
        advice = "is of torch.save: name it .pt" if _is_zip(data) else beginning_advice(path, data)
        if advice is not None:
            raise ImportFileError(advice, path=path)
    header = _header(path, data)
    ties = header.pop("__metadata__", None)
    checked_values(path, _shapes(path, header))
    try:
        state = safetensors.torch.load(data)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise ImportFileError(
            "is not valid safetensors: tensors and header do not fit; is the download complete?",
            path=path,
        ) from error
    # safetensors.torch.save_model leaves out the second name of a tied weight, and says so there.
    tied = {
        name: kept
        for name, kept in (cast("dict[str, Any]", ties) if isinstance(ties, dict) else {}).items()
        if name not in state and isinstance(kept, str) and kept in state
    }
    model = model_from_state(state | {name: state[kept] for name, kept in tied.items()}, options)
    model.notes += [f"{name} is tied to {kept}, as the file says" for name, kept in tied.items()]
    return model


def _is_zip(data: bytes) -> bool:
    return data.startswith(b"PK\x03\x04")


def _header(path: Path, data: bytes) -> dict[str, Any]:
    """The header, of bounded size, before the library believes it."""
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
    return cast("dict[str, Any]", parsed) if isinstance(parsed, dict) else {}


def _shapes(path: Path, header: dict[str, Any]) -> dict[str, list[int]]:
    """What the header announces."""
    if not header or len(header) > TENSORS_MAX:
        raise ImportFileError(
            f"header announces {len(header)} tensors, expected 1 to {TENSORS_MAX}", path=path
        )
    shapes: dict[str, list[int]] = {}
    for name, entry in header.items():
        shape = cast("dict[str, Any]", entry).get("shape") if isinstance(entry, dict) else None
        if not isinstance(shape, list) or len(cast("list[object]", shape)) > DIMENSIONS_MAX:
            raise ImportFileError(f"tensor {name[:80]}: no shape", path=path, key=name)
        if not all(
            isinstance(each, int) and 0 <= each <= WEIGHT_VALUES_MAX
            for each in cast("list[object]", shape)
        ):
            raise ImportFileError(
                f"tensor {name[:80]}: a shape with a length beyond 0 to {WEIGHT_VALUES_MAX}",
                path=path,
                key=name,
            )
        shapes[name] = cast("list[int]", shape)
    return shapes


def import_pickle(path: Path, options: ImportOptions) -> ImportedModel:
    """A state dict in a file of `torch.save`."""
    data = read_file(path)
    if not _is_zip(data):
        advice = beginning_advice(path, data)
        raise ImportFileError(
            advice or "is not the zip that torch.save writes; other pickles are never loaded",
            path=path,
        )
    with checked_entries(path, data, ENTRIES_MAX, FILE_BYTES_MAX) as archive:
        advice = zip_advice(path, archive.namelist())
        if advice is not None:
            raise ImportFileError(advice, path=path)
        pickled = _check_entries(path, archive)
        check_pickle(path, pickled, unpacked(path, archive, pickled, PICKLE_BYTES_MAX))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about its own storages
                found: object = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception as error:
            # Whatever torch stumbles over, the file is at fault; most of it is UnpicklingError,
            # whose message advises to load without protection.
            said = str(error).partition("\n")[0][:200]
            if "nsupported" in str(error) or "eights" in said:
                said = pickle_advice(path, unpacked(path, archive, pickled, PICKLE_BYTES_MAX))
            else:
                said = (
                    "cannot be read as a state dict: it is damaged, or of a torch.save that this"
                    " version of torch does not read; is the download complete?"
                )
            raise ImportFileError(said, path=path) from error
    state, notes = _state(path, found)
    model = model_from_state(state, options)
    model.notes = [*notes, *model.notes]
    return model


def _check_entries(path: Path, archive: zipfile.ZipFile) -> str:
    """Refuses entries that torch.save does not write; the name of the pickle."""
    pickled = ""
    for entry in archive.infolist():
        if entry.compress_type != zipfile.ZIP_STORED:
            raise ImportFileError(
                f"{entry.filename} is compressed, and torch.save compresses nothing; unpack the zip"
                " and pack it without compression",
                path=path,
            )
        if not entry.filename.lower().endswith(".pkl"):
            continue
        if entry.file_size > PICKLE_BYTES_MAX:
            raise ImportFileError(
                f"{entry.filename}: {entry.file_size} bytes, expected at most {PICKLE_BYTES_MAX}",
                path=path,
            )
        if pickled or not entry.filename.endswith("/data.pkl"):
            # torch finds names in any case, so it might read another one than was looked at.
            raise ImportFileError(
                f"has {pickled or 'no data.pkl'} and {entry.filename}, and torch.save writes one"
                " data.pkl",
                path=path,
            )
        pickled = entry.filename
    return pickled


def _state(path: Path, found: object) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict that a file holds, and what somebody should know about where it was."""
    if not isinstance(found, Mapping):
        kind = type(found).__name__
        raise ImportFileError(
            f"holds {kind}, expected a state dict: `torch.save(module.state_dict(), 'weights.pt')`",
            path=path,
        )
    entries = cast("Mapping[object, object]", found)
    if len(entries) > TENSORS_MAX:
        raise ImportFileError(f"{len(entries)} entries, at most {TENSORS_MAX}", path=path)
    notes: list[str] = []
    inner = {name: value for name, value in entries.items() if _is_state(value)}
    if inner:
        entries, notes = _in_checkpoint(path, entries, inner)
    state: dict[str, Tensor] = {}
    for name, value in entries.items():
        if not isinstance(name, str):
            raise ImportFileError(
                f"has the key {str(name)[:80]!r}, expected names of tensors:"
                " `torch.save(module.state_dict(), 'weights.pt')`",
                path=path,
            )
        if not isinstance(value, Tensor):
            kind = type(value).__name__
            raise refused(name, f"is {kind}, not a tensor; save module.state_dict() alone")
        # A view may claim any size over a storage of a few bytes.
        if value.numel() > WEIGHT_VALUES_MAX:
            raise ImportFileError(f"{name}: {value.numel()} values", path=path, key=name)
        state[name] = value
    checked_values(path, {name: value.shape for name, value in state.items()})
    return state, notes


def _is_state(value: object) -> bool:
    """Whether it is names of tensors, as in a checkpoint."""
    if not isinstance(value, Mapping) or not value:
        return False
    entries = cast("Mapping[object, object]", value)
    return len(entries) <= TENSORS_MAX and all(
        isinstance(name, str) and isinstance(each, Tensor) for name, each in entries.items()
    )


def _in_checkpoint(
    path: Path, entries: Mapping[object, object], inner: Mapping[object, object]
) -> tuple[Mapping[object, object], list[str]]:
    """The one state dict of a checkpoint."""
    load = f"`torch.save(torch.load({path.name!r})[{next(iter(inner))!r}], 'weights.pt')`"
    if len(inner) > 1:
        names = listed([str(name) for name in inner])
        raise ImportFileError(
            f"is a checkpoint with several state dicts ({names}): save the one to import, such as"
            f" {load}",
            path=path,
        )
    (name,) = inner
    beside = [str(each) for each in entries if each != name]
    for each, value in entries.items():
        if isinstance(value, Tensor) and value.numel() > 1:
            raise refused(
                str(each),
                f"a tensor beside the state dict {str(name)!r} of a checkpoint, and what it does is"
                f" not known; if nothing on the way to the output, save the state dict alone:"
                f" {load}",
            )
    said = f"a checkpoint: its one state dict, {str(name)!r}, is imported"
    ignored = f"; left out: {listed(beside)}" if beside else ""
    return cast("Mapping[object, object]", inner[name]), [said + ignored]
