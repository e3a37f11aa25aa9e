"""Keras 3 files: a .keras archive, or an .h5 that holds the whole model.

Both hold the structure as JSON and the weights as HDF5, which are read without Keras: nothing in
the file is ever called. HDF5 can point to other files and unpack to any size, so a weight has to be
a plain dataset of the shape that the structure implies before it is read.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any, Final, cast

from conveyor_models.errors import BundleError, ImportFileError
from conveyor_models.importers.archive import checked_entries, unpacked
from conveyor_models.importers.common import (
    FILE_BYTES_MAX,
    ImportedModel,
    read_file,
    reader_module,
)
from conveyor_models.importers.keras_layers import keras_model
from conveyor_models.importers.keras_weights import ArchiveWeights, LegacyWeights

CONFIG_BYTES_MAX: Final = 16 * 1024 * 1024
ENTRIES_MAX: Final = 64


def import_keras(path: Path) -> ImportedModel:
    """The recurrent network that a Keras 3 model is."""
    h5py = reader_module("h5py")
    data = read_file(path)
    if path.suffix.lower() == ".keras":
        with checked_entries(path, data, ENTRIES_MAX, FILE_BYTES_MAX) as archive:
            metadata = _json(path, unpacked(path, archive, "metadata.json", CONFIG_BYTES_MAX))
            config = _json(path, unpacked(path, archive, "config.json", CONFIG_BYTES_MAX))
            weights = unpacked(path, archive, "model.weights.h5", FILE_BYTES_MAX)
        _check_version(path, metadata.get("keras_version"))
    else:
        config, weights = None, data
    try:
        with h5py.File(io.BytesIO(weights), "r") as file:
            if config is not None:
                return keras_model(config, ArchiveWeights(h5py, file))
            _check_version(path, _text(file.attrs.get("keras_version")))
            text = _text(file.attrs.get("model_config"))
            if text is None or "model_weights" not in file:
                raise ImportFileError("holds no whole model; save it with model.save()", path=path)
            return keras_model(_json(path, text.encode()), LegacyWeights(h5py, file))
    except BundleError:
        raise
    except Exception as error:  # whatever HDF5 stumbles over, the file is at fault
        raise ImportFileError(f"cannot be read: {error}", path=path) from error


def _json(path: Path, data: bytes) -> dict[str, Any]:
    if len(data) > CONFIG_BYTES_MAX:
        raise ImportFileError(f"structure of {len(data)} bytes", path=path)
    try:
        parsed: object = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ImportFileError(f"its structure is not valid JSON: {error}", path=path) from error
    if not isinstance(parsed, dict):
        raise ImportFileError("its structure is not a JSON object", path=path)
    return cast("dict[str, Any]", parsed)


def _text(value: object) -> str | None:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return value if isinstance(value, str) else None


def _check_version(path: Path, version: object) -> None:
    # Keras 2 has another hard_sigmoid under the same name.
    if not isinstance(version, str) or not version.startswith("3."):
        raise ImportFileError(
            f"written by Keras {version}, expected 3; load and save it with Keras 3", path=path
        )
