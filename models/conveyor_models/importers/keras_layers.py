"""Keras: what the JSON of a model says in the bundle's terms, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, cast

from conveyor_models.importers.common import ImportedModel, refused, two_ways
from conveyor_models.importers.folding import chained, linear, note_of
from conveyor_models.importers.keras_affine import batch_normalization, normalization, rescaling
from conveyor_models.importers.keras_cells import (
    GATES,
    NO_PLACE,
    activation_of,
    cell_shapes,
    flag_of,
    recurrent_layer,
    size_of,
)
from conveyor_models.importers.keras_flow import Flow, model_of, side_by_side
from conveyor_models.importers.keras_graph import Call, calls_of
from conveyor_models.importers.keras_weights import WeightSource
from conveyor_models.spec import Shape

_ACTIVATIONS: Final = {
    "linear": "none",
    "softmax": "softmax",
    "log_softmax": "log_softmax",
    "sigmoid": "sigmoid",
}
_IDLE: Final = (
    "ActivityRegularization",
    "Dropout",
    "SpatialDropout1D",
    "AlphaDropout",
    "GaussianNoise",
    "GaussianDropout",
    "Identity",
)
"""Layers that do nothing after training."""
_AFFINE: Final = {
    "Normalization": normalization,
    "BatchNormalization": batch_normalization,
    "Rescaling": rescaling,
}
_ALL: Final = {"start": None, "stop": None, "step": None}
_BACKWARDS: Final = {**_ALL, "step": -1}


def keras_model(config: Mapping[str, Any], weights: WeightSource, version: int) -> ImportedModel:
    """The network that a Sequential or a Functional model is.

    Args:
        config: its structure.
        weights: its weights.
        version: of Keras, 2 or 3.

    Raises:
        UnsupportedModuleError: it has something that a bundle cannot express.
    """
    calls, outputs = calls_of(config)
    inputs = [call.name for call in calls if call.kind == "InputLayer"]
    if len(inputs) != 1:
        raise refused("model", f"has {len(inputs)} inputs, expected one")
    reader = _Reader(weights, version)
    for call in calls:
        reader.read(call)
    weights.finish()
    flows = [reader.flow(name, "model") for name in outputs]
    if len(flows) > 1:
        sizes = ", ".join(
            f"{name} has {flow.size}" for name, flow in zip(outputs, flows, strict=True)
        )
        reader.notes.append(f"{len(flows)} outputs side by side in one row, in this order: {sizes}")
        folded = [chained(flow.maps) for flow in flows if len(flow.maps) > 1]
        reader.notes += [note_of(affine, "the head") for affine in folded]
    return model_of(side_by_side("model", outputs, flows), reader.notes)


class _Reader:
    """Reads layers one after the other."""

    def __init__(self, weights: WeightSource, version: int) -> None:
        self.notes: list[str] = []
        self._weights = weights
        self._version = version
        self._flows: dict[str, Flow] = {}

    def flow(self, name: str, reader: str) -> Flow:
        """The rows that a layer puts out."""
        if name not in self._flows:
            raise refused(reader, f"reads {name}, which does not come before it")
        return self._flows[name]

    def read(self, call: Call) -> None:
        name, kind, config = call.name, call.kind, call.config
        module = call.table.get("module")
        if call.table.get("registered_name") not in (None, kind) or (
            isinstance(module, str) and module.partition(".")[0] not in ("keras", "tensorflow")
        ):
            raise refused(name, f"{kind} is a class of somebody else")
        if name in self._flows:
            raise refused(name, "two layers have this name")
        if kind == "InputLayer":
            self._flows[name] = _input(name, config)
            return
        _check_policy(name, config)
        flows = [self.flow(source, name) for source in call.sources]
        if kind == "Concatenate":
            if config.get("axis") not in (-1, 2):
                raise refused(name, f"Concatenate along axis {config.get('axis')}")
            self._flows[name] = side_by_side(name, call.sources, flows)
            return
        if len(flows) != 1:
            raise refused(name, f"{kind} reads {' and '.join(call.sources[:4]) or 'nothing'}")
        self._flows[name] = self._next(call, flows[0])

    def _next(self, call: Call, flow: Flow) -> Flow:
        name, kind, config = call.name, call.kind, call.config
        if kind in _IDLE:
            return flow
        if kind in GATES:
            return self._recurrent(name, kind, flow, [(kind, config)])
        if kind == "Bidirectional":
            return self._bidirectional(name, config, flow)
        if kind in ("Flip", "GetItem"):
            return _flipped(call, flow) if kind == "Flip" else _sliced(call, flow)
        if kind == "Embedding":
            return self._embedding(name, config, flow)
        if kind == "TimeDistributed":
            inner = _inner(name, config, "layer")
            _check_policy(name, inner["config"])
            return self._each_row(name, str(inner.get("class_name")), inner["config"], flow, kind)
        return self._each_row(name, kind, config, flow, "")

    def _each_row(
        self, name: str, kind: str, config: Mapping[str, Any], flow: Flow, wrapper: str
    ) -> Flow:
        """What a layer does to each row by itself."""
        if kind in _IDLE:
            return flow
        if kind in ("Activation", "Softmax"):
            return self._activation(name, kind, config, flow)
        if kind == "Dense":
            return self._dense(name, config, flow, wrapper)
        if kind in _AFFINE:
            _check_open(name, flow)
            size = _stated(name, flow)
            affine = _AFFINE[kind](
                name,
                config,
                size,
                lambda shapes, unread: self._weights.take(
                    name, wrapper or kind, ["layer" if wrapper else ""], shapes, unread
                ),
                -1 if flow.row else 2,
            )
            return flow.mapped(affine)
        if kind in ("Sequential", "Functional", "Model"):
            raise refused(name, "a model within the model; build one flat model and save that")
        wrapped = f"TimeDistributed of {kind}" if wrapper else kind
        raise refused(name, f"{wrapped} is not supported")

    def _embedding(self, name: str, config: Mapping[str, Any], flow: Flow) -> Flow:
        if flow.size is not None or flow.embedding is not None or flow.layers:
            raise refused(name, "an Embedding that is not the first layer")
        if config.get("mask_zero"):
            raise refused(name, "mask_zero: steps that are passed over are not supported")
        if config.get("lora_rank") or config.get("quantization_config"):
            raise refused(name, "an Embedding that is quantised or has LoRA weights")
        shape = size_of(name, config, "input_dim"), size_of(name, config, "output_dim")
        (table,) = self._weights.take(name, "Embedding", [""], [shape])
        return replace(flow, embedding=table, size=shape[1])

    def _bidirectional(self, name: str, config: Mapping[str, Any], flow: Flow) -> Flow:
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
        if ways[0][1].get("go_backwards") is not False:
            raise refused(name, "go_backwards: its forward layer runs backwards")
        if flow.flipped:
            raise refused(name, f"Bidirectional of rows that {flow.flipped} puts in reverse order")
        return self._recurrent(name, "Bidirectional", flow, ways)

    def _recurrent(
        self,
        name: str,
        class_name: str,
        flow: Flow,
        ways: Sequence[tuple[str, Mapping[str, Any]]],
    ) -> Flow:
        if flow.row:
            raise refused(flow.row_of, "return_sequences=False, below another recurrent layer")
        _check_open(name, flow)
        size = _stated(name, flow)
        whole = all(each.get("return_sequences") is True for _, each in ways)
        if not whole and len(ways) == 2:
            raise refused(
                name,
                "Bidirectional with return_sequences=False: its two halves end at different steps,"
                " and a bundle gives a row for each step",
            )
        shapes = [cell_shapes(name, kind, each, size) for kind, each in ways]
        if shapes[0] != shapes[-1]:
            raise refused(name, "its two directions differ in more than their weights")
        inner = _INNER[len(ways)]
        if ways[0][0].startswith("CuDNN"):
            inner = [part.removesuffix("cell").removesuffix("/") for part in inner]
        every = [shape for each in shapes for shape in each]
        found = self._weights.take(name, class_name, inner, every)
        each = len(found) // len(ways)
        layers = [
            recurrent_layer(
                name, kind, config, found[place * each : (place + 1) * each], self._version
            )
            for place, (kind, config) in enumerate(ways)
        ]
        if len(layers) == 2:
            return flow.through(two_ways(*layers, name=name), self.notes)
        backwards = flag_of(name, ways[0][1], "go_backwards")
        if backwards:
            flow = replace(flow, flipped="" if flow.flipped else name)
        table = layers[0].table | ({"direction": "reverse"} if flow.flipped else {})
        flow = flow.through(replace(layers[0], table=table), self.notes)
        if whole:
            return flow
        return replace(flow, row="first" if flow.flipped else "last", row_of=name, flipped="")

    def _dense(self, name: str, config: Mapping[str, Any], flow: Flow, wrapper: str) -> Flow:
        _check_open(name, flow)
        if config.get("quantization_config") or config.get("lora_rank"):
            raise refused(name, "a Dense that is quantised or has LoRA weights")
        size, units = _stated(name, flow), size_of(name, config, "units")
        activation = _known_activation(name, config.get("activation"), " of a Dense layer")
        biased = flag_of(name, config, "use_bias")
        shapes: list[Shape] = [(size, units), (units,)][: 1 + biased]
        inner = "layer" if wrapper else ""
        found = self._weights.take(name, wrapper or "Dense", [inner], shapes)
        affine = linear(name, found[0].T, found[1] if biased else None)
        return _ended(name, flow.mapped(affine, biased=biased), activation)

    def _activation(self, name: str, kind: str, config: Mapping[str, Any], flow: Flow) -> Flow:
        if kind == "Activation":
            activation = _known_activation(name, config.get("activation"), "")
        elif config.get("axis", -1) != -1:
            raise refused(name, f"Softmax along axis {config.get('axis')}")
        else:
            activation = "softmax"
        if activation != "none":
            _check_open(name, flow)
        return _ended(name, flow, activation)


_INNER: Final = {1: ["cell"], 2: ["forward_layer/cell", "backward_layer/cell"]}
"""Where the weights of one and of two directions lie within their layer."""


def _input(name: str, config: Mapping[str, Any]) -> Flow:
    shape = config.get("batch_shape") or config.get("batch_input_shape")
    if config.get("sparse") or config.get("ragged"):
        raise refused(name, "InputLayer of an unusual kind")
    sizes = cast("list[object]", shape) if isinstance(shape, list) else []
    size = sizes[2] if len(sizes) == 3 else None
    kind = config.get("dtype")
    if size is not None and kind not in (None, "float32", "float64"):
        raise refused(name, f"dtype {kind} of its features rounds them, expected float32")
    return Flow(name, size if isinstance(size, int) and size >= 1 else None)


def _stated(name: str, flow: Flow) -> int:
    if flow.size is None:
        raise refused(name, "the size of what it reads is not stated")
    return flow.size


def _check_open(name: str, flow: Flow) -> None:
    if flow.ended:
        raise refused(
            flow.ended, f"activation {flow.activation}, and {name} comes after it: {NO_PLACE}"
        )


def _ended(name: str, flow: Flow, activation: str) -> Flow:
    return flow if activation == "none" else replace(flow, activation=activation, ended=name)


def _known_activation(name: str, given: object, where: str) -> str:
    activation = activation_of(given)
    if activation not in _ACTIVATIONS:
        raise refused(name, f"activation {activation}{where}: {NO_PLACE}")
    return _ACTIVATIONS[activation]


def _flipped(call: Call, flow: Flow) -> Flow:
    axis = call.config.get("axis")
    if flow.row or axis not in (1, [1]):
        raise refused(call.name, f"Flip along axis {axis}, expected that of the steps, 1")
    return replace(flow, flipped="" if flow.flipped else call.name)


def _sliced(call: Call, flow: Flow) -> Flow:
    """rows[:, ::-1], rows[:, -1] and rows[:, 0]."""
    keys: list[object] = []
    for each in call.arguments:
        keys += cast("list[object]", each) if isinstance(each, list) else [each]
    keys = [_slice(each) for each in keys]
    if not flow.row and len(keys) in (2, 3) and keys[0] == _ALL and keys[2:] in ([], [_ALL]):
        if keys[1] == _BACKWARDS:
            return replace(flow, flipped="" if flow.flipped else call.name)
        if type(keys[1]) is int and keys[1] in (-1, 0):
            last = (keys[1] == -1) != bool(flow.flipped)
            return replace(flow, row="last" if last else "first", row_of=call.name, flipped="")
    raise refused(call.name, "a slice other than [:, ::-1], [:, -1] and [:, 0]")


def _slice(key: object) -> object:
    """The start, stop and step of a slice; any other key as it is."""
    if not isinstance(key, dict):
        return key
    table = cast("dict[str, object]", key)
    return table.get("config") if table.get("class_name") == "__slice__" else table


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
    if policy not in (None, "float32"):
        raise refused(name, f"dtype {policy}, expected float32")
