"""One step of each recurrent cell, in numpy and float64, written from the equations' statement.

Nothing of ours computes here: `layer` only says which options a layer has. Each equation can be got
wrong on request (`mistakes` has the list); the tests show that they would notice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from conveyor_models.layers import GatedLayer, GruLayer, LstmLayer, RecurrentLayer, RnnLayer

Doubles = npt.NDArray[np.float64]
Weights = Mapping[str, Doubles]
Values = dict[str, Doubles]
"""By name: h and c, and the activations of i, f, g, o or r, z, n."""

SWAPS: Final = {
    f"{one} and {other} swapped": (one, other)
    for gates in ("ifgo", "rzn")
    for number, one in enumerate(gates)
    for other in gates[number + 1 :]
}
"""Sums of two gates taken for each other, and the two gates."""


def begin(layer: RecurrentLayer, w: Weights, mistake: str | None) -> Values:
    """The carry before the first step."""
    if layer.initial_state and mistake != "initial state ignored":
        return {name: w[f"initial_{name}"] for name in layer.carry_shapes}
    return {name: np.zeros(shape) for name, shape in layer.carry_shapes.items()}


def step(
    layer: RecurrentLayer, w: Weights, carry: Values, x: Doubles, mistake: str | None
) -> Values:
    """What a step computes: the new carry, and the gates' activations beside it."""
    if mistake == "bias dropped":
        w = {**w, "bias": np.zeros_like(w["bias"])}
    match layer:
        case RnnLayer():
            return _rnn(layer, w, carry, x, mistake)
        case LstmLayer():
            return _lstm(layer, w, carry, x, mistake)
        case GruLayer():
            return _gru(layer, w, carry, x, mistake)
        case _:
            raise AssertionError(layer)


def _rnn(layer: RnnLayer, w: Weights, carry: Values, x: Doubles, mistake: str | None) -> Values:
    # h' = tanh(Wx x + Wh h + b)
    a = w["weight_input"] @ x + w["weight_recurrent"] @ carry["h"] + w["bias"]
    a = _Functions.of(layer, mistake).clipped(a)
    relu = layer.nonlinearity == "relu"
    if mistake == "relu and tanh exchanged":
        relu = not relu
    if mistake == "no nonlinearity":
        return {"h": a}
    return {"h": np.maximum(a, 0.0) if relu else np.tanh(a)}


def _lstm(layer: LstmLayer, w: Weights, carry: Values, x: Doubles, mistake: str | None) -> Values:
    # i = s(Wxi x + Whi h + pi * c + bi)    coupled: i = 1 - f
    # f = s(Wxf x + Whf h + pf * c + bf)
    # g = tanh(Wxg x + Whg h + bg)
    # c' = f * c + i * g
    # o = s(Wxo x + Who h + po * c' + bo)
    # h' = o * tanh(c'), with a projection h' = Wp (o * tanh(c'))
    s = _Functions.of(layer, mistake)
    h, c = carry["h"], carry["c"]
    sums = w["weight_input"] @ x + w["weight_recurrent"] @ h + w["bias"]
    names = "fgo" if layer.coupled else "ifgo"
    a = _swapped(dict(zip(names, np.split(sums, len(names)), strict=True)), mistake)
    p = {gate: _peephole(layer, w, gate, mistake) for gate in ("input", "forget", "output")}
    if mistake == "peepholes of i and f swapped":
        p["input"], p["forget"] = p["forget"], p["input"]
    seen = np.resize(h, c.shape) if mistake == "peepholes see h" else c
    f = s.gate(a["f"] + p["forget"] * seen)
    if not layer.coupled:
        i = s.gate(a["i"] + p["input"] * seen)
    elif mistake == "coupled i is f":
        i = f
    else:
        i = 1 - f
    if mistake == "coupled i and f swapped":
        i, f = f, i
    g = s.candidate(a["g"])
    new = f * c + i * g
    seen = np.resize(h, c.shape) if mistake == "peepholes see h" else new
    o = s.gate(a["o"] + p["output"] * (c if mistake == "peephole of o sees the old c" else seen))
    shown = c if mistake == "old c shown" else new
    y = o * (shown if mistake == "c shown without tanh" else np.tanh(shown))
    if layer.projection is not None:
        y = _projected(w["weight_projection"], y, mistake)
    return {"i": i, "f": f, "g": g, "o": o, "c": new, "h": y}


