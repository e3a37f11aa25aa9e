"""Trains `pulse` on the heart beats in `data.py`, beside a plain LSTM, and writes it as a bundle.

python models/zoo/pulse/train.py --out DIR

Both kinds are trained from several seeds, all at the same time, on the same windows, and for each
seed from the same random weights. What is written is the best LSTM with peepholes by the
validation part.
Letters for dims: R networks, B windows in a batch, T steps, H units.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import data
import numpy as np
import torch
from torch import Tensor, nn

from conveyor_models import Bundle, ModelSpec, save_bundle

SEED = 2000
THREADS = 1
SEEDS = 5
"""Networks of each kind."""
SIZE = 4
WINDOW_STEPS = 200
WARM_UP_STEPS = 37
"""An empty carry does not know the pulse yet: the first 1.5 s are not trained on."""
SCORED_AFTER_STEPS = 100
BATCH = 16
ITERATIONS = 1_500
LEARNING_RATE = 1e-2
GRADIENT_NORM_MAX = 0.1
RARE = 3.0
"""Beats are rare, so the bias of the output begins at -3."""

SPEC = ModelSpec.model_validate(
    {
        "schema": 1,
        "name": "pulse",
        "description": "The probability that the heart beats in the next 40 ms, from the beats so"
        " far. Trained on seven minutes of one person's pulse.",
        "input": {"kind": "features", "size": 1, "labels": data.FEATURES},
        "layers": [{"cell": "lstm", "size": SIZE, "peepholes": ["input", "forget", "output"]}],
        "head": {"size": 1},
        "output": {"activation": "sigmoid", "labels": data.TARGETS},
    }
)


class Stack:
    """R networks side by side, the first half without peepholes, the second half with them."""

    def __init__(self, seeds: int) -> None:
        bound = 1 / math.sqrt(SIZE)

        def uniform(*shape: int) -> Tensor:
            one = torch.empty(seeds, *shape).uniform_(-bound, bound)
            return torch.cat((one, one))  # a seed begins with the same weights in both kinds

        self.input = uniform(1, 4 * SIZE)
        self.recurrent = uniform(SIZE, 4 * SIZE)
        self.bias = uniform(1, 4 * SIZE)
        self.bias[..., SIZE : 2 * SIZE] += 1.0  # begin by not forgetting
        self.peepholes = torch.zeros(3, 2 * seeds, 1, SIZE)  # of i, f and o
        self.head = uniform(SIZE, 1)
        self.head_bias = uniform(1, 1) - RARE
        self.has_peepholes = (torch.arange(2 * seeds) >= seeds).float()[:, None, None]

    def tensors(self) -> list[Tensor]:
        """What is trained; the networks are the first dim, of the peepholes the second."""
        return [self.input, self.recurrent, self.bias, self.peepholes, self.head, self.head_bias]

    def run(self, x: Tensor) -> Tensor:
        """Log-odds of a beat in the next step, [T, R, B], for features [T, B, 1]."""
        sums = x[:, None] * self.input + self.bias  # [T, R, B, 4H]
        h = c = sums.new_zeros(*sums.shape[1:3], SIZE)
        seen_i, seen_f, seen_o = self.peepholes * self.has_peepholes
        rows: list[Tensor] = []
        for one in sums:
            i, f, g, o = torch.baddbmm(one, h, self.recurrent).chunk(4, dim=-1)
            i, f = (i + seen_i * c).sigmoid(), (f + seen_f * c).sigmoid()
            c = f * c + i * g.tanh()
            h = (o + seen_o * c).sigmoid() * c.tanh()
            rows.append(h)
        return (torch.stack(rows) @ self.head + self.head_bias)[..., 0]

    def weights(self, number: int) -> dict[str, Tensor]:
        """Those of one network with peepholes, as the bundle has them."""
        named = {
            "layers.0.weight_input": self.input[number].T,
            "layers.0.weight_recurrent": self.recurrent[number].T,
            "layers.0.bias": self.bias[number, 0],
            "head.weight": self.head[number].T,
            "head.bias": self.head_bias[number, 0],
        }
        for gate, peephole in zip(("input", "forget", "output"), self.peepholes, strict=True):
            named[f"layers.0.peephole_{gate}"] = peephole[number, 0]
        return {name: each.detach().clone().contiguous() for name, each in named.items()}


def parts() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The beats to learn from, to compare by and held out, each [T, 1]."""
    beats = data.series()
    cuts = [int(len(beats) * share) for share in (data.VALIDATION_SHARE, data.HELD_OUT_SHARE)]
    learned, validated, tested = np.split(beats, cuts)
    return learned, validated, tested


