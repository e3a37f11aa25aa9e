"""Trains `letters` on the documentation in `text.py` and writes it as a bundle.

python models/zoo/letters/train.py --out DIR
"""

from __future__ import annotations

import argparse
import math
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import text
import torch
from torch import Tensor, nn

from conveyor_models import Bundle, ModelSpec, save_bundle, weights_from_torch

SEED = 1997
THREADS = 2
EMBEDDING = 32
SIZES = (192, 192)
STREAMS = 16
CHUNK_STEPS = 96
ITERATIONS = 12_000
DROPOUT = 0.2
"""Of what each layer hands on, while training."""
LEARNING_RATE = 5e-3
GRADIENT_NORM_MAX = 1.0
ORDER = 5
"""Length of the n-grams of the stronger baseline."""


class Writer(nn.Module):
    """The network: embedding, two layers, and a score for every character."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, EMBEDDING)
        below = (EMBEDDING, *SIZES)
        self.layers = nn.ModuleList(nn.LSTM(*pair) for pair in zip(below, SIZES, strict=False))
        self.head = nn.Linear(SIZES[-1], characters)
        for layer, size in zip(self.layers, SIZES, strict=True):
            nn.init.ones_(layer.bias_ih_l0.data[size : 2 * size])  # begin by not forgetting

    def forward(self, x: Tensor, carry: list) -> tuple[Tensor, list]:
        """Scores [T, B, V] for tokens [T, B], and the carry to go on from."""
        y = self.embedding(x)
        after = []
        for layer, before in zip(self.layers, carry, strict=True):
            y, (h, c) = layer(y, before)
            y = nn.functional.dropout(y, DROPOUT, self.training)
            after.append((h.detach(), c.detach()))
        return self.head(y), after


def train(tokens: Tensor, characters: int) -> Writer:
    """Reads the text in parallel streams, the carry going on from chunk to chunk."""
    torch.manual_seed(SEED)
    torch.set_num_threads(THREADS)
    length = len(tokens) // STREAMS
    streams = tokens[: length * STREAMS].view(STREAMS, length).T  # [T, B]
    network = Writer(characters)
    optimiser = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, LEARNING_RATE, total_steps=ITERATIONS, pct_start=0.05
    )
    began, at, carry = time.perf_counter(), 0, [None] * len(SIZES)
    for iteration in range(1, ITERATIONS + 1):
        if at + CHUNK_STEPS + 1 > length:
            at, carry = int(torch.randint(CHUNK_STEPS, ())), [None] * len(SIZES)
        x, y = streams[at : at + CHUNK_STEPS], streams[at + 1 : at + 1 + CHUNK_STEPS]
        at += CHUNK_STEPS
        scores, carry = network(x, carry)
        loss = nn.functional.cross_entropy(scores.flatten(0, 1), y.flatten())
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), GRADIENT_NORM_MAX)
        optimiser.step()
        schedule.step()
        if iteration % 1_000 == 0:
            bits = loss.item() / math.log(2)
            seconds = time.perf_counter() - began
            print(f"iteration {iteration:5d}   {bits:.3f} bits   {seconds:.0f} s")
    return network


def export(network: Writer, labels: tuple[str, ...], folder: Path) -> Bundle:
    """Writes the bundle."""
    spec = ModelSpec.model_validate(
        {
            "schema": 1,
            "name": "letters",
            "description": "The next character of English documentation prose."
            " Tokens are characters; U+FFFD stands for any other.",
            "input": {"kind": "tokens", "size": len(labels), "labels": labels},
            "embedding": {"size": EMBEDDING},
            "layers": [{"cell": "lstm", "size": size} for size in SIZES],
            "head": {"size": len(labels)},
            "output": {"activation": "log_softmax", "labels": labels},
        }
    )
    weights = weights_from_torch(
        list(network.layers), embedding=network.embedding, head=network.head
    )
    return save_bundle(folder, spec, weights)


def bits_per_character(bundle: Bundle, tokens: Sequence[int], streams: int = 32) -> float:
    """Bits per character of a text, read as parallel streams that begin with an empty carry."""
    length = len(tokens) // streams
    x = torch.tensor(tokens[: length * streams]).view(streams, length).T  # [T, B]
    _, rows = bundle.network().run(x[:-1])  # [T - 1, B, V], natural logarithms
    nats = -rows.gather(-1, x[1:, :, None]).mean().item()
    return nats / math.log(2)


def unigram_bits(train: Sequence[int], held_out: Sequence[int], characters: int) -> float:
    """The baseline that knows how often each character occurs, and nothing else."""
    counts = Counter(train)
    total = len(train) + characters
    bits = sum(-math.log2((counts[token] + 1) / total) for token in held_out)
    return bits / len(held_out)


def ngram_bits(train: Sequence[int], held_out: Sequence[int], characters: int) -> float:
    """The baseline that looks the last four characters up in the training text.

    An n-gram model of order `ORDER`; each order is interpolated with the one below, weighted by how
    many different characters followed its context (Witten & Bell 1991).
    """
    followers: dict[tuple[int, ...], Counter[int]] = {}
    for at, token in enumerate(train):
        for width in range(min(at, ORDER - 1) + 1):
            followers.setdefault(tuple(train[at - width : at]), Counter())[token] += 1
    totals = {context: counts.total() for context, counts in followers.items()}
    bits = 0.0
    for at, token in enumerate(held_out):
        p = 1 / characters
        for width in range(min(at, ORDER - 1) + 1):
            context = tuple(held_out[at - width : at])
            counts = followers.get(context)
            if counts is None:
                break
            p = (counts[token] + len(counts) * p) / (totals[context] + len(counts))
        bits -= math.log2(p)
    return bits / len(held_out)


def sample(bundle: Bundle, prompt: str, steps: int, temperature: float = 0.6) -> str:
    """Text the model goes on with after a prompt."""
    labels = bundle.spec.input.labels
    assert labels is not None
    network = bundle.network()
    random = torch.Generator().manual_seed(SEED)
    carry, rows = network.run(torch.tensor(text.encode(prompt, labels))[:, None])
    row, written = rows[-1], prompt
    for _ in range(steps):
        token = torch.multinomial((row / temperature).softmax(-1)[0], 1, generator=random)
        written += labels[int(token)]
        carry, row = network.step(carry, token)
    return written


def report(bundle: Bundle) -> None:
    """Prints the held-out table of the card, and some generated text."""
    labels = bundle.spec.input.labels
    assert labels is not None
    learned, held_out = (text.encode(part, labels) for part in text.corpus())
    print(
        f"{len(learned)} characters to learn from, {len(held_out)} held out, {len(labels)} labels"
    )
    print("| model | bits per character |\n|---|---|")
    print(f"| letters | {bits_per_character(bundle, held_out):.3f} |")
    print(f"| interpolated {ORDER}-gram | {ngram_bits(learned, held_out, len(labels)):.3f} |")
    print(f"| unigram | {unigram_bits(learned, held_out, len(labels)):.3f} |")
    print(sample(bundle, "The function returns ", 400))


def main() -> None:
    """Trains, writes the bundle and prints its held-out scores."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write the bundle to")
    arguments = parser.parse_args()
    learned, _ = text.corpus()
    labels = text.alphabet(learned)
    network = train(torch.tensor(text.encode(learned, labels)), len(labels))
    bundle = export(network, labels, arguments.out)
    report(bundle)
    print(bundle.digest)


if __name__ == "__main__":
    main()
