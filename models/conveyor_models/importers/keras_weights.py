"""Where the two kinds of Keras file keep the weights of a layer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from conveyor_models.importers.common import refused, tensor_of
from conveyor_models.spec import Shape


class WeightSource(Protocol):
    """The weights of a file, taken layer by layer in the order of the model."""

    def take(
        self, name: str, class_name: str, inner: Sequence[str], shapes: Sequence[Shape]
    ) -> list[Tensor]:
        """The weights of a layer.

        Args:
            name: the layer's.
            class_name: its class.
            inner: the objects within the layer that hold weights, as paths; each holds as many.
            shapes: what the structure implies, one object after the other.
        """
        ...

    def finish(self) -> None:
        """Refuses weights that no layer took."""
        ...


class ArchiveWeights:
    """model.weights.h5 of a .keras archive: layers/CLASS_N/PATH/vars/K.

    N counts the layers of a class, whatever they are called.
    """

    def __init__(self, h5py: Any, file: Any) -> None:
        self._h5py = h5py
        self._file = file
        self._counts: dict[str, int] = {}
        self._taken: set[str] = set()

    def take(
        self, name: str, class_name: str, inner: Sequence[str], shapes: Sequence[Shape]
    ) -> list[Tensor]:
        """See `WeightSource`."""
        snake = re.sub(
            r"([a-z])([A-Z])", r"\1_\2", re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", class_name)
        )
        count = self._counts.get(snake, 0)
        self._counts[snake] = count + 1
        base = f"layers/{snake.lower()}" + (f"_{count}" if count else "")
        found: list[Tensor] = []
        each = len(shapes) // max(len(inner), 1)
        for place, part in enumerate(inner):
            for number in range(each):
                path = "/".join(filter(None, (base, part, "vars", str(number))))
                shape = shapes[place * each + number]
                found.append(dataset(self._h5py, self._file, path, name, shape))
                self._taken.add(path)
        return found

    def finish(self) -> None:
        """See `WeightSource`."""
        _nothing_left(self._h5py, self._file, "layers", self._taken)


class LegacyWeights:
    """An .h5 of a whole model: model_weights/LAYER, whose attribute says the order."""

    def __init__(self, h5py: Any, file: Any) -> None:
        self._h5py = h5py
        self._file = file
        self._taken: set[str] = set()

    def take(
        self, name: str, class_name: str, inner: Sequence[str], shapes: Sequence[Shape]
    ) -> list[Tensor]:
        """See `WeightSource`."""
        del class_name, inner
        if not shapes:
            return []
        base = f"model_weights/{name}"
        group = _hard(self._h5py, self._file, base, name)
        given = np.asarray(group.attrs.get("weight_names", ())).reshape(-1)
        names = [each.decode() if isinstance(each, bytes) else str(each) for each in given]
        if len(names) != len(shapes):
            raise refused(name, f"has {len(names)} weights, expected {len(shapes)}")
        found: list[Tensor] = []
        for each, shape in zip(names, shapes, strict=True):
            found.append(dataset(self._h5py, self._file, f"{base}/{each}", name, shape))
            self._taken.add(f"{base}/{each}")
        return found

    def finish(self) -> None:
        """See `WeightSource`."""
        _nothing_left(self._h5py, self._file, "model_weights", self._taken)


def dataset(h5py: Any, file: Any, path: str, layer: str, shape: Shape) -> Tensor:
    """A plain dataset of that shape.

    Raises:
        UnsupportedModuleError: it is missing, lies elsewhere, is packed, or has another shape.
    """
    found = _hard(h5py, file, path, layer)
    if not isinstance(found, h5py.Dataset):
        raise refused(layer, f"{path} is not a dataset")
    if found.is_virtual or found.external or found.chunks is not None:
        raise refused(layer, f"{path} is not plain: it lies in another file or is packed")
    if tuple(found.shape) != shape:
        raise refused(layer, f"{path}: shape {list(found.shape)}, expected {list(shape)}")
    if np.dtype(found.dtype).kind != "f":
        raise refused(layer, f"{path} is of type {found.dtype}, expected floats")
    # HDF5 makes up what was never written, as much of it as the structure asks for.
    if found.id.get_storage_size() != found.nbytes:
        raise refused(layer, f"{path} holds fewer bytes than its shape takes")
    return tensor_of(f"{layer}: {path}", np.asarray(found[()]))


def _hard(h5py: Any, file: Any, path: str, layer: str) -> Any:
    """What lies there, without following a link to anywhere."""
    found = file
    for part in path.split("/"):
        if part in ("", ".", "..") or not isinstance(found, h5py.Group) or part not in found:
            raise refused(layer, f"{path} is missing")
        if not isinstance(found.get(part, getlink=True), h5py.HardLink):
            raise refused(layer, f"{path} is a link")
        found = found[part]
    return found


def _nothing_left(h5py: Any, file: Any, base: str, taken: set[str]) -> None:
    left: list[str] = []

    def look(name: str, found: Any) -> None:
        path = f"{base}/{name}"
        if isinstance(found, h5py.Dataset) and path not in taken and "seed_generator" not in path:
            left.append(path)

    if base in file:
        file[base].visititems(look)
    if left:
        raise refused(left[0], "weights that no layer of the structure has")
