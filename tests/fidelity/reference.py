"""The LSTM's equations once more, in numpy and float64, written from their statement and from
nothing of ours.

Each equation can be got wrong on request: the tests show that they would notice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from torch import Tensor

from conveyor_models import ModelSpec

Doubles = npt.NDArray[np.float64]
Mistake = Literal[
    "gates i and f swapped",
    "candidate without tanh",
    "candidate of half the slope",
    "old c shown",
    "forget bias dropped",
    "projection transposed",
    "projection omitted",
    "layer order swapped",
    "carry forgotten",
]


def run(
    spec: ModelSpec,
    weights: Mapping[str, Tensor],
    rows: npt.NDArray[Any],
    mistake: Mistake | None = None,
) -> Doubles:
    """The outputs of one session from its beginning: rows [T] or [T, F] -> [T, O]."""
    w = {name: tensor.numpy().astype(np.float64) for name, tensor in weights.items()}
    x = w["embedding.weight"][rows] if "embedding.weight" in w else rows.astype(np.float64)
    numbers = list(range(len(spec.layers)))
    if mistake == "layer order swapped":
        numbers.reverse()
    for number in numbers:
        x = _layer({name: w.get(f"layers.{number}.{name}") for name in _NAMES}, x, mistake)
    if "head.weight" in w:
        x = x @ w["head.weight"].T + w.get("head.bias", 0.0)
    return _activate(x, spec.output.activation)


_NAMES = ("weight_input", "weight_recurrent", "bias", "weight_projection")


def _layer(w: Mapping[str, Doubles | None], x: Doubles, mistake: Mistake | None) -> Doubles:
    wx, wh, b, wp = (w[name] for name in _NAMES)
    assert wx is not None
    assert wh is not None
    assert b is not None
    size = len(b) // 4
    if mistake == "forget bias dropped":
        b = b.copy()
        b[size : 2 * size] = 0
    c, h = np.zeros(size), np.zeros(wh.shape[1])
    outputs = np.empty((len(x), len(h)))
    for t, row in enumerate(x):
        a = wx @ row + wh @ h + b
        i, f, g, o = (a[k * size : (k + 1) * size] for k in range(4))
        if mistake == "gates i and f swapped":
            i, f = f, i
        i, f, o = _logistic(i), _logistic(f), _logistic(o)
        match mistake:
            case "candidate without tanh":
                pass
            case "candidate of half the slope":
                g = np.tanh(g / 2)
            case _:
                g = np.tanh(g)
        before, c = c, f * c + i * g
        h = o * np.tanh(before if mistake == "old c shown" else c)
        if wp is not None:
            h = _project(wp, h, mistake)
        outputs[t] = h
        if mistake == "carry forgotten":
            c, h = np.zeros_like(c), np.zeros_like(h)
    return outputs


def _project(wp: Doubles, h: Doubles, mistake: Mistake | None) -> Doubles:
    match mistake:
        case "projection transposed":
            return h @ wp.reshape(wp.shape[1], wp.shape[0])
        case "projection omitted":
            return h[: len(wp)]
        case _:
            return wp @ h


def _logistic(a: Doubles) -> Doubles:
    return np.exp(-np.logaddexp(0, -a))  # 1 / (1 + exp(-a)), without overflow


def _activate(y: Doubles, activation: str) -> Doubles:
    if activation == "sigmoid":
        return _logistic(y)
    if activation == "none":
        return y
    y = y - y.max(axis=1, keepdims=True)
    log = y - np.log(np.exp(y).sum(axis=1, keepdims=True))
    return log if activation == "log_softmax" else np.exp(log)


def error(out: npt.NDArray[Any], ref: npt.NDArray[Any]) -> float:
    """norm(out - ref) / norm(ref)"""
    return float(np.linalg.norm(out.astype(np.float64) - ref) / np.linalg.norm(ref))
