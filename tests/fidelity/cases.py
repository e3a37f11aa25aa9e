"""The models that fidelity is measured on: every family and option, in odd sizes and in mixtures.

Tolerances are of norm(out - ref) / norm(ref); `test_engine` and `test_network` say what was
measured.
"""

from __future__ import annotations

from typing import Any, Final

from conveyor_models import ModelSpec
from tests.fidelity.networks import LayerLike, make_spec

STEPS: Final = 1000
TOLERANCE_FLOAT32: Final = 3e-6
TOLERANCE_FLOAT64: Final = 5e-15
MISTAKE_SHOWS: Final = 100 * TOLERANCE_FLOAT32
SIZES: Final = (1, 3, 17, 100, 512)
MEMORY_ROWS: Final = (1, 2, 17, 64)

Options = dict[str, Any]
FAMILIES: Final[dict[str, Options]] = {
    "rnn": {"cell": "rnn"},
    "rnn of relu": {"cell": "rnn", "nonlinearity": "relu"},
    "lstm": {"cell": "lstm"},
    "lstm with peepholes": {"cell": "lstm", "peepholes": ["input", "forget", "output"]},
    "coupled lstm": {"cell": "lstm", "coupled": True},
    "gru": {"cell": "gru"},
    "gru reset before": {"cell": "gru", "reset": "before"},
}
SUBSETS: Final[dict[str, Options]] = {
    f"lstm{' coupled' * coupled} with peephole of {' and '.join(gates)}": {
        "cell": "lstm",
        "peepholes": gates,
        "coupled": coupled,
    }
    for coupled in (False, True)
    for gates in (
        ["input"],
        ["forget"],
        ["output"],
        ["input", "forget"],
        ["input", "output"],
        ["forget", "output"],
    )
    if not (coupled and "input" in gates)
}
EVERY: Final = FAMILIES | SUBSETS


def _one(options: Options, size: int, **more: Any) -> ModelSpec:
    return make_spec([{**options, "size": size, **more}], features=7)


_HARD: Final[Options] = {"gate_activation": "hard_sigmoid"}
_STEEP: Final[Options] = {**_HARD, "hard_sigmoid_slope": 0.45}
_GATED: Final = {name: each for name, each in FAMILIES.items() if each["cell"] != "rnn"}
_PEEPING: Final = FAMILIES["lstm with peepholes"]

CELLS: Final[dict[str, ModelSpec]] = {
    **{
        f"{name} of {size}": _one(options, size)
        for name, options in FAMILIES.items()
        for size in SIZES
    },
    **{name: _one(options, 17) for name, options in SUBSETS.items()},
    **{f"{name}, clipped": _one(options, 17, clip=0.7) for name, options in FAMILIES.items()},
    **{
        f"{name}, initial state": _one(options, 17, initial_state=True)
        for name, options in FAMILIES.items()
    },
    **{f"{name}, hard sigmoid": _one(options, 17, **_HARD) for name, options in _GATED.items()},
    **{
        f"{name}, everything": _one(options, 33, **_STEEP, clip=1.3, initial_state=True)
        for name, options in _GATED.items()
    },
}
"""One layer."""

_MIXED: Final[list[LayerLike]] = [
    {"cell": "gru", "size": 17},
    {"cell": "rnn", "size": 3},
    {"size": 33, "projection": 9, "peepholes": ["output"], "initial_state": True},
    {"cell": "gru", "size": 31, "reset": "before", **_STEEP},
    {"size": 5, "coupled": True, "clip": 0.8},
    {"cell": "rnn", "size": 40, "nonlinearity": "relu"},
]

