"""What the importers share: the model they arrive at, and how weights are checked.

Every importer turns a file into an `ImportedModel`, which says itself as model.toml and as the
tensors of the bundle. What cannot be carried over exactly is refused by `refused`.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from conveyor_models.errors import (
    ImporterMissingError,
    ImportFileError,
    UnsupportedModuleError,
)
from conveyor_models.files import read_inside
from conveyor_models.layers import REVERSE
from conveyor_models.spec import LAYERS_MAX, WEIGHT_VALUES_MAX, ModelSpec, spec_error

FILE_BYTES_MAX: Final = 4 * WEIGHT_VALUES_MAX + 64 * 1024 * 1024
"""Of any file that is read: the most weights a model may have, and room for the rest."""
NAMES_SHOWN_MAX: Final = 4
_TYPE: Final = re.compile(r"(q?)(bool|complex|b?float|uint|int)(\d*)(?:_\w+)?")
_EXACT: Final = (torch.float32, torch.float16, torch.bfloat16)


def refused(key: str, why: str) -> UnsupportedModuleError:
    """The error for what cannot be carried over.

    Args:
        key: the name, in the file, of the node, layer or tensor.
        why: what it has that a bundle has not.
    """
    key = key[:200]
    return UnsupportedModuleError(f"{key}: {why}", key=key)


def listed(names: Sequence[str]) -> str:
    """The first few names, and how many more."""
    shown = ", ".join(name[:80] for name in names[:NAMES_SHOWN_MAX])
    more = len(names) - NAMES_SHOWN_MAX
    return f"{shown} and {more} more" if more > 0 else shown


def kind_of(dtype: np.dtype[Any] | torch.dtype) -> str:
    """What numbers of a type are, in words for people: "64-bit floats"."""
    name = dtype.name if isinstance(dtype, np.dtype) else str(dtype).removeprefix("torch.")
    match = _TYPE.fullmatch(name)
    if match is None:
        return "values that are not numbers"
    quantised, kind, bits = match.groups()
    nouns = {"bool": "booleans", "complex": "complex numbers", "uint": "unsigned integers"}
    noun = nouns.get(kind, "floats" if kind.endswith("float") else "integers")
    return f"{'quantised ' if quantised else ''}{f'{bits}-bit ' if bits else ''}{noun}"


def read_file(path: Path, bytes_max: int = FILE_BYTES_MAX) -> bytes:
    """The content of the file that is imported.

    Raises:
        BundleFileError: it is missing, not a regular file, or too large.
    """
    folder = path.resolve().parent
    return read_inside(folder, path.resolve().name, bytes_max)


def reader_module(name: str) -> Any:
    """A package of the extra `importers`, loaded when it is needed.

    Raises:
        ImporterMissingError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        from conveyor.install import install_command  # noqa: PLC0415

        package = name.partition(".")[0]
        raise ImporterMissingError(
            f"{package} is not installed: {install_command('importers')}", key=package
        ) from error


# --- Weights -----------------------------------------------------------------------------------


def exact_float32(name: str, tensor: Tensor) -> Tensor:
    """The same values as float32, in memory of their own.

    Raises:
        UnsupportedModuleError: it is not made of finite floats, or float32 cannot hold one of them.
    """
    plain = not tensor.is_quantized and tensor.layout == torch.strided
    if not plain or tensor.dtype not in (*_EXACT, torch.float64):
        kind = kind_of(tensor.dtype)
        if not plain and not tensor.is_quantized:
            kind = "a sparse tensor" if tensor.dtype.is_floating_point else f"sparse {kind}"
        raise refused(name, f"holds {kind}, expected floats of at most 64 bits")
    if tensor.is_meta or tensor.numel() > WEIGHT_VALUES_MAX:
        raise refused(name, f"{tensor.numel()} values, expected at most {WEIGHT_VALUES_MAX}")
    single = tensor.detach().cpu().to(torch.float32, copy=True).contiguous()
    if tensor.dtype == torch.float64 and not torch.equal(single.double(), tensor.detach().cpu()):
        raise refused(
            name,
            "holds 64-bit floats, some of which 32 bits cannot hold; convert the model to 32-bit"
            " floats first",
        )
    if not bool(single.isfinite().all()):
        raise refused(name, "has a NaN or an infinity")
    return single


def tensor_of(name: str, array: np.ndarray[Any, Any]) -> Tensor:
    """`exact_float32` of a numpy array.

    Raises:
        UnsupportedModuleError: it is not made of finite floats, or float32 cannot hold one of them.
    """
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        raise refused(name, f"holds {kind_of(array.dtype)}, expected floats of at most 64 bits")
    native = np.array(array, dtype=array.dtype.newbyteorder("="), order="C", copy=True)
    return exact_float32(name, torch.from_numpy(native))  # pyright: ignore[reportUnknownMemberType]


