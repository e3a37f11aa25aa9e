"""Trains `rain` on the series in `data.py` and writes it as a bundle.

python models/zoo/rain/train.py --out DIR
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import data
import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from conveyor_models import Bundle, ModelSpec, Network, save_bundle

SEED = 2012
THREADS = 1
SIZE = 4
LEARNING_RATE = 3e-3
ITERATIONS = 300
WINDOW_STEPS = 60
WARM_UP_STEPS = 10
"""An empty carry has seen nothing: the first steps of a window are not trained on."""
BATCH = 16
WEIGHT_DECAY = 1.0
NOISE = 0.3
"""Standard deviation of what is added to the features at random, while training."""
GRADIENT_NORM_MAX = 1.0

SPEC = ModelSpec.model_validate(
    {
        "schema": 1,
        "name": "rain",
        "description": "The probability of rain tomorrow in Seattle, from the days so far."
        " Trained on 2012 and 2013.",
        "input": {"kind": "features", "size": len(data.FEATURES), "labels": data.FEATURES},
        "layers": [{"cell": "lstm", "size": SIZE, "coupled": True}],
        "head": {"size": len(data.TARGETS)},
        "output": {"activation": "sigmoid", "labels": data.TARGETS},
    }
)


def new_weights() -> dict[str, Tensor]:
    """What training begins with: uniform within one over the root of the layer's size."""
    bound = 1 / math.sqrt(SIZE)
    return {
        name: torch.empty(shape).uniform_(-bound, bound).requires_grad_()
        for name, shape in SPEC.weight_shapes.items()
    }


def train() -> dict[str, Tensor]:
    """Fits the weights to the part of the series before the validation part."""
    torch.manual_seed(SEED)
    torch.set_num_threads(THREADS)
    features, targets, years = map(torch.from_numpy, data.series())
    last = int((years < data.VALIDATION_YEAR).sum()) - 1 - WINDOW_STEPS
    steps = torch.arange(WINDOW_STEPS)[:, None]

    weights = new_weights()
    network = Network(SPEC, weights)  # computes with the very tensors that are trained
    optimiser = torch.optim.AdamW(weights.values(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, LEARNING_RATE, total_steps=ITERATIONS, pct_start=0.1
    )
    began = time.perf_counter()
    for iteration in range(1, ITERATIONS + 1):
        rows = torch.randint(last + 1, (BATCH,)) + steps
        read = features[rows] + NOISE * torch.randn(*rows.shape, features.shape[1])
        _, outputs = network.run(read)
        loss = nn.functional.binary_cross_entropy(
            outputs[WARM_UP_STEPS:], targets[rows][WARM_UP_STEPS:]
        )
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights.values(), GRADIENT_NORM_MAX)
        optimiser.step()
        schedule.step()
        if iteration % 100 == 0:
            said = scores(network, data.VALIDATION_YEAR, data.HELD_OUT_YEAR)["rain"]
            seconds = time.perf_counter() - began
            print(f"iteration {iteration:5d}   validation {said}   {seconds:.0f} s", flush=True)
    return {name: each.detach() for name, each in weights.items()}


@torch.no_grad()
def scores(network: Network, first: int, end: int = 10_000) -> dict[str, list[float]]:
    """Of forecasts made in some of the years: bits per day (log loss), and the share right.

    One session reads the series from 2012 on. The baselines are fitted to the days before
    `data.VALIDATION_YEAR` like the network: a logistic regression on the features of the day, how
    often it rains after a wet and after a dry day, and how often it rains at all.
    """
    features, targets, years = data.series()
    _, outputs = network.run(torch.from_numpy(features)[:, None])
    asked, fitted = (years >= first) & (years < end), years < data.VALIDATION_YEAR
    wet, rained = features[:, 0] > 0, targets[:, 0]
    regression = LogisticRegression(max_iter=1_000).fit(features[fitted], rained[fitted])
    after = [rained[fitted & (wet == today)].mean() for today in (False, True)]
    forecasts = {
        "rain": outputs[:, 0, 0].numpy(),
        "logistic regression": regression.predict_proba(features)[:, 1],
        "rain today or not": np.where(wet, after[1], after[0]),
        "always the same": np.full(len(rained), rained[fitted].mean()),
    }
    found = {}
    for name, chance in forecasts.items():
        told = np.where(rained > 0, chance, 1 - chance)[asked]
        found[name] = [float(-np.log2(told).mean()), float((told > 0.5).mean())]
    return found


def main() -> None:
    """Trains, writes the bundle and prints its held-out scores."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write the bundle to")
    arguments = parser.parse_args()
    bundle: Bundle = save_bundle(arguments.out, SPEC, train())
    for name, score in scores(bundle.network(), data.HELD_OUT_YEAR).items():
        print(f"| {name} | {score} |")
    print(bundle.digest)


if __name__ == "__main__":
    main()
