"""Where the two kinds of Keras file keep the weights of a layer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final, Protocol

import numpy as np
from torch import Tensor

from conveyor_models.importers.common import kind_of, refused, tensor_of
from conveyor_models.spec import Shape

_KERAS_2_LAYERS: Final = "_layer_checkpoint_dependencies"


class WeightSource(Protocol):
    """The weights of a file, taken layer by layer in the order of the model."""

    def take(
        self,
        name: str,
        class_name: str,
        inner: Sequence[str],
        shapes: Sequence[Shape],
        unread: int = 0,
    ) -> list[Tensor]:
        """The weights of a layer that has some.

        Args:
            name: the layer's.
            class_name: its class.
            inner: the objects within the layer that hold weights, as paths; each holds as many.
            shapes: what the structure implies, one object after the other.
            unread: how many follow that mean nothing to a bundle, such as counts.
        """
        ...

    def finish(self) -> None:
        """Refuses weights that no layer took."""
        ...


class _Weights:
    """What both kinds of file have in common."""

    def __init__(self, h5py: Any, file: Any, bytes_max: int) -> None:
        self._h5py = h5py
        self._file = file
        self._bytes_left = bytes_max
        self._taken: set[str] = set()

    def _dataset(self, path: str, layer: str, shape: Shape) -> Tensor:
        """A plain dataset of that shape, which nothing else has taken.

        Raises:
            UnsupportedModuleError: it is missing, lies elsewhere, is packed, or has another shape.
        """
        found = _hard(self._h5py, self._file, path, layer)
        if not isinstance(found, self._h5py.Dataset):
            raise refused(layer, f"{path} is not a dataset")
        if found.is_virtual or found.external or found.chunks is not None:
            raise refused(layer, f"{path} is not plain: it lies in another file or is packed")
        if tuple(found.shape) != shape:
            raise refused(layer, f"{path}: shape {list(found.shape)}, expected {list(shape)}")
        if np.dtype(found.dtype).kind != "f":
            raise refused(layer, f"{path} holds {kind_of(np.dtype(found.dtype))}, expected floats")
        # HDF5 makes up what was never written, as much of it as the structure asks for.
        if found.id.get_storage_size() != found.nbytes:
            raise refused(layer, f"{path} holds fewer bytes than its shape takes")
        self._bytes_left -= int(found.nbytes)
        if self._bytes_left < 0:
            raise refused(layer, f"{path}: the weights come to more bytes than the file has")
        self._taken.add(path)
        return tensor_of(f"{layer}: {path}", np.asarray(found[()]))

    def _nothing_left(self, base: str) -> None:
        left: list[str] = []

        def look(name: str, found: Any) -> None:
            path = f"{base}/{name}"
            plain = isinstance(found, self._h5py.Dataset) and "seed_generator" not in path
            if plain and path not in self._taken:
                left.append(path)

        if base in self._file:
            self._file[base].visititems(look)
        if left:
            raise refused(left[0], "weights that no layer of the structure has")


class ArchiveWeights(_Weights):
    """model.weights.h5 of a .keras archive: layers/CLASS_N/PATH/vars/K.

    N counts the layers of a class, whatever they are called. Keras 2 has another word for `layers`
    and counts a layer with weights twice, so the n-th layer of a class has the n-th group of the
    class that holds anything.
    """

    def __init__(self, h5py: Any, file: Any, bytes_max: int) -> None:
        super().__init__(h5py, file, bytes_max)
        self._base = "layers" if _KERAS_2_LAYERS not in file else _KERAS_2_LAYERS
        self._groups: dict[str, list[str]] = {}

    def take(
        self,
        name: str,
        class_name: str,
        inner: Sequence[str],
        shapes: Sequence[Shape],
        unread: int = 0,
    ) -> list[Tensor]:
        """See `WeightSource`."""
        snake = re.sub(
            r"([a-z])([A-Z])", r"\1_\2", re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", class_name)
        ).lower()
        if snake not in self._groups:
            self._groups[snake] = self._of_class(snake)
        if not self._groups[snake]:
            raise refused(name, f"{self._base} has no weights for it")
        base = f"{self._base}/{self._groups[snake].pop(0)}"
        found: list[Tensor] = []
        each = len(shapes) // len(inner)
        for place, part in enumerate(inner):
            holder = "/".join(filter(None, (base, part, "vars")))
            for number, shape in enumerate(shapes[place * each : (place + 1) * each]):
                found.append(self._dataset(f"{holder}/{number}", name, shape))
            self._taken |= {f"{holder}/{each + number}" for number in range(unread)}
        return found

    def finish(self) -> None:
        """See `WeightSource`."""
        self._nothing_left(self._base)

    def _of_class(self, snake: str) -> list[str]:
        """The groups with weights of a class, in the order of its layers."""
        layers = _hard(self._h5py, self._file, self._base, "model")
        found: list[tuple[int, str]] = []
        for name in layers:
            match = re.fullmatch(rf"{re.escape(snake)}(?:_(\d{{1,9}}))?", name)
            if match is None or not isinstance(layers.get(name, getlink=True), self._h5py.HardLink):
                continue
            if isinstance(layers[name], self._h5py.Group) and layers[name].visititems(self._holds):
                found.append((int(match[1] or 0), name))
        return [name for _, name in sorted(found)]

    def _holds(self, name: str, found: Any) -> bool | None:
        del name
        return True if isinstance(found, self._h5py.Dataset) else None


class LegacyWeights(_Weights):
    """An .h5 of a whole model: model_weights/LAYER, whose attribute says the order."""

    def take(
        self,
        name: str,
        class_name: str,
        inner: Sequence[str],
        shapes: Sequence[Shape],
        unread: int = 0,
    ) -> list[Tensor]:
        """See `WeightSource`."""
        del class_name, inner
        base = f"model_weights/{name}"
        group = _hard(self._h5py, self._file, base, name)
        given = np.asarray(group.attrs.get("weight_names", ())).reshape(-1)
        names = [each.decode() if isinstance(each, bytes) else str(each) for each in given]
        if len(names) != len(shapes) + unread:
            raise refused(name, f"has {len(names)} weights, expected {len(shapes) + unread}")
        self._taken |= {f"{base}/{each}" for each in names[len(shapes) :]}
        return [
            self._dataset(f"{base}/{each}", name, shape)
            for each, shape in zip(names, shapes, strict=False)
        ]

    def finish(self) -> None:
        """See `WeightSource`."""
        self._nothing_left("model_weights")


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