# --- The model ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class ImportedLayer:
    """One recurrent layer."""

    name: str
    """What the file calls it."""
    table: dict[str, Any]
    """Its `[[layers]]` of model.toml."""
    tensors: dict[str, Tensor]
    """Under their names within the layer, those that run from the end behind `reverse.`."""

    @property
    def input_size(self) -> int:
        """What it reads per step."""
        return self.tensors["weight_input"].shape[1]

    @property
    def output_size(self) -> int:
        """What the next layer reads."""
        both = 2 if self.table.get("direction") == "bidirectional" else 1
        return both * self.tensors["weight_recurrent"].shape[1]

    @property
    def turned(self) -> ImportedLayer:
        """The same layer in the other direction; it runs in one."""
        table = {key: value for key, value in self.table.items() if key != "direction"}
        if "direction" not in self.table:
            table["direction"] = "reverse"
        return ImportedLayer(self.name, table, self.tensors)


def two_ways(forward: ImportedLayer, reverse: ImportedLayer, name: str) -> ImportedLayer:
    """A bidirectional layer from one for each direction, whose `direction` does not count.

    Raises:
        UnsupportedModuleError: the two differ in more than their weights.
    """
    tables = [
        {key: value for key, value in layer.table.items() if key != "direction"}
        for layer in (forward, reverse)
    ]
    shapes = [
        {key: tuple(tensor.shape) for key, tensor in layer.tensors.items()}
        for layer in (forward, reverse)
    ]
    if tables[0] != tables[1] or shapes[0] != shapes[1]:
        raise refused(name, "its two directions differ in more than their weights")
    backwards = {f"{REVERSE}{key}": tensor for key, tensor in reverse.tensors.items()}
    table = tables[0] | {"direction": "bidirectional"}
    return ImportedLayer(name, table, forward.tensors | backwards)


@dataclass(slots=True, eq=False)
class ImportedModel:
    """What a file was understood to be."""

    layers: list[ImportedLayer] = field(default_factory=list[ImportedLayer])
    embedding: Tensor | None = None
    """[V, E]"""
    head: Tensor | None = None
    """[O, top]"""
    head_bias: Tensor | None = None
    activation: str = "none"
    notes: list[str] = field(default_factory=list[str])
    """What somebody who imports it should know."""

    @property
    def weights(self) -> dict[str, Tensor]:
        """The tensors of the bundle."""
        found = {
            f"layers.{number}.{name}": tensor
            for number, layer in enumerate(self.layers)
            for name, tensor in layer.tensors.items()
        }
        others = {
            "embedding.weight": self.embedding,
            "head.weight": self.head,
            "head.bias": self.head_bias,
        }
        found |= {name: tensor for name, tensor in others.items() if tensor is not None}
        return {name: tensor.contiguous() for name, tensor in found.items()}

    def spec(self, name: str, version: int = 1, description: str = "") -> ModelSpec:
        """The model.toml.

        Raises:
            SpecError: the name is not one, or a size is beyond what a bundle may have.
            UnsupportedModuleError: its parts do not fit each other.
        """
        self._check_sizes()
        tables: dict[str, Any] = {"schema": 1, "name": name, "version": version}
        if description:
            tables["description"] = description
        if self.embedding is None:
            tables["input"] = {"kind": "features", "size": self.layers[0].input_size}
        else:
            tables["input"] = {"kind": "tokens", "size": self.embedding.shape[0]}
            tables["embedding"] = {"size": self.embedding.shape[1]}
        tables["layers"] = [layer.table for layer in self.layers]
        if self.head is not None:
            tables["head"] = {"size": self.head.shape[0], "bias": self.head_bias is not None}
        if self.activation != "none":
            tables["output"] = {"activation": self.activation}
        try:
            return ModelSpec.model_validate(tables)
        except ValidationError as error:
            raise spec_error(error) from error

    def _check_sizes(self) -> None:
        if not self.layers or len(self.layers) > LAYERS_MAX:
            raise refused("layers", f"{len(self.layers)} of them, expected 1 to {LAYERS_MAX}")
        size = self.layers[0].input_size if self.embedding is None else self.embedding.shape[1]
        for layer in self.layers:
            if layer.input_size != size:
                raise refused(
                    layer.name, f"reads {layer.input_size} numbers, and what is below gives {size}"
                )
            size = layer.output_size
        if self.head is not None and self.head.shape[1] != size:
            raise refused("head", f"reads {self.head.shape[1]} numbers, and the stack gives {size}")


def checked_values(path: Path, shapes: Mapping[str, Sequence[int]]) -> None:
    """Refuses tensors that are more than a model may have, before they are looked at.

    Raises:
        ImportFileError: they are.
    """
    total = 0
    for name, shape in shapes.items():
        values = 1
        for length in sorted(shape):  # from 0 on
            values *= max(length, 0)
            if values > WEIGHT_VALUES_MAX:  # the product of all may have millions of digits
                break
        total += values
        if total > WEIGHT_VALUES_MAX:
            raise ImportFileError(
                f"more numbers in its tensors, up to {name[:80]}, than expected: at most"
                f" {WEIGHT_VALUES_MAX}",
                path=path,
            )
