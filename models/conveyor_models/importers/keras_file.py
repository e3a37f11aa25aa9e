"""Files of Keras 3 and Keras 2: a .keras archive, or an .h5 that holds the whole model.

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
    listed,
    read_file,
    reader_module,
)
from conveyor_models.importers.hdf5_walk import hdf5_problem
from conveyor_models.importers.keras_layers import keras_model
from conveyor_models.importers.keras_weights import ArchiveWeights, LegacyWeights

CONFIG_BYTES_MAX: Final = 4 * 1024 * 1024
"""Of the structure: a layer takes two to four thousand bytes."""
ENTRIES_MAX: Final = 64
UNPACKED_TIMES_MAX: Final = 8
"""What an archive unpacks to, in sizes of the archive: Keras does not compress its weights."""
UNPACKED_SLACK_BYTES: Final = 64 * 1024 * 1024
"""What any archive may unpack to beyond that."""


def import_keras(path: Path) -> ImportedModel:
    """The recurrent network that a Keras model is.

    Raises:
        BundleFileError: the file is missing, not a regular file, or too large.
        ImportFileError: it is damaged, holds weights alone, or is of another version.
        ImporterMissingError: h5py is not installed.
        UnsupportedModuleError: it has something that a bundle cannot express.
    """
    h5py = reader_module("h5py")
    data = read_file(path)
    if path.suffix.lower() == ".keras":
        bytes_max = min(FILE_BYTES_MAX, UNPACKED_TIMES_MAX * len(data) + UNPACKED_SLACK_BYTES)
        with checked_entries(path, data, ENTRIES_MAX, bytes_max) as archive:
            metadata = _json(path, unpacked(path, archive, "metadata.json", CONFIG_BYTES_MAX))
            config = _json(path, unpacked(path, archive, "config.json", CONFIG_BYTES_MAX))
            version = _version(path, metadata.get("keras_version"))
            weights = unpacked(path, archive, "model.weights.h5", bytes_max)
    else:
        config, version, weights = None, 0, data
    problem = hdf5_problem(weights)
    if problem is not None:
        raise ImportFileError(f"cannot be read: {problem}", path=path)
    try:
        with h5py.File(io.BytesIO(weights), "r") as file:
            if config is not None:
                return keras_model(config, ArchiveWeights(h5py, file, len(weights)), version)
            text = _text(file.attrs.get("model_config"))
            if text is None or "model_weights" not in file:
                raise _no_structure(path, file)
            version = _version(path, _text(file.attrs.get("keras_version")))
            legacy = LegacyWeights(h5py, file, len(weights))
            return keras_model(_json(path, text.encode()), legacy, version)
    except BundleError:
        raise
    except RecursionError as error:
        raise ImportFileError("its structure is nested too deep", path=path) from error
    except Exception as error:  # whatever HDF5 stumbles over, the file is at fault
        raise ImportFileError(
            "cannot be read: not HDF5 as Keras writes it, or damaged; is the download complete?",
            path=path,
        ) from error


def _json(path: Path, data: bytes) -> dict[str, Any]:
    if len(data) > CONFIG_BYTES_MAX:
        raise ImportFileError(
            f"structure of {len(data)} bytes, expected at most {CONFIG_BYTES_MAX}", path=path
        )
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


def _version(path: Path, given: object) -> int:
    """The major version of Keras."""
    text = given if isinstance(given, str) else "of an unknown version"
    major = text.partition(".")[0]
    if major not in ("2", "3"):
        raise ImportFileError(
            f"written by Keras {text[:40]}, expected 2 or 3; load and save it with Keras 3",
            path=path,
        )
    return int(major)


def _no_structure(path: Path, file: Any) -> ImportFileError:
    """For weights alone: activations, directions and what lies between layers are not in them."""
    layers = file.get("layers", file.get("_layer_checkpoint_dependencies"))
    names = [str(name) for name in (file if layers is None else layers) if name != "vars"]
    if layers is None and "layer_names" not in file.attrs:
        return ImportFileError("holds no Keras model", path=path)
    return ImportFileError(
        f"holds the weights of a Keras model ({listed(names)}) and not its structure: activations,"
        " directions and the order of layers are not in it; build the model, call"
        f" model.load_weights({path.name!r}) and model.save('model.keras'), and import that",
        path=path,
    )
