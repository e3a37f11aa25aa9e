"""Layers of Keras that are affine maps of a row, feature by feature."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeAlias, cast

import torch
from torch import Tensor

from conveyor_models.importers.common import refused
from conveyor_models.importers.folding import Affine, batch_norm, check_offsets, scale
from conveyor_models.importers.keras_cells import flag_of
from conveyor_models.spec import Shape

Take: TypeAlias = Callable[[Sequence[Shape], int], list[Tensor]]
"""Hands over weights of these shapes, and passes over so many after them."""
EPSILON: Final = 1e-7
"""The least deviation that Keras divides by."""


def normalization(name: str, config: Mapping[str, Any], size: int, take: Take, axis: int) -> Affine:
    """(x - mean) / deviation, or back with `invert`."""
    axes = config.get("axis", -1)
    axes = cast("list[object]", axes) if isinstance(axes, list) else [axes]
    if axes not in ([], [None], [-1], [axis]):
        raise refused(name, f"Normalization along axis {axes}, expected that of the features")
    if config.get("mean") is not None:
        mean, variance = (_numbers(name, config, key, size) for key in ("mean", "variance"))
    else:
        shape = () if axes in ([], [None]) else (size,)
        mean, variance = (each.expand(size) for each in take([shape, shape], 1))
    if not bool((variance >= 0).all()):
        raise refused(name, "a variance below 0")
    mean, deviation = mean.double(), variance.double().sqrt().clamp(min=EPSILON)
    if flag_of(name, config, "invert", absent=False):
        return scale(name, deviation, mean)
    affine = scale(name, 1 / deviation, -mean / deviation)
    check_offsets(affine)
    return affine


def batch_normalization(
    name: str, config: Mapping[str, Any], size: int, take: Take, axis: int
) -> Affine:
    """As after training: with the moving mean and variance."""
    axes = config.get("axis", -1)
    if axes not in (-1, [-1], axis, [axis]):
        raise refused(name, f"BatchNormalization along axis {axes}, expected that of the features")
    if config.get("renorm"):
        raise refused(name, "BatchNormalization with renorm")
    epsilon = config.get("epsilon")
    if not isinstance(epsilon, float | int) or not 0 <= epsilon <= 1:
        raise refused(name, f"epsilon {epsilon!r}, expected 0 to 1")
    has = [flag_of(name, config, key) for key in ("scale", "center")]
    found = take([(size,)] * (2 + sum(has)), 0)
    gamma = found.pop(0) if has[0] else None
    beta = found.pop(0) if has[1] else None
    mean, variance = found
    return batch_norm(name, mean, variance, epsilon, gamma, beta)


def rescaling(name: str, config: Mapping[str, Any], size: int, take: Take, axis: int) -> Affine:
    """x scale + offset."""
    del take, axis
    factor, offset = (_numbers(name, config, key, size) for key in ("scale", "offset"))
    return scale(name, factor, offset)


def _numbers(name: str, config: Mapping[str, Any], key: str, size: int) -> Tensor:
    """[size] of one number for all features, or of a list with one for each; as float32."""
    value: object = config.get(key)
    given = cast("list[object]", value) if isinstance(value, list) else [value]
    sound = all(isinstance(each, float | int) and not isinstance(each, bool) for each in given)
    if not sound or len(given) not in (1, size):
        raise refused(name, f"{key}: expected a number, or a list of {size}")
    numbers = torch.tensor(cast("list[float]", given), dtype=torch.float32).expand(size)
    if not bool(numbers.isfinite().all()):
        raise refused(name, f"{key}: a NaN or an infinity")
    return numbers
