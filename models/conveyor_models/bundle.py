"""A bundle on disk: a folder with model.toml and weights.safetensors.

Loading trusts nothing it reads. Files must be regular and lie inside the folder; sizes are compared
with what model.toml implies before anything is read into memory; the header of the weights is
checked by itself before the tensors are; and nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, cast

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from conveyor_models.errors import SpecError, WeightsError
from conveyor_models.files import read_inside
from conveyor_models.network import Network
from conveyor_models.spec import ModelSpec, Shape, parse_spec

SPEC_FILE: Final = "model.toml"
WEIGHTS_FILE: Final = "weights.safetensors"
SPEC_BYTES_MAX: Final = 4 * 1024 * 1024
HEADER_BYTES_BASE: Final = 16 * 1024
"""Room in the header of the weights for metadata, beside what its tensors need."""
HEADER_BYTES_PER_TENSOR: Final = 256
_FLOAT32_BYTES: Final = 4
_PICKLE_SUFFIXES: Final = frozenset({".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt"})


@dataclass(frozen=True, slots=True, eq=False)
class Bundle:
    """A model, validated and in memory."""

    spec: ModelSpec
    weights: Mapping[str, Tensor]
    """The tensors of `spec.weight_shapes`: float32, on the CPU, finite. Not to be written to."""
    digest: str
    """`sha256:` and 64 hex digits, of structure and weights; see `digest_of`."""
    path: Path
    """The folder it was loaded from."""

    def network(self, dtype: torch.dtype = torch.float32) -> Network:
        """The model as readable reference code, computing in `dtype`."""
        return Network(self.spec, self.weights, dtype)


def load_bundle(folder: Path) -> Bundle:
    """Reads and validates a bundle.

    Args:
        folder: the folder that holds model.toml and weights.safetensors.

    Raises:
        BundleFileError: a file is missing, not a regular file, outside the folder, or too large.
        SpecError: model.toml is not valid.
        WeightsError: the weights are damaged, or not the ones model.toml asks for.
    """
    spec = load_spec(folder)
    path = folder / WEIGHTS_FILE
    shapes = spec.weight_shapes
    header_bytes_max = HEADER_BYTES_BASE + HEADER_BYTES_PER_TENSOR * len(shapes)
    tensor_bytes = _FLOAT32_BYTES * spec.weight_values
    data = _read(folder, WEIGHTS_FILE, bytes_max=8 + header_bytes_max + tensor_bytes)
    _check_header(path, data, shapes, header_bytes_max)
    try:
        weights = safetensors.torch.load(data)
    except SafetensorError as error:
        raise WeightsError(
            "not valid safetensors: the tensors do not fit the header; is the download complete?",
            path=path,
        ) from error
    _check_weights(path, weights, shapes)
    return Bundle(spec, MappingProxyType(weights), digest_of(spec, weights), folder)


def load_spec(folder: Path) -> ModelSpec:
    """Reads and validates the model.toml of a bundle, and not its weights.

    Raises:
        BundleFileError: the file is missing, not a regular file, outside the folder, or too large.
        SpecError: it is not valid.
    """
    data = _read(folder, SPEC_FILE, bytes_max=SPEC_BYTES_MAX)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SpecError("not text in UTF-8", path=folder / SPEC_FILE) from error
    return parse_spec(text, source=folder / SPEC_FILE)


def save_bundle(folder: Path, spec: ModelSpec, weights: Mapping[str, Tensor]) -> Bundle:
    """Writes a bundle, replacing the one that may be there, and loads it again.

    Each file appears whole or not at all, the weights first. To change a model that is being
    served, write a new version beside it instead.

    Args:
        folder: where to; made if it is not there.
        spec: the structure.
        weights: the tensors that `spec.weight_shapes` names, float32 and finite.

    Raises:
        WeightsError: the weights are not the ones the spec asks for; nothing was written.
    """
    _check_weights(folder / WEIGHTS_FILE, weights, spec.weight_shapes)
    folder.mkdir(parents=True, exist_ok=True)
    plain = {name: weights[name].detach().cpu().contiguous() for name in spec.weight_shapes}
    _write(folder / WEIGHTS_FILE, safetensors.torch.save(plain))
    _write(folder / SPEC_FILE, spec.to_toml().encode())
    return load_bundle(folder)


def digest_of(spec: ModelSpec, weights: Mapping[str, Tensor]) -> str:
    """Identifies what a model computes: its structure and the exact bytes of its weights.

    Name, version, description, labels and limits do not enter, nor does how the file is laid out.

    Returns:
        `sha256:` and 64 hex digits.
    """
    structure = json.dumps(spec.structure(), sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256()
    _update(digest, b"conveyor bundle 1")
    _update(digest, structure.encode())
    for name in sorted(weights):
        values = weights[name].detach().cpu().contiguous().numpy().astype("<f4", copy=False)
        _update(digest, name.encode())
        _update(digest, b"F32")
        _update(digest, json.dumps(list(values.shape)).encode())
        _update(digest, values.tobytes())
    return f"sha256:{digest.hexdigest()}"


def _update(digest: hashlib._Hash, part: bytes) -> None:  # pyright: ignore[reportPrivateUsage]
    """Adds one part with its length before it, so that no two lists of parts read alike."""
    digest.update(struct.pack("<Q", len(part)))
    digest.update(part)


def _read(folder: Path, name: str, bytes_max: int) -> bytes:
    """The content of a file of the bundle."""
    return read_inside(folder, name, bytes_max, missing=lambda: _missing(folder, name))


def _missing(folder: Path, name: str) -> str:
    if not folder.is_dir():
        return "missing, and so is the folder of the bundle"
    if name == WEIGHTS_FILE:
        for path in folder.iterdir():
            if path.suffix in _PICKLE_SUFFIXES:
                return f"missing; {path.name} may be a pickle, and pickles are never loaded"
    return "missing"


def _write(path: Path, data: bytes) -> None:
    draft = path.with_name(f".{path.name}.draft")
    with draft.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)


def _check_header(
    path: Path, data: bytes, shapes: Mapping[str, Shape], header_bytes_max: int
) -> None:
    """Refuses a header that does not announce exactly the tensors expected."""
    if len(data) < 8:
        raise WeightsError(
            f"not a safetensors file: it has only {len(data)} bytes; is the download complete?",
            path=path,
        )
    (header_bytes,) = struct.unpack_from("<Q", data)
    if header_bytes > header_bytes_max:
        raise WeightsError(
            f"not a safetensors file for this model.toml: its header would have {header_bytes:,}"
            f" bytes; expected at most {header_bytes_max:,}",
            path=path,
        )
    if header_bytes > len(data) - 8:
        raise WeightsError(
            f"the file ends within its header of {header_bytes:,} bytes; is the download complete?",
            path=path,
        )
    try:
        parsed: object = json.loads(data[8 : 8 + header_bytes], object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"the header is not valid JSON: {error}", path=path) from error
    if not isinstance(parsed, dict):
        raise WeightsError("the header is not a JSON object", path=path)
    header = cast("dict[str, Any]", parsed)
    header.pop("__metadata__", None)
    _check_names(path, header.keys(), shapes)
    for name, shape in shapes.items():
        entry = header[name]
        found = cast("dict[str, Any]", entry) if isinstance(entry, dict) else {}
        if found.get("dtype") != "F32":
            raise WeightsError(
                f"tensor {name}: type {found.get('dtype')}, expected F32",
                path=path,
                key=name,
            )
        if found.get("shape") != list(shape):
            raise WeightsError(
                f"tensor {name}: shape {found.get('shape')!r}, expected {list(shape)}",
                path=path,
                key=name,
            )


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"duplicate {name!r}")
        values[name] = value
    return values


def _check_names(path: Path, found: object, shapes: Mapping[str, Shape]) -> None:
    names = set(cast("Mapping[str, object]", found))
    missing = sorted(shapes.keys() - names)
    extra = sorted(names - shapes.keys())
    if missing:
        also = f"; it holds {_listed(extra)}, which {SPEC_FILE} does not ask for" if extra else ""
        raise WeightsError(f"missing tensor {_listed(missing)}{also}", path=path, key=missing[0])
    if extra:
        raise WeightsError(
            f"tensor {_listed(extra)} is not one that {SPEC_FILE} asks for",
            path=path,
            key=extra[0],
        )


def _listed(names: list[str]) -> str:
    shown = ", ".join(name[:80] for name in names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"


def _check_weights(path: Path, weights: Mapping[str, Tensor], shapes: Mapping[str, Shape]) -> None:
    _check_names(path, weights, shapes)
    for name, shape in shapes.items():
        tensor = weights[name]
        if tensor.dtype != torch.float32:
            raise WeightsError(
                f"tensor {name}: type {str(tensor.dtype).removeprefix('torch.')}, expected float32",
                path=path,
                key=name,
            )
        if tuple(tensor.shape) != shape:
            raise WeightsError(
                f"tensor {name}: shape {list(tensor.shape)}, expected {list(shape)}",
                path=path,
                key=name,
            )
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise WeightsError(
                f"tensor {name}: {bad} of {tensor.numel()} values are not finite",
                path=path,
                key=name,
            )