def train() -> Stack:
    """Fits all networks to the first part of the recording."""
    torch.manual_seed(SEED)
    torch.set_num_threads(THREADS)
    learned, validated, _ = map(torch.from_numpy, parts())
    steps = torch.arange(WINDOW_STEPS + 1)[:, None]
    stack = Stack(SEEDS)
    tensors = [each.requires_grad_() for each in stack.tensors()]
    optimiser = torch.optim.Adam(tensors, LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, LEARNING_RATE, total_steps=ITERATIONS, pct_start=0.1
    )
    began = time.perf_counter()
    for iteration in range(1, ITERATIONS + 1):
        rows = learned[torch.randint(len(learned) - WINDOW_STEPS, (BATCH,)) + steps]
        odds = stack.run(rows[:-1])[WARM_UP_STEPS:]
        came = rows[1:, None, :, 0][WARM_UP_STEPS:].expand_as(odds)
        loss = nn.functional.binary_cross_entropy_with_logits(odds, came, reduction="none")
        optimiser.zero_grad()
        loss.mean(dim=(0, 2)).sum().backward()
        _clip(stack)
        optimiser.step()
        schedule.step()
        if iteration % 100 == 0:
            seconds = time.perf_counter() - began
            said = " ".join(f"{bits:.2f}" for bits in stack_bits(stack, validated))
            print(f"iteration {iteration:5d}   validation {said}   {seconds:.0f} s", flush=True)
    return stack


def _clip(stack: Stack) -> None:
    """Holds down the gradient of each network by itself."""
    stack_first = [
        each.grad.transpose(0, 1) if each is stack.peepholes else each.grad
        for each in stack.tensors()
        if each.grad is not None
    ]
    norms = torch.stack([each.flatten(1).square().sum(dim=1) for each in stack_first]).sum(0).sqrt()
    scale = (GRADIENT_NORM_MAX / norms).clamp(max=1)
    for each in stack_first:
        each.mul_(scale.view(-1, *[1] * (each.dim() - 1)))


def bits(chances: np.ndarray, beats: np.ndarray) -> np.ndarray:
    """What the beats cost, in bits each, given their chance in every step.

    Args:
        chances: [T, R], of a beat in the step after.
        beats: [T, 1]; the first `SCORED_AFTER_STEPS` steps are not scored.
    """
    came = beats[SCORED_AFTER_STEPS + 1 :] > 0
    told = np.clip(chances[SCORED_AFTER_STEPS:-1].astype(np.float64), 1e-9, 1 - 1e-9)
    return -np.log2(np.where(came, told, 1 - told)).sum(axis=0) / came.sum()


@torch.no_grad()
def stack_bits(stack: Stack, beats: Tensor) -> np.ndarray:
    """`bits` of every network: [R]."""
    return bits(stack.run(beats[:, None])[:, :, 0].sigmoid().numpy(), beats.numpy())


@torch.no_grad()
def scores(bundle: Bundle) -> dict[str, float]:
    """Bits per held-out beat; one session reads the whole of the held-out part."""
    learned, _, tested = parts()
    _, chances = bundle.network().run(torch.from_numpy(tested)[:, None])
    return {
        "pulse": float(bits(chances[:, 0].numpy(), tested)[0]),
        "as long as the last one": float(bits(renewal(learned, tested, last=True), tested)[0]),
        "any interval seen": float(bits(renewal(learned, tested, last=False), tested)[0]),
        "always the same chance": float(bits(np.full_like(tested, learned.mean()), tested)[0]),
    }


def renewal(learned: np.ndarray, beats: np.ndarray, *, last: bool) -> np.ndarray:
    """The chance of a beat in the next step by the time since the last one, [T, 1].

    The distribution of intervals is that of the beats learned from; or, if `last`, of how each
    interval differed from a least-squares guess by the one before it. Either is smoothed by one
    step, and one part in fifty is any length up to two seconds.
    """
    intervals = np.diff(np.flatnonzero(learned[:, 0])).astype(float)
    slope, offset = np.polyfit(intervals[:-1], intervals[1:], 1) if last else (0.0, 0.0)
    seen = intervals[1:] - (slope * intervals[:-1] + offset)
    lengths = np.arange(1, 51)
    chances = np.full(beats.shape, learned.mean())
    length, since = intervals.mean(), 0
    for step, came in enumerate(beats[:, 0] > 0):
        if came:
            length, since = float(since + 1), 0
        else:
            since += 1
        gaps = lengths[:, None] - (slope * length + offset) - seen
        smooth = np.exp(-0.5 * gaps**2).mean(axis=1)
        density = 0.98 * smooth / smooth.sum() + 0.02 / len(lengths)
        if since < len(lengths):
            chances[step] = density[since] / density[since:].sum()
    return chances


def main() -> None:
    """Trains, writes the bundle and prints its held-out scores."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write the bundle to")
    arguments = parser.parse_args()
    stack = train()
    _, validated, tested = map(torch.from_numpy, parts())
    compared, shown = stack_bits(stack, validated), stack_bits(stack, tested)
    best = SEEDS + int(compared[SEEDS:].argmin())
    for name, some in (("plain", slice(0, SEEDS)), ("peepholes", slice(SEEDS, None))):
        print(f"{name}: validation {compared[some].round(3)}, held out {shown[some].round(3)}")
    bundle = save_bundle(arguments.out, SPEC, stack.weights(best))
    for name, score in scores(bundle).items():
        print(f"| {name} | {score:.3f} |")
    print(bundle.digest)


if __name__ == "__main__":
    main()
