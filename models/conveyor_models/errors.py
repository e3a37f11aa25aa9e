"""What can be wrong with a bundle, or with a file that is to become one.

BundleError                      anything that keeps a bundle from being used
├── BundleFileError              a file is missing, not a regular file, outside, or too large
├── SpecError                    model.toml does not say what a model is
├── WeightsError                 weights.safetensors does not hold what model.toml asks for
├── RepositoryError              the folder of bundles is not laid out as NAME/ or NAME/VERSION/
├── ImportFileError              a file to import is damaged, too large, or not of its format
├── ImporterMissingError         what reads the format is not installed
└── UnsupportedModuleError       a model has something that the bundle format cannot express
    └── AmbiguousModuleError     a file can be understood in several ways; options decide

Every message names the file and the key or the tensor, what was found there and what was expected,
so that it can be printed as it is.
"""

from __future__ import annotations

from pathlib import Path


class BundleError(Exception):
    """A bundle cannot be used.

    Attributes:
        path: the file or folder at fault, where there is one.
        key: the key of model.toml or the name of the tensor at fault, where there is one.
    """

    def __init__(self, message: str, *, path: Path | None = None, key: str | None = None) -> None:
        super().__init__(message if path is None else f"{path}: {message}")
        self.path = path
        self.key = key


class BundleFileError(BundleError):
    """A file is missing, not a regular file, outside its bundle, or larger than allowed."""


class SpecError(BundleError):
    """model.toml is not valid TOML, or does not describe a model."""


class WeightsError(BundleError):
    """weights.safetensors is damaged, or its tensors are not the ones model.toml asks for."""


class RepositoryError(BundleError):
    """A folder of bundles is not laid out as NAME/ or NAME/VERSION/."""


class ImportFileError(BundleError):
    """A file to import is damaged, larger than allowed, or not of the format it is taken for."""


class ImporterMissingError(BundleError):
    """The package that reads a format is not installed."""


class UnsupportedModuleError(BundleError):
    """A model of another framework has something that the bundle format cannot express.

    It is refused, not approximated, and `key` is the layer, node or tensor.
    """


class AmbiguousModuleError(UnsupportedModuleError):
    """A file can be understood in more than one way, and the message says which options decide.

    Attributes:
        answers: options of `conveyor-server models import` that would do, one tuple for each
            way in which the file can be understood.
    """

    def __init__(
        self, message: str, *, key: str | None = None, answers: tuple[tuple[str, ...], ...] = ()
    ) -> None:
        super().__init__(message, key=key)
        self.answers = answers
