"""Trains `timing`, one LSTM unit with peepholes beside one without, and writes it as a bundle.

python models/zoo/timing/train.py --out DIR

Both are trained from many seeds and with two first biases of the forget gate, all at the same time
and on the same streams; for each seed they begin with the same random weights. What is written is
the best one with peepholes by the validation streams and, as plain.json, the best one without.
Letters for dims: R networks, B streams in a batch, T steps. There is one unit, so that a matrix of
a gate is one number and the last dim is that of the gates.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Final

import data
import numpy as np
import torch
from torch import Tensor

from conveyor_models import Bundle, ModelSpec, Network, save_bundle
from conveyor_models.layers import LstmLayer

SEED = 2000
THREADS = 1
SEEDS = 16
"""Networks of each kind."""
KINDS: Final = ("plain, 1", "plain, 5", "peepholes, 1", "peepholes, 5")
"""With and without peepholes, and what is added to the first bias of the forget gate."""
STEPS = 120
BATCH = 8
ITERATIONS = 2_400
LEARNING_RATE = 0.05
GRADIENT_NORM_MAX = 1.0
OUTPUT_BIAS = -1.0
"""Begin with an output gate that is rather shut."""
BESIDE = 0.5
"""What the steps beside the due one are trained towards, so that nearly right is not wrong."""
DUE_WEIGHT = 15.0
"""Due steps are rare, so an error there counts for more by this factor."""

SPEC = ModelSpec.model_validate(
    {
        "schema": 1,
        "name": "timing",
        "description": f"A timer: fires {data.DELAY_STEPS} steps after it was started, and stays"
        " silent until then. To be started again at most 20 steps after that. One unit with"
        " peepholes; a made-up task.",
        "input": {"kind": "features", "size": 1, "labels": data.FEATURES},
        "layers": [{"cell": "lstm", "size": 1, "peepholes": ["input", "forget", "output"]}],
        "output": {"labels": data.TARGETS},
    }
)


PLAIN = SPEC.model_copy(update={"layers": (LstmLayer(cell="lstm", size=1),)})


class Stack:
    """R networks side by side: of each kind as many as there are seeds, kind by kind."""

    def __init__(self, seeds: int) -> None:
        def uniform(size: int) -> Tensor:
            one = torch.empty(seeds, 1, size).uniform_(-1, 1)
            return one.repeat(len(KINDS), 1, 1)  # a seed begins with the same weights in each kind

        self.input = uniform(4)  # blocks i, f, g, o
        self.recurrent = uniform(4)
        self.bias = uniform(4) + torch.tensor([0.0, 0.0, 0.0, OUTPUT_BIAS])
        self.peepholes = torch.zeros(len(KINDS) * seeds, 1, 3)  # of i, f and o
        kinds = [kind for kind in KINDS for _ in range(seeds)]
        self.bias[..., 1] += torch.tensor([float(kind[-1]) for kind in kinds])[:, None]
        self.has_peepholes = torch.tensor([[float("peepholes" in kind)] for kind in kinds])

    def tensors(self) -> list[Tensor]:
        """What is trained; the networks are the first dim."""
        return [self.input, self.recurrent, self.bias, self.peepholes]

    def run(self, starts: Tensor) -> Tensor:
        """The output, [T, R, B], for starts [T, B]."""
        sums = starts[:, None, :, None] * self.input + self.bias  # [T, R, B, 4]
        h = c = sums.new_zeros(sums.shape[1:3])
        recurrent = self.recurrent.unbind(-1)
        seen_i, seen_f, seen_o = (self.has_peepholes * each for each in self.peepholes.unbind(-1))
        rows: list[Tensor] = []
        for one in sums:
            i, f, g, o = (
                gate + weight * h for gate, weight in zip(one.unbind(-1), recurrent, strict=True)
            )
            i, f = (i + seen_i * c).sigmoid(), (f + seen_f * c).sigmoid()
            c = f * c + i * g.tanh()
            h = (o + seen_o * c).sigmoid() * c.tanh()
            rows.append(h)
        return torch.stack(rows)

    def of_kind(self, kind: str) -> slice:
        """Where the networks of a kind are."""
        seeds = len(self.input) // len(KINDS)
        first = KINDS.index(kind) * seeds
        return slice(first, first + seeds)

    def weights(self, number: int) -> dict[str, Tensor]:
        """Those of one network, as a bundle has them."""
        named = {
            "layers.0.weight_input": self.input[number].T,
            "layers.0.weight_recurrent": self.recurrent[number].T,
            "layers.0.bias": self.bias[number, 0],
        }
        if self.has_peepholes[number]:
            for gate, peephole in zip(
                ("input", "forget", "output"), self.peepholes[number, 0], strict=True
            ):
                named[f"layers.0.peephole_{gate}"] = peephole[None]
        return {name: each.detach().clone().contiguous() for name, each in named.items()}


def train(seeds: int = SEEDS) -> Stack:
    """Fits all networks to streams that are drawn as they go."""
    torch.manual_seed(SEED)
    torch.set_num_threads(THREADS)
    random = np.random.default_rng(SEED)
    stack = Stack(seeds)
    tensors = [each.requires_grad_() for each in stack.tensors()]
    optimiser = torch.optim.Adam(tensors, LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, LEARNING_RATE, total_steps=ITERATIONS, pct_start=0.1
    )
    began = time.perf_counter()
    for iteration in range(1, ITERATIONS + 1):
        starts, due = map(torch.from_numpy, data.streams(random, STEPS, BATCH, data.REST_STEPS))
        loss = losses(stack.run(starts), due)
        optimiser.zero_grad()
        loss.sum().backward()
        _clip(tensors)
        optimiser.step()
        schedule.step()
        if iteration % 200 == 0:
            seconds = time.perf_counter() - began
            said = ", ".join(
                f"{kind} {loss[stack.of_kind(kind)].mean().item():.3f}" for kind in KINDS
            )
            print(f"iteration {iteration:5d}   {said}   {seconds:.0f} s", flush=True)
    return stack


def losses(output: Tensor, due: Tensor) -> Tensor:
    """The mean squared error of each network, [R], of outputs [T, R, B] for due steps [T, B]."""
    wanted = due.clone()
    wanted[1:] += BESIDE * due[:-1]
    wanted[:-1] += BESIDE * due[1:]
    weight = 1 + (DUE_WEIGHT - 1) * wanted
    return (weight[:, None] * (output - wanted[:, None]).square()).mean(dim=(0, 2))


def _clip(tensors: list[Tensor]) -> None:
    """Holds down the gradient of each network by itself."""
    gradients = [each.grad for each in tensors if each.grad is not None]
    norms = torch.stack([each.flatten(1).square().sum(dim=1) for each in gradients]).sum(0).sqrt()
    scale = (GRADIENT_NORM_MAX / norms.clamp(min=1e-12)).clamp(max=1)
    for each in gradients:
        each.mul_(scale[:, None, None])


@torch.no_grad()
def stack_scores(stack: Stack, starts: data.Floats) -> np.ndarray:
    """The share of intervals that every network times right: [R]."""
    output = stack.run(torch.from_numpy(starts)).numpy()
    return np.array([data.share_right(each, starts) for each in output.swapaxes(0, 1)])


@torch.no_grad()
def network_scores(network: Network) -> tuple[float, float, float]:
    """What the card says of one network; each stream is a session of its own.

    Returns:
        The share of held-out intervals timed right, that of intervals with longer rests, and the
        furthest from 0 that the output was in a held-out interval before the timer was nearly due.
    """
    (starts, _), (rarer, _) = data.held_out(), data.longer_rests()
    output, later = (
        network.run(torch.from_numpy(each)[..., None])[1][..., 0].numpy()
        for each in (starts, rarer)
    )
    return (
        data.share_right(output, starts),
        data.share_right(later, rarer),
        data.loudest_wait(output, starts),
    )


def scores(bundle: Bundle) -> dict[str, tuple[float, float, float]]:
    """`network_scores` of the bundle and of the best plain network."""
    return {"timing": network_scores(bundle.network()), "best plain": network_scores(best_plain())}


def best_plain() -> Network:
    """The best plain network by the validation streams, as it was when the bundle was made."""
    named = json.loads((Path(__file__).parent / "plain.json").read_text())
    return Network(PLAIN, {name: torch.tensor(each) for name, each in named.items()})


def share_at_random() -> float:
    """The share of held-out intervals right if the timer fires as often, but at random."""
    starts, due = data.held_out()
    chances = np.random.default_rng(SEED).random(due.shape)
    return data.share_right((chances < due.mean()).astype(np.float32), starts)


def best(stack: Stack, word: str, starts: data.Floats, due: data.Floats) -> int:
    """Of the kinds with this word, the best one on average; of it the best network.

    That is the one with most intervals right, and among equals the one of least error.
    """
    shares = stack_scores(stack, starts)
    with torch.no_grad():
        errors = losses(stack.run(torch.from_numpy(starts)), torch.from_numpy(due)).numpy()
    kinds = [stack.of_kind(kind) for kind in KINDS if word in kind]
    numbers = range(len(shares))[max(kinds, key=lambda kind: shares[kind].mean())]
    return max(numbers, key=lambda number: (shares[number], -errors[number]))


def main() -> None:
    """Trains, writes the bundle and the best plain network, and prints what the card says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write the bundle to")
    arguments = parser.parse_args()
    stack = train()
    validated, held_out = data.validation(), data.held_out()
    shares = [stack_scores(stack, part[0]) for part in (validated, held_out)]
    for kind in KINDS:
        for name, each in zip(("validation", "held out"), shares, strict=True):
            some = each[stack.of_kind(kind)]
            cells = " | ".join(f"{share:.0%}" for share in some)
            print(f"| {kind} | {name} | {cells} | mean {some.mean():.1%}, std {some.std():.1%}")
    weights = {
        word: stack.weights(best(stack, word, *validated)) for word in ("peepholes", "plain")
    }
    bundle = save_bundle(arguments.out, SPEC, weights["peepholes"])
    plain = {name: each.tolist() for name, each in weights["plain"].items()}
    (arguments.out / "plain.json").write_text(json.dumps(plain, indent=2) + "\n")
    print("timing", network_scores(bundle.network()))
    print("best plain", network_scores(Network(PLAIN, weights["plain"])))
    print(f"as often, at random {share_at_random():.1%}")
    print(bundle.digest)


if __name__ == "__main__":
    main()
