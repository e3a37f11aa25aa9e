"""Keras 3: what the JSON of a model says in the bundle's terms.

Keras keeps kernels as [inputs, outputs], its gates as i, f, c, o and z, r, h, and has one bias; a
GRU with `reset_after` has two. Its hard_sigmoid is clamp(x / 6 + 1/2, 0, 1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, cast

import torch
from torch import Tensor

from conveyor_models.importers.common import (
    ImportedLayer,
    ImportedModel,
    gru_tensors,
    lstm_tensors,
    refused,
    two_ways,
)
from conveyor_models.importers.keras_weights import WeightSource
from conveyor_models.spec import LAYERS_MAX, SIZE_MAX

HARD_SIGMOID_SLOPE: Final = 1 / 6
"""Of Keras 3; it was 0.2 before."""
LAYERS_READ_MAX: Final = 4 * LAYERS_MAX
GATES: Final = {"LSTM": "ifgo", "GRU": "zrn", "SimpleRNN": "h"}
_ACTIVATIONS: Final = {
    "linear": "none",
    "softmax": "softmax",
    "log_softmax": "log_softmax",
    "sigmoid": "sigmoid",
}
_IDLE: Final = ("Dropout", "SpatialDropout1D", "GaussianNoise", "GaussianDropout", "Identity")
"""Layers that do nothing after training."""


def keras_model(config: Mapping[str, Any], weights: WeightSource) -> ImportedModel:
    """The network that a Sequential model, or a Functional one without branches, is.

    Raises:
        UnsupportedModuleError: a layer has something that a bundle cannot express.
    """
    reader = _Reader(weights)
    for layer in _chain(config):
        reader.read(layer)
    weights.finish()
    if not reader.model.layers:
        raise refused("model", "holds no LSTM, GRU or SimpleRNN")
    if reader.last_only:
        reader.model.notes.append(
            f"{reader.last_only} gives the last step's row (return_sequences=False);"
            " the bundle gives every step's"
        )
    return reader.model


# --- The order of layers -------------------------------------------------------------------------


def _chain(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The layers from input to output."""
    kind = config.get("class_name")
    inner = config.get("config")
    if kind not in ("Sequential", "Functional", "Model") or not isinstance(inner, dict):
        raise refused(str(kind), "expected a Sequential or a Functional model")
    given = cast("dict[str, Any]", inner).get("layers")
    if not isinstance(given, list) or len(cast("list[object]", given)) > LAYERS_READ_MAX:
        raise refused(str(kind), f"expected at most {LAYERS_READ_MAX} layers")
    layers: list[Mapping[str, Any]] = []
    for each in cast("list[object]", given):
        if not isinstance(each, dict) or not isinstance(each.get("config"), dict):  # pyright: ignore[reportUnknownMemberType]
            raise refused(str(kind), "a layer without a structure")
        layers.append(cast("dict[str, Any]", each))
    if kind != "Sequential":
        _check_linear(cast("dict[str, Any]", inner), layers)
    return layers


def _check_linear(inner: Mapping[str, Any], layers: Sequence[Mapping[str, Any]]) -> None:
    """Each layer reads the one before it, and nothing else does."""
    before: str | None = None
    for layer in layers:
        name = _name(layer)
        read = _histories(layer.get("inbound_nodes", []))
        if read != ([] if before is None else [before]):
            raise refused(name, f"reads {read}, expected the layer before it: {before}")
        before = name
    ends = _names_in(inner.get("output_layers"))
    begins = _names_in(inner.get("input_layers"))
    if not layers or ends != [before] or begins != [_name(layers[0])]:
        raise refused("model", f"goes from {begins} to {ends}, expected one input and one output")


def _names_in(places: object) -> list[str]:
    """Of ["name", 0, 0], or a list of these."""
    if not isinstance(places, list):
        return []
    found = cast("list[Any]", places)
    if found and isinstance(found[0], str):
        return [found[0]]
    return [str(each[0]) for each in found if each]


def _histories(value: object) -> list[str]:
    """The layers whose outputs stand anywhere in the arguments of a call."""
    if isinstance(value, list):
        return [name for each in cast("list[object]", value) for name in _histories(each)]
    if not isinstance(value, dict):
        return []
    table = cast("dict[str, Any]", value)
    if table.get("class_name") == "__keras_tensor__":
        return [str(table["config"]["keras_history"][0])]
    return [name for each in table.values() for name in _histories(each)]


def _name(layer: Mapping[str, Any]) -> str:
    return str(layer["config"].get("name", layer.get("class_name", "layer")))


# --- Layers --------------------------------------------------------------------------------------


