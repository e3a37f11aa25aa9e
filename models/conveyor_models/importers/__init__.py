"""Models of other frameworks as bundles.

`import_model` reads a file and says what it understood; `conveyor_models.add_bundle` puts that into
a repository. Nothing is approximated: what a bundle cannot express exactly is refused by name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from conveyor_models.errors import ImportFileError
from conveyor_models.importers.common import ImportedLayer, ImportedModel, refused
from conveyor_models.importers.options import NO_OPTIONS, ImportOptions, parse_cells
from conveyor_models.importers.torch_state import model_from_state, weights_from_torch

__all__ = [
    "NO_OPTIONS",
    "ImportOptions",
    "ImportedLayer",
    "ImportedModel",
    "import_model",
    "model_from_state",
    "parse_cells",
    "weights_from_torch",
]

SUFFIXES: Final = (".safetensors", ".pt", ".pth", ".onnx", ".keras", ".h5", ".hdf5")


def import_model(path: Path, options: ImportOptions = NO_OPTIONS) -> ImportedModel:
    """Reads a model of another framework.

    Args:
        path: .safetensors, .pt or .pth (PyTorch state dicts), .onnx, .keras or .h5 (Keras 2, 3).
        options: what a state dict leaves open.

    Raises:
        BundleFileError: the file is missing, not a regular file, or too large.
        ImportFileError: it is damaged, or not of the format that its name says.
        ImporterMissingError: the extra `importers` is not installed.
        UnsupportedModuleError: it has something that a bundle cannot express.
    """
    # Each format is loaded by its own import, for most need one.
    suffix = path.suffix.lower()
    if suffix in (".safetensors", ".pt", ".pth"):
        from conveyor_models.importers import torch_file  # noqa: PLC0415

        if suffix == ".safetensors":
            return torch_file.import_safetensors(path, options)
        return torch_file.import_pickle(path, options)
    if suffix not in SUFFIXES:
        raise ImportFileError(
            f"ends in {suffix or 'nothing'}, expected one of {', '.join(SUFFIXES)}", path=path
        )
    if options != NO_OPTIONS:
        raise refused(path.name, "says its own structure; the options are for state dicts")
    if suffix == ".onnx":
        from conveyor_models.importers.onnx_file import import_onnx  # noqa: PLC0415

        return import_onnx(path)
    from conveyor_models.importers.keras_file import import_keras  # noqa: PLC0415

    return import_keras(path)
