"""The last states of both directions, brought together in one row.

A classifier often reads [h forward ; h reverse], the states that the two directions end with. The
forward one is in the last row of a bidirectional layer, and the reverse one in the first. A small
relu layer on top keeps what it reads in the first row, so that the last row has both:

    z(t) = relu(1)                     1; before the first step it is 0, as all states are
    m(t) = relu(u(t) - K z(t-1))       u(0) in the first step, and 0 in all others as u < K
    p(t) = relu(m(t-1) + p(t-1))       from the second step on, what m was in the first
    v(t) = relu(w(t))                  w passes through

u and w are what the head adds up of the reverse and of the forward state; u(0) is m(t) + p(t) in
every step. As relu drops what is negative, each of them takes two units, one for -u or -w. K is
only ever subtracted where the result is 0, so nothing is rounded.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from conveyor_models.importers import folding
from conveyor_models.importers.common import ImportedLayer
from conveyor_models.importers.folding import Affine

NUMBERS_MAX: Final = 512
"""Kept of the first row: the layer has six units for each, and a square of weights."""
K: Final = 2.0**100
"""No state is larger; float32 ends at 2^128."""


def ends_joined(
    name: str, layers: tuple[ImportedLayer, ImportedLayer], head: Affine
) -> tuple[ImportedLayer, Affine] | None:
    """A layer and a head, after which the last row is what `head` makes of the two last states.

    Args:
        name: for the layer.
        layers: forward and reverse, of a bidirectional layer.
        head: reads [h forward ; h reverse].

    Returns:
        None where the layer would be too large.
    """
    forward, reverse = (layer.output_size for layer in layers)
    weight = head.weight if head.weight.dim() == 2 else head.weight.diag()
    reads = weight[:, :forward], weight[:, forward:]
    writes = (torch.eye(head.output_size).double(),) * 2
    if head.output_size > reverse:
        # Fewer numbers are kept where the head comes afterwards.
        writes, reads = reads, (torch.eye(forward).double(), torch.eye(reverse).double())
    if max(len(each) for each in reads) > NUMBERS_MAX:
        return None
    tensors = _tensors(name, *reads)
    size = len(tensors["bias"])
    layer = ImportedLayer(name, {"cell": "rnn", "nonlinearity": "relu", "size": size}, tensors)
    passed, kept = writes
    whole = torch.cat((passed, -passed, kept, -kept, kept, -kept, kept.new_zeros(len(kept), 1)), 1)
    return layer, Affine(head.name, whole, head.bias)


def _tensors(name: str, passed: Tensor, kept: Tensor) -> dict[str, Tensor]:
    """Units in the order v, m, p, each with its opposite, and z.

    Args:
        name: of the layer.
        passed: [numbers, forward] makes w of the forward state.
        kept: [numbers, reverse] makes u of the reverse state.
    """
    v = slice(0, 2 * len(passed))
    m = slice(v.stop, v.stop + 2 * len(kept))
    p = slice(m.stop, m.stop + 2 * len(kept))
    size, forward = p.stop + 1, passed.shape[1]
    weight = torch.zeros(size, forward + kept.shape[1], dtype=torch.float64)
    weight[v, :forward] = torch.cat((passed, -passed))
    weight[m, forward:] = torch.cat((kept, -kept))
    recurrent = torch.zeros(size, size, dtype=torch.float64)
    recurrent[m, -1] = -K
    recurrent[p, m] = recurrent[p, p] = torch.eye(2 * len(kept)).double()
    bias = torch.zeros(size, dtype=torch.float64)
    bias[-1] = 1
    found = {"weight_input": weight, "weight_recurrent": recurrent, "bias": bias}
    return {key: folding.rounded(name, tensor) for key, tensor in found.items()}
