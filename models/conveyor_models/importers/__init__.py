"""Models of other frameworks as bundles.

`import_model` reads a file and says what it understood; `conveyor_models.add_bundle` puts that into
a repository. Nothing is approximated: what a bundle cannot express exactly is refused by name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from conveyor_models.errors import BundleFileError, ImportFileError
from conveyor_models.importers.common import ImportedLayer, ImportedModel, read_file, refused
from conveyor_models.importers.foreign import folder_advice, foreign_advice
from conveyor_models.importers.gates import blocks, gru_tensors, joined, lstm_tensors
from conveyor_models.importers.options import (
    NO_OPTIONS,
    ImportOptions,
    parse_cells,
    parse_epsilon,
    parse_initial_state,
    parse_names,
)
from conveyor_models.importers.torch_state import model_from_state, weights_from_torch

__all__ = [
    "NO_OPTIONS",
    "ImportOptions",
    "ImportedLayer",
    "ImportedModel",
    "blocks",
    "gru_tensors",
    "import_model",
    "joined",
    "lstm_tensors",
    "model_from_state",
    "parse_cells",
    "parse_epsilon",
    "parse_initial_state",
    "parse_names",
    "weights_from_torch",
]

TORCH_SUFFIXES: Final = (".pt", ".pth", ".bin", ".ckpt")
SUFFIXES: Final = (".safetensors", *TORCH_SUFFIXES, ".onnx", ".keras", ".h5", ".hdf5")


def import_model(path: Path, options: ImportOptions = NO_OPTIONS) -> ImportedModel:
    """Reads a model of another framework.

    Args:
        path: .safetensors, .pt, .pth, .bin or .ckpt (PyTorch state dicts), .onnx, .keras or .h5
            (Keras 2, 3).
        options: what a state dict leaves open.

    Raises:
        AmbiguousModuleError: a state dict can be understood in several ways.
        BundleFileError: the file is missing, not a regular file, or too large.
        ImportFileError: it is damaged, or not of the format that its name says.
        ImporterMissingError: the extra `importers` is not installed.
        UnsupportedModuleError: it has something that a bundle cannot express.
    """
    # Each format is loaded by its own import, for most need one.
    suffix = path.suffix.lower()
    if path.is_dir():
        raise BundleFileError(folder_advice(path), path=path)
    if suffix == ".safetensors" or suffix in TORCH_SUFFIXES:
        from conveyor_models.importers import torch_file  # noqa: PLC0415

        if suffix == ".safetensors":
            return torch_file.import_safetensors(path, options)
        return torch_file.import_pickle(path, options)
    if suffix not in SUFFIXES:
        raise _foreign(path)
    if options != NO_OPTIONS:
        raise refused(path.name, "says its own structure; the options are for state dicts")
    if suffix == ".onnx":
        from conveyor_models.importers.onnx_file import import_onnx  # noqa: PLC0415

        return import_onnx(path)
    from conveyor_models.importers.keras_file import import_keras  # noqa: PLC0415

    return import_keras(path)


def _foreign(path: Path) -> ImportFileError:
    """The error for a file whose name is of no format that is read."""
    advice = foreign_advice(path, read_file(path))
    ends = f"ends in {path.suffix or 'nothing'}, expected one of {', '.join(SUFFIXES)}"
    return ImportFileError(advice or ends, path=path)
