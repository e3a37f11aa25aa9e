"""Models drawn by Hypothesis: any stack of any layers, with attention and without."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from conveyor_models import ModelSpec
from tests.fidelity.networks import make_spec

sizes = st.one_of(st.integers(1, 40), st.sampled_from([1, 3, 17, 31, 32, 33, 63, 64, 65, 100]))
memory_lengths = st.one_of(
    st.integers(1, 70), st.sampled_from([1, 2, 31, 32, 33, 63, 64, 65, 128, 129])
)


@st.composite
def _layers(draw: st.DrawFn, directions: tuple[str, ...]) -> dict[str, Any]:
    size = draw(sizes)
    layer: dict[str, Any] = {
        "cell": draw(st.sampled_from(["rnn", "lstm", "lstm", "gru"])),
        "size": size,
        "initial_state": draw(st.booleans()),
        "clip": draw(st.sampled_from([None, None, 0.5, 3.0])),
        "direction": draw(st.sampled_from(directions)),
    }
    if layer["cell"] == "rnn":
        return layer | {"nonlinearity": draw(st.sampled_from(["tanh", "relu"]))}
    if draw(st.booleans()):
        layer |= {"gate_activation": "hard_sigmoid", "hard_sigmoid_slope": 0.3}
    if layer["cell"] == "gru":
        return layer | {"reset": draw(st.sampled_from(["before", "after"]))}
    if size > 1 and draw(st.booleans()):
        layer["projection"] = draw(st.integers(1, size - 1))
    layer["coupled"] = draw(st.booleans())
    gates = ["forget", "output"] if layer["coupled"] else ["input", "forget", "output"]
    return layer | {"peepholes": draw(st.lists(st.sampled_from(gates), unique=True))}


@st.composite
def _attentions(draw: st.DrawFn, head: bool) -> dict[str, Any]:
    return {
        "memory_size": draw(sizes),
        "size": draw(sizes),
        "gate": draw(st.booleans()),
        "head": head and draw(st.booleans()),
    }


@st.composite
def specs(draw: st.DrawFn, directions: tuple[str, ...] = ("forward",)) -> ModelSpec:
    """A model whose layers run in any of these directions."""
    layers = draw(st.lists(_layers(directions), min_size=1, max_size=3))
    options: dict[str, Any] = {
        "head": draw(st.one_of(st.just(0), sizes)),
        "head_bias": draw(st.booleans()),
        "activation": draw(st.sampled_from(["none", "softmax", "log_softmax", "sigmoid"])),
    }
    if directions == ("forward",) and draw(st.booleans()):
        options["attention"] = draw(_attentions(head=bool(options["head"])))
    if draw(st.booleans()):
        return make_spec(layers, features=draw(sizes), **options)
    return make_spec(layers, tokens=draw(sizes), embedding=draw(sizes), **options)
