"""Makes the model of `look_up.py`: attention that finds a row by the number that stands in it.

Its weights are set by hand, so that they can be read. A row of the memory is (key, value). The one
unit keeps the key that was asked for; the attention gives a row weight only where the difference of
the two keys lies within a narrow hump, made of two steep steps; the head says the value it read.

    python examples/make_look_up.py my-models
    conveyor-server serve --models my-models
"""

import sys
from pathlib import Path

import torch

from conveyor_models import parse_spec, save_bundle

MODEL_TOML = """
schema = 1
name = "look-up"
description = "Says the value beside the key that was asked for one step before; keys from 0 to 1."

[input]
kind = "features"
size = 1
labels = ["key"]

[attention]
memory_size = 2
size = 2
head = true

[[layers]]
cell = "rnn"
size = 1

[head]
size = 1

[output]
labels = ["value"]
"""
SMALL = 0.1  # so small that tanh(SMALL * key) is nearly SMALL * key
STEEP = 100.0  # of the two steps
HUMP = 2.5  # half its width, before it is divided by STEEP
SHARP = 8.0  # how much more a fitting row weighs

WEIGHTS = {
    "layers.0.weight_input": [[SMALL, 0.0, 0.0]],  # reads [key ; what was read]
    "layers.0.weight_recurrent": [[0.0]],
    "layers.0.bias": [0.0],
    "attention.weight_query": [[STEEP / SMALL], [STEEP / SMALL]],
    "attention.weight_memory": [[-STEEP, 0.0], [-STEEP, 0.0]],
    "attention.bias": [HUMP, -HUMP],
    "attention.score": [SHARP, -SHARP],
    "head.weight": [[0.0, 0.0, 1.0]],  # reads [h ; key, value]
    "head.bias": [0.0],
}

folder = Path(sys.argv[1]) / "look-up"
weights = {name: torch.tensor(values) for name, values in WEIGHTS.items()}
bundle = save_bundle(folder, parse_spec(MODEL_TOML), weights)
print(f"{folder}: {bundle.digest}")