class _Reader:
    """Reads layers one after the other."""

    def __init__(self, weights: WeightSource) -> None:
        self.model = ImportedModel()
        self.last_only: str | None = None
        self._weights = weights
        self._size: int | None = None  # of what the next layer reads; None until it is known
        self._ended = False  # whether an activation has been the last word

    def read(self, layer: Mapping[str, Any]) -> None:
        name, kind, config = _name(layer), str(layer.get("class_name")), layer["config"]
        module = layer.get("module")
        if layer.get("registered_name") not in (None, kind) or (
            isinstance(module, str) and module.partition(".")[0] != "keras"
        ):
            raise refused(name, f"{kind} is a class of somebody else")
        _check_policy(name, config)
        if kind == "InputLayer":
            self._input(name, config)
        elif kind == "Embedding":
            self._embedding(name, config)
        elif kind in GATES:
            self._recurrent(name, kind, config, [(kind, config)])
        elif kind == "Bidirectional":
            self._bidirectional(name, config)
        elif kind == "Dense":
            self._dense(name, kind, config, "")
        elif kind == "TimeDistributed":
            inner = _inner(name, config, "layer")
            if inner.get("class_name") != "Dense":
                raise refused(name, f"TimeDistributed of {inner.get('class_name')}")
            self._dense(name, kind, inner["config"], "layer")
        elif kind in ("Activation", "Softmax"):
            self._activation(name, kind, config)
        elif kind not in _IDLE:
            raise refused(name, f"{kind} is not supported")

    def _input(self, name: str, config: Mapping[str, Any]) -> None:
        shape = config.get("batch_shape") or config.get("batch_input_shape")
        if not isinstance(shape, list) or config.get("sparse") or config.get("ragged"):
            raise refused(name, "InputLayer of an unusual kind")
        sizes = cast("list[Any]", shape)
        self._size = sizes[2] if len(sizes) == 3 else None

    def _embedding(self, name: str, config: Mapping[str, Any]) -> None:
        if self.model.embedding is not None or self.model.layers:
            raise refused(name, "an Embedding that is not the first layer")
        if config.get("mask_zero"):
            raise refused(name, "mask_zero: steps that are passed over are not supported")
        if config.get("lora_rank"):
            raise refused(name, "lora_rank is not supported")
        shape = _size(name, config, "input_dim"), _size(name, config, "output_dim")
        self._size = shape[1]
        (self.model.embedding,) = self._weights.take(name, "Embedding", [""], [shape])

    def _bidirectional(self, name: str, config: Mapping[str, Any]) -> None:
        if config.get("merge_mode") != "concat":
            raise refused(name, f"merge_mode {config.get('merge_mode')!r}, expected 'concat'")
        forward = _inner(name, config, "layer")
        backward = config.get("backward_layer")
        kind = str(forward.get("class_name"))
        if kind not in GATES:
            raise refused(name, f"Bidirectional of {kind}")
        _check_policy(name, forward["config"])
        ways = [(kind, forward["config"])]
        if backward is None:
            ways.append((kind, {**forward["config"], "go_backwards": True}))
        else:
            second = _inner(name, config, "backward_layer")
            _check_policy(name, second["config"])
            ways.append((str(second.get("class_name")), second["config"]))
        if ways[1][0] != kind or ways[1][1].get("go_backwards") is not True:
            raise refused(name, "its backward_layer is of another kind, or does not run backwards")
        self._recurrent(name, "Bidirectional", forward["config"], ways)

    def _recurrent(
        self,
        name: str,
        class_name: str,
        config: Mapping[str, Any],
        ways: Sequence[tuple[str, Mapping[str, Any]]],
    ) -> None:
        if self.last_only is not None:
            raise refused(self.last_only, "return_sequences=False, below another recurrent layer")
        if self.model.head is not None or self._ended:
            raise refused(name, "a recurrent layer after the head")
        if self._size is None:
            raise refused(name, "the size of what it reads is not stated")
        if config.get("go_backwards") is not False:
            raise refused(name, "go_backwards: its rows would come out in reverse order")
        if not all(each.get("return_sequences") is True for _, each in ways):
            if len(ways) == 2:
                raise refused(name, "Bidirectional with return_sequences=False")
            self.last_only = name
        shapes = [shape for kind, each in ways for shape in _shapes(name, kind, each, self._size)]
        inner = ["cell"] if len(ways) == 1 else ["forward_layer/cell", "backward_layer/cell"]
        if len(ways) == 2 and len({tuple(_shapes(name, *each, self._size)) for each in ways}) != 1:
            raise refused(name, "its two directions differ in more than their weights")
        found = self._weights.take(name, class_name, inner, shapes)
        each = len(found) // len(ways)
        layers = [
            _layer(name, kind, settings, found[place * each : (place + 1) * each])
            for place, (kind, settings) in enumerate(ways)
        ]
        layer = layers[0] if len(layers) == 1 else two_ways(*layers, name=name)
        self.model.layers.append(layer)
        self._size = layer.output_size

    def _dense(self, name: str, kind: str, config: Mapping[str, Any], inner: str) -> None:
        if not self.model.layers:
            raise refused(name, "a Dense before the recurrent layers")
        if self.model.head is not None or self._ended:
            raise refused(name, "a second Dense")
        if config.get("quantization_config") or config.get("lora_rank"):
            raise refused(name, "a Dense that is quantised or has LoRA weights")
        _check_policy(name, config)
        units = _size(name, config, "units")
        activation = self._known_activation(name, config.get("activation"))
        shapes: list[Shape] = [(self.model.layers[-1].output_size, units)]
        if _flag(name, config, "use_bias"):
            shapes.append((units,))
        found = self._weights.take(name, kind, [inner], shapes)
        self.model.head = found[0].T.contiguous()
        self.model.head_bias = found[1] if len(found) == 2 else None
        self.model.activation = activation
        self._ended = activation != "none"

    def _activation(self, name: str, kind: str, config: Mapping[str, Any]) -> None:
        if not self.model.layers or self._ended:
            raise refused(name, f"{kind} that is not the last layer")
        if kind == "Softmax":
            if config.get("axis", -1) != -1:
                raise refused(name, f"Softmax along axis {config.get('axis')}")
            self.model.activation = "softmax"
        else:
            self.model.activation = self._known_activation(name, config.get("activation"))
        self._ended = self.model.activation != "none"

    @staticmethod
    def _known_activation(name: str, activation: object) -> str:
        if activation is None:
            return "none"
        if not isinstance(activation, str) or activation not in _ACTIVATIONS:
            raise refused(name, f"activation {activation} is not supported")
        return _ACTIVATIONS[activation]


