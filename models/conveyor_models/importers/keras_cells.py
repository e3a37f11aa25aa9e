"""Recurrent layers of Keras in the bundle's terms.

Keras keeps kernels as [inputs, outputs], its gates as i, f, c, o and z, r, h, and has one bias; a
GRU with `reset_after` has two. hard_sigmoid is clamp(x / 6 + 1/2, 0, 1) in Keras 3, and
clamp(x / 5 + 1/2, 0, 1) in Keras 2.

CuDNNLSTM and CuDNNGRU, of Keras 2, keep each gate's block of the kernels as cuDNN wants it: the
numbers of the transposed block, in the shape of the block. Their biases are one vector, those
beside the input first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from conveyor_models.importers.common import ImportedLayer, refused
from conveyor_models.importers.gates import gru_tensors, lstm_tensors
from conveyor_models.spec import SIZE_MAX, Shape

HARD_SIGMOID_SLOPES: Final = {2: 0.2, 3: 1 / 6}
"""For each major version of Keras."""
GATES: Final = {"LSTM": "ifgo", "GRU": "zrn", "SimpleRNN": "h", "CuDNNLSTM": "ifgo"} | {
    "CuDNNGRU": "zrn"
}
NO_PLACE: Final = "a bundle has no place for it yet"


def cell_shapes(name: str, kind: str, config: Mapping[str, Any], size: int) -> list[Shape]:
    """The shapes of the weights of a layer that reads `size` features, in the order of the file."""
    units = size_of(name, config, "units")
    rows = len(GATES[kind]) * units
    shapes: list[Shape] = [(size, rows), (units, rows)]
    if kind.startswith("CuDNN"):
        shapes.append((2 * rows,))
    elif flag_of(name, config, "use_bias"):
        # A GRU without the flag is older than the flag.
        both = kind == "GRU" and flag_of(name, config, "reset_after", absent=False)
        shapes.append((2, rows) if both else (rows,))
    return shapes


def recurrent_layer(
    name: str, kind: str, config: Mapping[str, Any], found: Sequence[Tensor], version: int
) -> ImportedLayer:
    """The layer, as running forward.

    Args:
        name: the layer's.
        kind: one of `GATES`.
        config: what the file says of it.
        found: its weights, of the shapes of `cell_shapes`.
        version: of Keras, 2 or 3.

    Raises:
        UnsupportedModuleError: its cell is not one of a bundle.
    """
    if config.get("time_major"):
        raise refused(name, "time_major: its rows come as [steps, batch, features]")
    if kind.startswith("CuDNN"):
        return _of_cudnn(name, kind.removeprefix("CuDNN"), config, found)
    table: dict[str, Any] = {"cell": kind.removeprefix("Simple").lower(), "size": config["units"]}
    weight, recurrent = found[0].T.contiguous(), found[1].T.contiguous()
    rows = weight.shape[0]
    bias = found[2] if len(found) == 3 else torch.zeros(rows)
    activation = activation_of(config.get("activation"))
    if kind == "SimpleRNN":
        if activation not in ("tanh", "relu"):
            raise refused(name, f"activation {activation} in a SimpleRNN: {NO_PLACE}")
        if activation == "relu":
            table["nonlinearity"] = "relu"
        tensors = {"weight_input": weight, "weight_recurrent": recurrent, "bias": bias.clone()}
        return ImportedLayer(name, table, tensors)
    if activation != "tanh":
        raise refused(name, f"activation {activation} in a {kind}, expected tanh: {NO_PLACE}")
    gate = activation_of(config.get("recurrent_activation"))
    if gate == "hard_sigmoid":
        slope = HARD_SIGMOID_SLOPES[version]
        table |= {"gate_activation": "hard_sigmoid", "hard_sigmoid_slope": slope}
    elif gate != "sigmoid":
        raise refused(
            name, f"recurrent_activation {gate}, expected sigmoid or hard_sigmoid: {NO_PLACE}"
        )
    if kind == "LSTM":
        return ImportedLayer(name, table, lstm_tensors(weight, recurrent, bias, GATES[kind]))
    table["reset"] = "before"
    if flag_of(name, config, "reset_after", absent=False):
        table["reset"] = "after"
    both = (bias[0], bias[1]) if bias.dim() == 2 else (bias, torch.zeros(rows))
    tensors = gru_tensors((weight, recurrent), both, GATES[kind], table["reset"])
    return ImportedLayer(name, table, tensors)


def _of_cudnn(
    name: str, kind: str, config: Mapping[str, Any], found: Sequence[Tensor]
) -> ImportedLayer:
    units: int = config["units"]
    table: dict[str, Any] = {"cell": kind.lower(), "size": units}
    # A block of [inputs, units] read as [units, inputs] is a gate's rows.
    weight, recurrent = (
        torch.cat([block.reshape(units, -1) for block in kernel.chunk(len(GATES[kind]), dim=1)])
        for kernel in found[:2]
    )
    of_input, of_h = found[2].chunk(2)
    if kind == "LSTM":
        bias = of_input + of_h
        return ImportedLayer(name, table, lstm_tensors(weight, recurrent, bias, GATES[kind]))
    tensors = gru_tensors((weight, recurrent), (of_input, of_h), GATES[kind], "after")
    return ImportedLayer(name, table | {"reset": "after"}, tensors)


def activation_of(value: object) -> str:
    """The name of a function, as the file has it: a string, or an object of a class."""
    if isinstance(value, dict):
        found: Any = value  # pyright: ignore[reportUnknownVariableType]
        inner = found.get("config")
        return str(inner if isinstance(inner, str) else found.get("class_name"))
    return "linear" if value is None else str(value)


def size_of(name: str, config: Mapping[str, Any], key: str) -> int:
    """A size that the file states.

    Raises:
        UnsupportedModuleError: it is not a whole number, or out of range.
    """
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= SIZE_MAX:
        raise refused(name, f"{key} {value!r}, expected 1 to {SIZE_MAX}")
    return value


def flag_of(name: str, config: Mapping[str, Any], key: str, *, absent: bool | None = None) -> bool:
    """A flag that the file states.

    Args:
        name: the layer's, for messages.
        config: what the file says of it.
        key: of the flag.
        absent: what it means that the flag is not there; None for an error.

    Raises:
        UnsupportedModuleError: it is neither true nor false.
    """
    value = config.get(key, absent)
    if not isinstance(value, bool):
        raise refused(name, f"{key} {value!r}, expected true or false")
    return value