def _peephole(layer: LstmLayer, w: Weights, gate: str, mistake: str | None) -> Doubles:
    if gate not in layer.peepholes or mistake == f"peephole of {gate[0]} dropped":
        return np.zeros(layer.size)
    return w[f"peephole_{gate}"]


def _projected(wp: Doubles, y: Doubles, mistake: str | None) -> Doubles:
    match mistake:
        case "projection transposed":
            return y @ wp.reshape(wp.shape[1], wp.shape[0])
        case "projection omitted":
            return y[: len(wp)]
        case _:
            return wp @ y


def _gru(layer: GruLayer, w: Weights, carry: Values, x: Doubles, mistake: str | None) -> Values:
    # r = s(Wxr x + Whr h + br)
    # z = s(Wxz x + Whz h + bz)
    # n = tanh(Wxn x + bxn + r * (Whn h + bhn))     reset after
    # n = tanh(Wxn x + Whn (r * h) + bn)            reset before
    # h' = (1 - z) * n + z * h
    s = _Functions.of(layer, mistake)
    h = carry["h"]
    ax = dict(zip("rzn", np.split(w["weight_input"] @ x + w["bias"], 3), strict=True))
    wh = dict(zip("rzn", np.split(w["weight_recurrent"], 3), strict=True))
    ax, wh = _swapped(ax, mistake), _swapped(wh, mistake)
    r = s.gate(ax["r"] + wh["r"] @ h)
    z = s.gate(ax["z"] + wh["z"] @ h)
    bhn = w.get("bias_recurrent", np.zeros(layer.size))
    if mistake == "recurrent bias of n dropped":
        bhn = np.zeros_like(bhn)
    scale = np.ones_like(r) if mistake == "reset omitted" else r
    before = layer.reset == "before"
    if mistake == "reset before and after exchanged":
        before = not before
    if before:
        n = ax["n"] + wh["n"] @ (scale * h) + bhn
    elif mistake == "recurrent bias of n outside r":
        n = ax["n"] + scale * (wh["n"] @ h) + bhn
    else:
        n = ax["n"] + scale * (wh["n"] @ h + bhn)
    n = s.candidate(n)
    kept = 1 - z if mistake == "z and 1 - z swapped" else z
    return {"r": r, "z": z, "n": n, "h": (1 - kept) * n + kept * h}


def _swapped(sums: Values, mistake: str | None) -> Values:
    one, other = SWAPS.get(mistake or "", ("", ""))
    if one not in sums or other not in sums:
        return sums
    return {**sums, one: sums[other], other: sums[one]}


@dataclass(frozen=True)
class _Functions:
    """What turns sums into activations: s and tanh of the equations."""

    slope: float | None
    clip: float | None
    mistake: str | None

    @classmethod
    def of(cls, layer: RecurrentLayer, mistake: str | None) -> _Functions:
        slope = None
        if isinstance(layer, GatedLayer):
            hard = layer.gate_activation == "hard_sigmoid"
            if mistake == "logistic and hard sigmoid exchanged":
                hard = not hard
            slope = layer.hard_sigmoid_slope if hard else None
        return cls(slope, layer.clip, mistake)

    def gate(self, a: Doubles) -> Doubles:
        a = self.clipped(a)
        if self.slope is None:
            return logistic(a)
        wrong = self.mistake == "slope of the hard sigmoid wrong"
        a = (1.2 * self.slope if wrong else self.slope) * a + 0.5
        # Without the upper limit a state may grow beyond all bounds, which is no test of anything.
        lower = -np.inf if self.mistake == "hard sigmoid without its lower limit" else 0.0
        return np.clip(a, lower, 1.0)

    def candidate(self, a: Doubles) -> Doubles:
        if self.mistake != "candidate not clipped":
            a = self.clipped(a)
        match self.mistake:
            case "candidate without tanh":
                return a
            case "candidate of half the slope":
                return np.tanh(a / 2)
            case _:
                return np.tanh(a)

    def clipped(self, a: Doubles) -> Doubles:
        if self.clip is None or self.mistake == "clip ignored":
            return a
        return np.clip(a, -self.clip, self.clip)


def logistic(a: npt.NDArray[Any]) -> Doubles:
    """1 / (1 + exp(-a)), without overflow."""
    return np.exp(-np.logaddexp(0, -a))
