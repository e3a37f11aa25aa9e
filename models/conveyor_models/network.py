"""A whole model, step by step: embedding, stack of cells, head, activation.

Plain torch in any dtype. It is the reference for the server's engine, and enough to try a bundle by
hand.
Letters for dims: T steps, B sessions, F features, V tokens, E embedding, O outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from conveyor_models.cells import LstmCarry, LstmWeights, lstm_cell
from conveyor_models.spec import ModelSpec

Carry: TypeAlias = tuple[LstmCarry, ...]
"""One part per layer, from the input upwards."""


@dataclass(frozen=True, slots=True, eq=False)
class _Linear:
    weight: Tensor  # [O, P]
    bias: Tensor | None  # [O]

    def __call__(self, x: Tensor) -> Tensor:
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class Network:
    """A spec and its weights, ready to step.

    Args:
        spec: the structure.
        weights: the tensors that `spec.weight_shapes` names.
        dtype: compute in this dtype; float64 makes it the reference. Float32 if not given.
    """

    def __init__(
        self, spec: ModelSpec, weights: Mapping[str, Tensor], dtype: torch.dtype = torch.float32
    ) -> None:
        cast = {name: weights[name].to(dtype) for name in spec.weight_shapes}
        self.spec = spec
        self.dtype = dtype
        self._embedding = cast.get("embedding.weight")  # [V, E]
        self._layers = tuple(
            LstmWeights(
                input=cast[f"layers.{index}.weight_input"],
                recurrent=cast[f"layers.{index}.weight_recurrent"],
                bias=cast[f"layers.{index}.bias"],
                projection=cast.get(f"layers.{index}.weight_projection"),
            )
            for index in range(len(spec.layers))
        )
        self._head = (
            None if spec.head is None else _Linear(cast["head.weight"], cast.get("head.bias"))
        )

    def initial_carry(self, batch: int) -> Carry:
        """The carry of `batch` sessions before their first step: zeros."""
        return tuple(
            LstmCarry(
                h=torch.zeros(batch, *shapes["h"], dtype=self.dtype),
                c=torch.zeros(batch, *shapes["c"], dtype=self.dtype),
            )
            for shapes in self.spec.carry_shapes
        )

    def step(self, carry: Carry, x: Tensor) -> tuple[Carry, Tensor]:
        """One step of every session in the batch.

        Args:
            carry: the carry after the step before.
            x: tokens [B], any integer dtype, or features [B, F].

        Returns:
            The new carry, and the output rows [B, O].
        """
        y = x.to(self.dtype) if self._embedding is None else self._embedding[x.long()]
        parts: list[LstmCarry] = []
        for weights, before in zip(self._layers, carry, strict=True):
            after, y = lstm_cell(weights, before, y)
            parts.append(after)
        if self._head is not None:
            y = self._head(y)
        return tuple(parts), self._activate(y)

    def run(self, x: Tensor, carry: Carry | None = None) -> tuple[Carry, Tensor]:
        """Many steps of every session in the batch.

        Args:
            x: tokens [T, B] or features [T, B, F], T at least 1.
            carry: where to go on from; the initial carry if not given.

        Returns:
            The carry after the last step, and all output rows [T, B, O].
        """
        carry = self.initial_carry(x.shape[1]) if carry is None else carry
        rows: list[Tensor] = []
        for row in x:
            carry, y = self.step(carry, row)
            rows.append(y)
        return carry, torch.stack(rows)

    def _activate(self, y: Tensor) -> Tensor:
        match self.spec.output.activation:
            case "none":
                return y
            case "softmax":
                return y.softmax(dim=-1)
            case "log_softmax":
                return y.log_softmax(dim=-1)
            case "sigmoid":
                return y.sigmoid()
