"""Whole models in numpy and float64, written from the equations and from nothing of ours.

`reference_cells` has the cells. Each equation can be got wrong on request: `mistakes` has the list,
and the tests show that they would notice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from conveyor_models import ModelSpec
from conveyor_models.layers import RecurrentLayer
from tests.fidelity import reference_cells as cells
from tests.fidelity.reference_cells import Doubles, Values, Weights, logistic

PADDING_ROWS = 3
"""Rows that the mistake of attending over padding adds to a memory."""


@dataclass(frozen=True)
class Followed:
    """All that is computed on the way through some steps of one session."""

    outputs: Doubles
    """[T, O]"""
    layers: list[Values]
    """For each layer h, c and the gates' activations, [T, units]; of a layer that runs from the
    end, or both ways, only h."""
    attention: Doubles | None
    """w, [T, M]"""


def run(
    spec: ModelSpec,
    weights: Mapping[str, Tensor],
    rows: npt.NDArray[Any],
    memory: npt.NDArray[Any] | None = None,
    mistake: str | None = None,
) -> Doubles:
    """The outputs of one session from its beginning: rows [T] or [T, F] -> [T, O].

    A model with attention needs a memory [M, A].
    """
    return follow(spec, weights, rows, memory, mistake).outputs


def follow(
    spec: ModelSpec,
    weights: Mapping[str, Tensor],
    rows: npt.NDArray[Any],
    memory: npt.NDArray[Any] | None = None,
    mistake: str | None = None,
) -> Followed:
    """`run`, and what happened on the way."""
    w = {name: tensor.numpy().astype(np.float64) for name, tensor in weights.items()}
    x = w["embedding.weight"][rows] if "embedding.weight" in w else rows.astype(np.float64)
    numbers = list(range(len(spec.layers)))
    if mistake == "layer order swapped":
        numbers.reverse()
    stack = [(spec.layers[number], _within(w, f"layers.{number}.")) for number in numbers]
    if spec.attention is None:
        layers: list[Values] = []
        for layer, of_layer in stack:
            layers.append(_sequence(layer, of_layer, x, mistake))
            x = layers[-1]["h"]
        return Followed(_output(spec, w, x, mistake), layers, None)
    assert memory is not None
    attention = _Attention(_within(w, "attention."), memory.astype(np.float64), mistake)
    layers, zs, ws = _attending(stack, attention, x, mistake)
    y = layers[-1]["h"]
    if spec.attention.head:
        y = np.concatenate((y, 0 * zs if mistake == "z not fed to the head" else zs), axis=1)
    return Followed(_output(spec, w, y, mistake), layers, ws)


def _within(w: Weights, prefix: str) -> Values:
    return {name.removeprefix(prefix): each for name, each in w.items() if name.startswith(prefix)}


# --- a layer over a whole sequence ---


def _sequence(layer: RecurrentLayer, w: Weights, x: Doubles, mistake: str | None) -> Values:
    match layer.direction:
        case "forward":
            return _forward(layer, w, x, mistake)
        case "reverse":
            return {"h": _backward(layer, w, x, mistake)}
        case "bidirectional":
            back = w if mistake == "one direction's weights for both" else _within(w, "reverse.")
            halves = _forward(layer, w, x, mistake)["h"], _backward(layer, back, x, mistake)
            if mistake == "halves swapped":
                halves = halves[::-1]
            return {"h": np.concatenate(halves, axis=1)}


def _backward(layer: RecurrentLayer, w: Weights, x: Doubles, mistake: str | None) -> Doubles:
    if mistake == "direction not reversed":
        return _forward(layer, w, x, mistake)["h"]
    y = _forward(layer, w, x[::-1], mistake)["h"]
    return y if mistake == "outputs left in reverse" else y[::-1]


def _forward(layer: RecurrentLayer, w: Weights, x: Doubles, mistake: str | None) -> Values:
    carry = cells.begin(layer, w, mistake)
    values: list[Values] = []
    for row in x:
        values.append(cells.step(layer, w, carry, row, mistake))
        carry = _carried(layer, values[-1], mistake)
    return _stacked(values)


def _carried(layer: RecurrentLayer, values: Values, mistake: str | None) -> Values:
    forgotten = mistake == "carry forgotten"
    return {n: np.zeros_like(values[n]) if forgotten else values[n] for n in layer.carry_shapes}


def _stacked(values: list[Values]) -> Values:
    return {name: np.stack([each[name] for each in values]) for name in values[0]}


# --- attention ---


@dataclass(frozen=True)
class _Attention:
    w: Values
    rows: Doubles
    mistake: str | None

    def read(self, h: Doubles) -> tuple[Doubles, Doubles]:
        """h of the top layer -> z, w."""
        # e_m = v . tanh(Wa h + Ua a_m + ba)
        # w = softmax(e) over the rows that exist
        # z = sum_m w_m a_m, scaled by s(Wb h + bb) where there is a gate
        rows = self.rows
        if self.mistake == "softmax over padding rows":
            rows = np.concatenate((rows, np.zeros((PADDING_ROWS, rows.shape[1]))))
        bias = 0.0 if self.mistake == "keys without bias" else self.w["bias"]
        compared = self.w["weight_query"] @ h + rows @ self.w["weight_memory"].T + bias
        e = (compared if self.mistake == "score without tanh" else np.tanh(compared)) @ self.w[
            "score"
        ]
        w = softmax(e[None])[0]
        if self.mistake == "all rows weighted alike":
            w = np.full_like(w, 1 / len(w))
        z = (w[::-1] if self.mistake == "rows in reverse" else w) @ rows
        if "weight_gate" in self.w and self.mistake != "attention gate omitted":
            z = logistic(self.w["weight_gate"] @ h + self.w["bias_gate"]) * z
        return z, w[: len(self.rows)]


def _attending(
    stack: list[tuple[RecurrentLayer, Values]],
    attention: _Attention,
    x: Doubles,
    mistake: str | None,
) -> tuple[list[Values], Doubles, Doubles]:
    carries = [cells.begin(layer, w, mistake) for layer, w in stack]
    before = carries[-1]["h"]
    steps: list[tuple[list[Values], Doubles, Doubles]] = []
    for row in x:
        h = carries[-1]["h"]
        asking = h
        if mistake == "asked by the h before":
            asking = before
        if mistake == "asked by the bottom layer":
            asking = np.resize(carries[0]["h"], h.shape)
        z, w = attention.read(asking)
        values = _climb(stack, carries, row, z, mistake)
        if mistake == "asked by the new h":
            z, w = attention.read(values[-1]["h"])
            values = _climb(stack, carries, row, z, mistake)
        steps.append((values, z, w))
        before = h
        carries = [_carried(layer, v, mistake) for (layer, _), v in zip(stack, values, strict=True)]
    layers = [_stacked([values[n] for values, _, _ in steps]) for n in range(len(stack))]
    return layers, np.stack([z for _, z, _ in steps]), np.stack([w for _, _, w in steps])


def _climb(
    stack: list[tuple[RecurrentLayer, Values]],
    carries: list[Values],
    row: Doubles,
    z: Doubles,
    mistake: str | None,
) -> list[Values]:
    """One step of all layers."""
    if mistake == "z not fed to the stack":
        z = 0 * z
    x = np.concatenate((z, row) if mistake == "[z ; x] fed" else (row, z))
    values: list[Values] = []
    for (layer, w), carry in zip(stack, carries, strict=True):
        values.append(cells.step(layer, w, carry, x, mistake))
        x = values[-1]["h"]
    return values


# --- the top ---


def _output(spec: ModelSpec, w: Weights, y: Doubles, mistake: str | None) -> Doubles:
    if "head.weight" in w:
        y = y @ w["head.weight"].T
        if "head.bias" in w and mistake != "head bias dropped":
            y = y + w["head.bias"]
    match spec.output.activation:
        case _ if mistake == "activation omitted":
            return y
        case "none":
            return y
        case "sigmoid":
            return logistic(y)
        case "softmax":
            return softmax(y)
        case "log_softmax":
            return np.log(softmax(y))


def softmax(y: Doubles) -> Doubles:
    """Over the last axis of [T, O]."""
    y = np.exp(y - y.max(axis=1, keepdims=True))
    return y / y.sum(axis=1, keepdims=True)


def error(out: npt.NDArray[Any], ref: npt.NDArray[Any]) -> float:
    """norm(out - ref) / norm(ref); of zeros (a dead relu's), norm(out)."""
    norm = float(np.linalg.norm(ref)) or 1.0
    return float(np.linalg.norm(out.astype(np.float64) - ref)) / norm
