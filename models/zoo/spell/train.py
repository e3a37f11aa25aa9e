"""Trains `spell` on the digits in `data.py` and writes it as a bundle.

python models/zoo/spell/train.py --out DIR

Letters for dims: T steps, B images in a batch, V tokens; others as in `data.py`.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Mapping
from pathlib import Path

import data
import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from conveyor_models import Bundle, ModelSpec, Network, attend, attention_memory, save_bundle
from conveyor_models.network import attention_weights

SEED = 1998
THREADS = 1
SIZE = 64
EMBEDDING = 8
COMPARED = 32
BATCH = 64
ITERATIONS = 12_000
LEARNING_RATE = 5e-3
WEIGHT_DECAY = 1e-3
GRADIENT_NORM_MAX = 1.0
TURN = 0.2
"""Radians by which an image is turned and sheared at random, at most."""
STRETCH = 0.15
SHIFT = 0.15
"""By how much of half its edge an image is moved at random, at most."""
STRENGTHS = (0.01, 0.1, 1.0, 3.0, 10.0)
"""Inverse regularisations of the logistic regression, of which the best one is compared with."""

SPEC = ModelSpec.model_validate(
    {
        "schema": 1,
        "name": "spell",
        "description": "Looks at a scanned digit and spells its English name, letter by letter."
        " The memory is the 16 patches of the image.",
        "input": {"kind": "tokens", "size": len(data.VOCABULARY), "labels": data.VOCABULARY},
        "embedding": {"size": EMBEDDING},
        "attention": {"memory_size": data.FEATURES, "size": COMPARED, "gate": True, "head": True},
        "layers": [{"cell": "lstm", "size": SIZE}],
        "head": {"size": len(data.VOCABULARY)},
        "output": {"activation": "log_softmax", "labels": data.VOCABULARY},
        "limits": {"memory_rows_max": data.PATCHES},
    }
)


def new_weights() -> dict[str, Tensor]:
    """What training begins with: random, smaller where more numbers are summed."""
    weights: dict[str, Tensor] = {}
    for name, shape in SPEC.weight_shapes.items():
        bound = 1 / math.sqrt(shape[-1] if len(shape) == 2 else SIZE)
        weights[name] = torch.empty(shape).uniform_(-bound, bound)
    weights["embedding.weight"].normal_()
    weights["layers.0.bias"][SIZE : 2 * SIZE] = 1.0  # begin by not forgetting
    return {name: each.requires_grad_() for name, each in weights.items()}


def varied(images: Tensor) -> Tensor:
    """Each image turned, sheared, stretched and moved a little, at random: [B, 8, 8]."""
    count = len(images)
    turn, shear = (2 * torch.rand(2, count) - 1) * TURN
    wide, high = 1 + (2 * torch.rand(2, count) - 1) * STRETCH
    right, down = (2 * torch.rand(2, count) - 1) * SHIFT
    rows = (wide * turn.cos(), shear - turn.sin(), right, turn.sin(), high * turn.cos(), down)
    grid = nn.functional.affine_grid(
        torch.stack(rows, dim=-1).view(count, 2, 3),
        [count, 1, data.SIDE, data.SIDE],
        align_corners=False,
    )
    return nn.functional.grid_sample(images[:, None], grid, align_corners=False)[:, 0]


def spellings(digits: np.ndarray) -> tuple[Tensor, Tensor]:
    """What the network reads and what it is to write, [T, B]; -1 where the name is over."""
    written = torch.full((data.STEPS_MAX, len(digits)), -1)
    for column, digit in enumerate(digits):
        tokens = data.spelling(int(digit))
        written[: len(tokens), column] = torch.tensor(tokens)
    start = torch.full((1, len(digits)), data.VOCABULARY.index(data.LOOK))
    return torch.cat((start, written[:-1].clamp(min=0))), written


def train() -> dict[str, Tensor]:
    """Fits the weights to the training images."""
    torch.manual_seed(SEED)
    torch.set_num_threads(THREADS)
    scans, shown = data.digits(data.TRAINING)
    images = torch.from_numpy(scans)
    read, written = spellings(shown)

    weights = new_weights()
    network = Network(SPEC, weights)  # computes with the very tensors that are trained
    optimiser = torch.optim.AdamW(weights.values(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, LEARNING_RATE, total_steps=ITERATIONS, pct_start=0.1
    )
    began = time.perf_counter()
    for iteration in range(1, ITERATIONS + 1):
        which = torch.randint(len(images), (BATCH,))
        memory = network.memory(torch.from_numpy(data.memories(varied(images[which]).numpy())))
        _, outputs = network.run(read[:, which], memory=memory)
        loss = nn.functional.nll_loss(
            outputs.flatten(0, 1), written[:, which].flatten(), ignore_index=-1
        )
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights.values(), GRADIENT_NORM_MAX)
        optimiser.step()
        schedule.step()
        if iteration % 1_000 == 0:
            right = words_right(network, weights, data.VALIDATION).mean()
            seconds = time.perf_counter() - began
            print(f"iteration {iteration:5d}   validation {right:.3f}   {seconds:.0f} s")
    return {name: each.detach() for name, each in weights.items()}


@torch.no_grad()
def spelled(
    network: Network, weights: Mapping[str, Tensor], images: np.ndarray
) -> tuple[list[list[int]], np.ndarray]:
    """Spells images, taking the most probable token each time, as `Generate` at temperature 0.

    Returns:
        For each image the `data.STEPS_MAX` tokens, and where each step looked, [N, T, 16].
    """
    assert network.spec.attention is not None
    attention = attention_weights(network.spec.attention, weights)
    memory = attention_memory(attention, torch.from_numpy(data.memories(images)))
    carry = network.initial_carry(len(images))
    token = torch.full((len(images),), data.VOCABULARY.index(data.LOOK))
    tokens: list[Tensor] = []
    looked: list[Tensor] = []
    for _ in range(data.STEPS_MAX):
        looked.append(attend(attention, memory, carry[-1].h)[1])
        carry, output = network.step(carry, token, memory)
        token = output.argmax(dim=-1)
        tokens.append(token)
    return torch.stack(tokens, dim=1).tolist(), torch.stack(looked, dim=1).numpy()


def words_right(network: Network, weights: Mapping[str, Tensor], rows: slice) -> np.ndarray:
    """For each of some images, whether its whole name came out right: [N]."""
    images, shown = data.digits(rows)
    tokens, _ = spelled(network, weights, images)
    names = [data.NAMES[digit] for digit in shown]
    return np.array([data.word(one) == name for one, name in zip(tokens, names, strict=True)])


def scores(bundle: Bundle) -> dict[str, int]:
    """How many of the held-out digits get the right name.

    The baselines name the digit at once: one does not look at it, the other is a logistic
    regression on its 64 pixels.
    """
    learned, validated, tested = map(data.digits, (data.TRAINING, data.VALIDATION, data.HELD_OUT))
    most = np.bincount(learned[1]).argmax()
    with threadpool_limits(THREADS):
        regressions = [
            LogisticRegression(C=strength, max_iter=5_000).fit(_pixels(learned[0]), learned[1])
            for strength in STRENGTHS
        ]
    best = max(regressions, key=lambda one: one.score(_pixels(validated[0]), validated[1]))
    return {
        "spell": int(words_right(bundle.network(), bundle.weights, data.HELD_OUT).sum()),
        "logistic regression": int((best.predict(_pixels(tested[0])) == tested[1]).sum()),
        "most frequent name": int((tested[1] == most).sum()),
    }


def _pixels(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1)


def report(bundle: Bundle) -> None:
    """Prints the held-out table of the card, and its pictures."""
    images, shown = data.digits(data.HELD_OUT)
    print("| model | words right | share |\n|---|---|---|")
    for name, right in scores(bundle).items():
        print(f"| {name} | {right} of {len(shown)} | {right / len(shown):.1%} |")
    tokens, looked = spelled(bundle.network(), bundle.weights, images)
    for digit in (4, 7):
        at = list(shown).index(digit)
        steps = len(data.word(tokens[at])) + data.LOOKS
        print(data.drawing(images[at], tokens[at][:steps], looked[at][:steps]), "\n")


def main() -> None:
    """Trains, writes the bundle and prints its held-out scores."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write the bundle to")
    arguments = parser.parse_args()
    bundle = save_bundle(arguments.out, SPEC, train())
    report(bundle)
    print(bundle.digest)


if __name__ == "__main__":
    main()