NETWORKS: Final[dict[str, ModelSpec]] = {
    "one feature": make_spec([17], features=1),
    "three layers of one size": make_spec([100, 100, 100], features=5),
    "three layers for three features": make_spec([3, 3, 3], features=3),
    "layers of mixed sizes": make_spec([17, 3, 100, 1], features=5),
    "projections": make_spec([(17, 5), (100, 33)], features=5),
    "projection to one": make_spec([(3, 1), 17], features=2),
    "projection below a wide layer": make_spec([(100, 3), 64], features=2),
    "projection under peepholes": make_spec(
        [{**_PEEPING, "size": 31, "projection": 7}], features=5
    ),
    "projection of coupled gates": make_spec(
        [{"size": 17, "projection": 16, "coupled": True, "peepholes": ["output"]}], features=5
    ),
    "tokens": make_spec([17], tokens=11, embedding=3, head=11),
    "tokens, wide embedding": make_spec([17], tokens=5, embedding=100),
    **{
        f"tokens, {name}": make_spec([{**options, "size": 17}], tokens=11, embedding=3, head=11)
        for name, options in FAMILIES.items()
    },
    "tokens, initial state": make_spec(
        [{"cell": "gru", "size": 9, "initial_state": True}], tokens=7, embedding=4
    ),
    "head": make_spec([17], features=3, head=1),
    "head without bias": make_spec([17], features=3, head=100, head_bias=False),
    "softmax": make_spec([17], features=3, head=19, activation="softmax"),
    "log_softmax": make_spec([17], tokens=19, embedding=8, head=19, activation="log_softmax"),
    "sigmoid": make_spec([17], features=3, head=5, activation="sigmoid"),
    "sigmoid without head": make_spec([17], features=3, activation="sigmoid"),
    "softmax without head": make_spec([(17, 9)], features=3, activation="softmax"),
    "mixed": make_spec(_MIXED, features=5),
    "mixed upside down": make_spec(_MIXED[::-1], features=5, head=7),
    "everything": make_spec(
        [(100, 17), {"cell": "gru", "size": 31}, (33, 32)],
        tokens=29,
        embedding=13,
        head=29,
        activation="log_softmax",
    ),
}
"""Stacks, tokens, heads and what comes after them."""

_READS: Final[Options] = {"memory_size": 5, "size": 9}

ATTENTION: Final[dict[str, ModelSpec]] = {
    **{
        f"attention over {name}": make_spec(
            [{**options, "size": 17}], features=3, attention=_READS, head=4
        )
        for name, options in FAMILIES.items()
    },
    "attention of one": make_spec(
        [1], features=1, attention={"memory_size": 1, "size": 1, "gate": True}
    ),
    "attention with gate": make_spec([17], features=3, attention={**_READS, "gate": True}),
    "attention in the head": make_spec(
        [17], features=3, attention={**_READS, "head": True}, head=6
    ),
    "attention over a mixed stack": make_spec(
        _MIXED[2:4], features=3, attention={"memory_size": 33, "size": 31, "gate": True}
    ),
    "attention over a projection": make_spec(
        [{"cell": "gru", "size": 9}, (33, 17)], features=3, attention={**_READS, "gate": True}
    ),
    "attention, wide": make_spec(
        [100], features=3, attention={"memory_size": 100, "size": 100}, head=3
    ),
    "attention, tokens and everything": make_spec(
        [{"cell": "gru", "size": 33, "initial_state": True}, 17],
        tokens=19,
        embedding=7,
        attention={"memory_size": 17, "size": 3, "gate": True, "head": True},
        head=19,
        activation="softmax",
    ),
}

PREDICTED: Final[dict[str, ModelSpec]] = {
    **{
        f"{direction} {name}": _one(options, 17, direction=direction)
        for name, options in FAMILIES.items()
        for direction in ("reverse", "bidirectional")
    },
    "bidirectional of one": _one(FAMILIES["gru"], 1, direction="bidirectional"),
    "bidirectional, everything": _one(
        _PEEPING,
        33,
        **_STEEP,
        clip=1.3,
        initial_state=True,
        projection=9,
        direction="bidirectional",
    ),
    "both ways, back and on": make_spec(
        [
            {"size": 17, "direction": "bidirectional"},
            {"cell": "gru", "size": 31, "direction": "reverse", "initial_state": True},
            {"cell": "rnn", "size": 9},
            {"cell": "gru", "reset": "before", "size": 3, "direction": "bidirectional"},
        ],
        tokens=11,
        embedding=5,
        head=7,
        activation="log_softmax",
    ),
}
"""What cannot be streamed."""

STREAMED: Final = CELLS | NETWORKS | ATTENTION
ALL: Final = STREAMED | PREDICTED