Shape = tuple[int, ...]


def _inner(name: str, config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A layer within a layer."""
    found = config.get(key)
    if not isinstance(found, dict) or not isinstance(found.get("config"), dict):  # pyright: ignore[reportUnknownMemberType]
        raise refused(name, f"{key} is not a layer")
    table = cast("dict[str, Any]", found)
    if table.get("registered_name") not in (None, table.get("class_name")):
        raise refused(name, f"{table.get('class_name')} is a class of somebody else")
    return table


def _check_policy(name: str, config: Mapping[str, Any]) -> None:
    policy = config.get("dtype")
    if isinstance(policy, dict):
        policy = cast("dict[str, Any]", policy).get("config", {}).get("name")
    whole = config.get("batch_shape") is not None  # an input of tokens may be of any type
    if policy not in (None, "float32") and not whole:
        raise refused(name, f"dtype {policy}, expected float32")


def _size(name: str, config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= SIZE_MAX:
        raise refused(name, f"{key} {value!r}, expected 1 to {SIZE_MAX}")
    return value


def _flag(name: str, config: Mapping[str, Any], key: str) -> bool:
    value = config.get(key)
    if not isinstance(value, bool):
        raise refused(name, f"{key} {value!r}, expected true or false")
    return value


# --- Recurrent layers ----------------------------------------------------------------------------


def _shapes(name: str, kind: str, config: Mapping[str, Any], size: int) -> list[Shape]:
    units = _size(name, config, "units")
    rows = len(GATES[kind]) * units
    shapes: list[Shape] = [(size, rows), (units, rows)]
    if _flag(name, config, "use_bias"):
        both = kind == "GRU" and _flag(name, config, "reset_after")
        shapes.append((2, rows) if both else (rows,))
    return shapes


def _layer(
    name: str, kind: str, config: Mapping[str, Any], found: Sequence[Tensor]
) -> ImportedLayer:
    if config.get("return_state"):
        raise refused(name, "return_state")
    table: dict[str, Any] = {"cell": kind.removeprefix("Simple").lower(), "size": config["units"]}
    weight, recurrent = found[0].T.contiguous(), found[1].T.contiguous()
    rows = weight.shape[0]
    bias = found[2] if len(found) == 3 else torch.zeros(rows)
    activation = config.get("activation")
    if kind == "SimpleRNN":
        if activation not in ("tanh", "relu"):
            raise refused(name, f"activation {activation} is not supported")
        if activation == "relu":
            table["nonlinearity"] = "relu"
        tensors = {"weight_input": weight, "weight_recurrent": recurrent, "bias": bias.clone()}
        return ImportedLayer(name, table, tensors)
    if activation != "tanh":
        raise refused(name, f"activation {activation}, expected tanh")
    gate = config.get("recurrent_activation")
    if gate == "hard_sigmoid":
        table |= {"gate_activation": "hard_sigmoid", "hard_sigmoid_slope": HARD_SIGMOID_SLOPE}
    elif gate != "sigmoid":
        raise refused(name, f"recurrent_activation {gate}, expected sigmoid or hard_sigmoid")
    if kind == "LSTM":
        return ImportedLayer(name, table, lstm_tensors(weight, recurrent, bias, GATES[kind]))
    reset = "after" if _flag(name, config, "reset_after") else "before"
    table["reset"] = reset
    both = (bias[0], bias[1]) if bias.dim() == 2 else (bias, torch.zeros(rows))
    tensors = gru_tensors((weight, recurrent), both, GATES[kind], reset)
    return ImportedLayer(name, table, tensors)
