"""The arrays in an ONNX file, and beside it."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from conveyor_models.errors import BundleFileError
from conveyor_models.files import read_inside
from conveyor_models.importers.common import FILE_BYTES_MAX, refused
from conveyor_models.importers.onnx_values import Array


def array_of(onnx: Any, tensor: Any, path: Path | None, files: dict[str, bytes]) -> Array:
    """The array of a TensorProto.

    Args:
        onnx: the package.
        tensor: the TensorProto.
        path: of the model, next to which other files may be read; None: they may not.
        files: those that were read, by location.
    """
    name = tensor.name or "constant"
    if any(dim < 0 for dim in tensor.dims):
        raise refused(name, f"shape {list(tensor.dims)}")
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        if path is None:
            raise refused(name, "a constant in another file, inside the graph")
        tensor.raw_data = _external(onnx, tensor, path, files)
        tensor.data_location = onnx.TensorProto.DEFAULT
        del tensor.external_data[:]
    try:
        array: Array = np.asarray(onnx.numpy_helper.to_array(tensor))
    except Exception as error:  # its own, numpy's and struct's
        raise refused(name, "its data do not fit its shape and type") from error
    if array.shape != tuple(tensor.dims):
        raise refused(name, f"its data do not fit its shape {list(tensor.dims)}")
    return array


def _external(onnx: Any, tensor: Any, path: Path, files: dict[str, bytes]) -> bytes:
    """The bytes of a tensor that is kept in a file beside the model."""
    entries = {each.key: each.value for each in tensor.external_data}
    location = entries.get("location", "")
    parts = PurePosixPath(location).parts
    if not location or location.startswith("/") or ".." in parts or "\\" in location:
        raise BundleFileError(
            f"tensor {tensor.name} is kept in {location[:80]!r}, outside the model's folder",
            path=path,
            key=tensor.name,
        )
    if location not in files:
        left = FILE_BYTES_MAX - sum(len(each) for each in files.values())
        # With every link resolved, it has to be inside as well.
        files[location] = read_inside(path.resolve().parent, location, left)
    whole = files[location]
    size = _item_bytes(onnx, tensor) * int(np.prod(list(tensor.dims), dtype=np.int64))
    try:
        offset = int(entries.get("offset", 0))
        length = int(entries.get("length", size))
    except ValueError as error:
        raise refused(tensor.name, "its place in the other file is not a number") from error
    if length != size or not 0 <= offset <= len(whole) - length:
        raise refused(
            tensor.name, f"{length} bytes at {offset} of {location}, which has {len(whole)}"
        )
    return whole[offset : offset + length]


def _item_bytes(onnx: Any, tensor: Any) -> int:
    try:
        return int(np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)).itemsize)
    except (KeyError, TypeError, ValueError) as error:
        raise refused(
            tensor.name, f"is of type {tensor.data_type} of ONNX, which is not known"
        ) from error
