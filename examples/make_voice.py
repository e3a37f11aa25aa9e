"""Makes the model of `microphone.py`: two units that tell voice from noise by its level.

Its weights are set by hand, so that they can be read. The lower unit smooths the level, the upper
one is a latch: what it feeds back to itself keeps it where it is until the level is well above or
well below the threshold. So it neither flickers in the pauses within a word nor needs a timer.

    python examples/make_voice.py my-models
    conveyor-server serve --models my-models
"""

import sys
from pathlib import Path

import torch

from conveyor_models import parse_spec, save_bundle

MODEL_TOML = """
schema = 1
name = "voice"
description = "How sure it is that somebody speaks, from the level of 10 ms of sound."

[input]
kind = "features"
size = 1
labels = ["level_db"]

[[layers]]
cell = "rnn"
size = 1

[[layers]]
cell = "rnn"
size = 1

[head]
size = 1

[output]
activation = "sigmoid"
labels = ["voice"]
"""
THRESHOLD_DB = -35.0
PER_DB = 0.05  # how far one decibel moves the smoothed level
SMOOTHING = 0.6  # what it keeps of the step before
LATCH = 1.8  # above 1, the upper unit holds on to its sign by itself

WEIGHTS = {
    "layers.0.weight_input": [[PER_DB]],
    "layers.0.weight_recurrent": [[SMOOTHING]],
    "layers.0.bias": [-PER_DB * THRESHOLD_DB],
    "layers.1.weight_input": [[2.0]],
    "layers.1.weight_recurrent": [[LATCH]],
    "layers.1.bias": [0.0],
    "head.weight": [[4.0]],
    "head.bias": [0.0],
}

folder = Path(sys.argv[1]) / "voice"
weights = {name: torch.tensor(values) for name, values in WEIGHTS.items()}
bundle = save_bundle(folder, parse_spec(MODEL_TOML), weights)
print(f"{folder}: {bundle.digest}")
