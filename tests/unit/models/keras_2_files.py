"""Writes a model of Keras 3 in the formats of Keras 2, which cannot be installed beside it.

The HDF5 layout, the names in the structure and the layout of cuDNN's weights are those that Keras 2
documents; the numbers stay those of the model, so Keras 3 can be the judge of what is read.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np

VERSION = "2.15.0"
CUDNN = "cudnn"
"""Layers whose names begin so are written as CuDNNLSTM and CuDNNGRU."""
_GONE = ("seed", "zero_output_for_mask", "quantization_config", "optional")


def write(model: Any, path: Path) -> None:
    """The whole model, as .h5 or as .keras."""
    config = json.dumps(_structure(model))
    if path.suffix == ".h5":
        with h5py.File(path, "w") as file:
            file.attrs["keras_version"] = VERSION
            file.attrs["backend"] = "tensorflow"
            file.attrs["model_config"] = config
            _legacy(model, file.create_group("model_weights"))
        return
    weights = io.BytesIO()
    with h5py.File(weights, "w") as file:
        _archive(model, file)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("metadata.json", json.dumps({"keras_version": VERSION}))
        archive.writestr("config.json", config)
        archive.writestr("model.weights.h5", weights.getvalue())


def write_weights(model: Any, path: Path) -> None:
    """What `save_weights` wrote."""
    with h5py.File(path, "w") as file:
        file.attrs["keras_version"] = VERSION
        _legacy(model, file)


# --- Structure -----------------------------------------------------------------------------------


def _structure(model: Any) -> dict[str, Any]:
    whole = json.loads(model.to_json())
    inner = whole["config"]
    layers = [_layer(each) for each in inner["layers"]]
    config: dict[str, Any] = {"name": inner["name"], "layers": layers}
    for key in ("input_layers", "output_layers"):
        if key in inner:
            places = inner[key]
            config[key] = [places] if isinstance(places[0], str) else places
    return {"class_name": whole["class_name"], "config": config}


def _layer(given: dict[str, Any]) -> dict[str, Any]:
    kind, config = given["class_name"], dict(given["config"])
    for key in _GONE:
        config.pop(key, None)
    config["dtype"] = "float32"
    if "batch_shape" in config:
        config["batch_input_shape"] = config.pop("batch_shape")
    for key in ("layer", "backward_layer"):
        if isinstance(config.get(key), dict):
            config[key] = _layer(config[key])
            if config["name"].startswith(CUDNN):
                config[key] = _of_cudnn(config[key])
    if kind in ("LSTM", "GRU", "SimpleRNN"):
        config |= {"time_major": False, "implementation": 2}
        if isinstance(config.get("recurrent_activation"), dict):
            config["recurrent_activation"] = "hard_sigmoid"
    if kind == "BatchNormalization":
        config["axis"] = [2]
    made: dict[str, Any] = {"class_name": kind, "config": config}
    if config["name"].startswith(CUDNN) and kind in ("LSTM", "GRU"):
        made = _of_cudnn(made)
    if "inbound_nodes" in given:
        made["name"] = given["name"]
        made["inbound_nodes"] = [
            [[*place, {}] for place in _histories(node["args"])] for node in given["inbound_nodes"]
        ]
    return made


def _of_cudnn(made: dict[str, Any]) -> dict[str, Any]:
    kept = ("name", "units", "return_sequences", "return_state", "go_backwards", "stateful")
    config = {key: made["config"][key] for key in kept}
    return {"class_name": f"CuDNN{made['class_name']}", "config": config}


def _histories(value: Any) -> list[list[Any]]:
    if isinstance(value, list):
        return [each for item in value for each in _histories(item)]
    return [value["config"]["keras_history"]] if isinstance(value, dict) else []


# --- Weights -------------------------------------------------------------------------------------


def _legacy(model: Any, group: Any) -> None:
    """Of `model_weights`: the names in order, and a dataset for each."""
    group.attrs["layer_names"] = [layer.name.encode() for layer in model.layers]
    group.attrs["backend"] = b"tensorflow"
    for layer in model.layers:
        inside = group.create_group(layer.name)
        names: list[bytes] = []
        for variable, value in _weights(layer):
            name = f"{layer.name}/{variable}:0"
            inside[name] = value
            names.append(name.encode())
        inside.attrs["weight_names"] = names


def _archive(model: Any, file: Any) -> None:
    """Layers that have weights are counted twice, of which only the first is written."""
    used: dict[str, int] = {}
    for layer in model.layers:
        kind = type(layer).__name__
        if layer.name.startswith(CUDNN) and kind in ("LSTM", "GRU"):
            kind = f"CuDNN{kind}"
        snake = re.sub(r"([a-z])([A-Z])", r"\1_\2", re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", kind))
        found = _weights(layer)
        for time in range(2 if found else 1):
            number = used.get(snake, -1) + 1
            used[snake] = number
            if time == 0:
                name = snake.lower() + (f"_{number}" if number else "")
                group = file.create_group(f"_layer_checkpoint_dependencies/{name}")
                _variables(group, layer, [value for _, value in found])


def _variables(group: Any, layer: Any, values: list[Any]) -> None:
    cudnn = layer.name.startswith(CUDNN)
    inner = {
        "LSTM": ["" if cudnn else "cell"],
        "GRU": ["" if cudnn else "cell"],
        "TimeDistributed": ["layer"],
        "Bidirectional": [
            f"{way}_layer{'' if cudnn else '/cell'}" for way in ("forward", "backward")
        ],
    }.get(type(layer).__name__, [""])
    each = len(values) // len(inner)
    for place, part in enumerate(inner):
        for number in range(each):
            path = "/".join(filter(None, (part, "vars", str(number))))
            group[path] = values[place * each + number]


def _weights(layer: Any) -> list[tuple[str, Any]]:
    """Path within the layer and value, in the order of Keras 2."""
    found = [
        (each.path.split("/", 1)[-1].replace("cell/", "lstm_cell/"), np.asarray(each.numpy()))
        for each in layer.weights
        if "seed" not in each.path
    ]
    if not layer.name.startswith(CUDNN):
        return found
    gates = 3 if "gru" in layer.name else 4
    return [(name, _as_cudnn(name, value, gates)) for name, value in found]


def _as_cudnn(name: str, value: Any, gates: int) -> Any:
    """Keras 2's own rule: each block transposed, and read again in the shape it had."""
    if name.endswith("recurrent_kernel"):
        return np.hstack([block.T for block in np.hsplit(value, gates)])
    if name.endswith("kernel"):
        return np.hstack(
            [block.T.reshape(block.shape, order="C") for block in np.hsplit(value, gates)]
        )
    if value.ndim == 2:  # a GRU's two biases
        return value.reshape(-1)
    part = np.random.default_rng(0).normal(0, 1, value.shape).astype(np.float32)
    return np.concatenate([value - part, part])
