"""A whole model, step by step: embedding, attention, stack of cells, head, activation.

Plain torch in any dtype. It is the reference for the server's engine, and enough to try a bundle by
hand.
Letters for dims: T steps, B sessions, F features, V tokens, E embedding, O outputs, M rows of
memory, A numbers in such a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias, cast

import torch
from torch import Tensor

from conveyor_models.attention import AttentionWeights, Memory, attend, attention_memory
from conveyor_models.cells import (
    CellWeights,
    GateFunction,
    GruWeights,
    HiddenCarry,
    LayerCarry,
    LstmCarry,
    LstmWeights,
    RnnWeights,
    gru_cell,
    lstm_cell,
    rnn_cell,
)
from conveyor_models.layers import GatedLayer, GruLayer, LstmLayer, RecurrentLayer, RnnLayer
from conveyor_models.spec import AttentionSpec, ModelSpec

Carry: TypeAlias = tuple[LayerCarry, ...]
"""One part per layer, from the input upwards."""


def cell_weights(layer: RecurrentLayer, tensors: Mapping[str, Tensor]) -> CellWeights:
    """What a cell needs, from a layer's tensors of one direction, named as in the bundle.

    Args:
        layer: what model.toml says of it.
        tensors: those that `layer.weight_shapes` names, without a direction's prefix.
    """
    slope = None
    if isinstance(layer, GatedLayer) and layer.gate_activation == "hard_sigmoid":
        slope = layer.hard_sigmoid_slope
    function = GateFunction(slope, layer.clip)
    joined = {
        "input": tensors["weight_input"],
        "recurrent": tensors["weight_recurrent"],
        "bias": tensors["bias"],
    }
    match layer:
        case LstmLayer():
            return LstmWeights(
                **joined,
                projection=tensors.get("weight_projection"),
                peephole_input=tensors.get("peephole_input"),
                peephole_forget=tensors.get("peephole_forget"),
                peephole_output=tensors.get("peephole_output"),
                coupled=layer.coupled,
                function=function,
            )
        case GruLayer():
            return GruWeights(
                **joined, bias_recurrent=tensors.get("bias_recurrent"), function=function
            )
        case RnnLayer():
            return RnnWeights(**joined, nonlinearity=layer.nonlinearity, function=function)
        case _:
            raise AssertionError(layer)


def attention_weights(spec: AttentionSpec, weights: Mapping[str, Tensor]) -> AttentionWeights:
    """What the attention needs, from a model's tensors."""
    return AttentionWeights(
        query=weights["attention.weight_query"],
        memory=weights["attention.weight_memory"],
        bias=weights["attention.bias"],
        score=weights["attention.score"],
        gate=weights["attention.weight_gate"] if spec.gate else None,
        bias_gate=weights["attention.bias_gate"] if spec.gate else None,
    )


def layer_tensors(weights: Mapping[str, Tensor], number: int, prefix: str) -> dict[str, Tensor]:
    """One layer's tensors of one direction, under their names within the layer.

    Args:
        weights: the model's.
        number: of the layer, from 0 at the bottom.
        prefix: of the direction, as `RecurrentLayer.directions` has it.
    """
    start = f"layers.{number}.{prefix}"
    found = {
        name.removeprefix(start): each for name, each in weights.items() if name.startswith(start)
    }
    return {name: tensor for name, tensor in found.items() if "." not in name}


@dataclass(frozen=True, slots=True, eq=False)
class _Linear:
    weight: Tensor  # [O, P]
    bias: Tensor | None  # [O]

    def __call__(self, x: Tensor) -> Tensor:
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


@dataclass(frozen=True, slots=True, eq=False)
class _Pass:
    """One layer in one direction."""

    weights: CellWeights
    initial: LayerCarry  # each part [1, size]
    backwards: bool

    def begin(self, batch: int) -> LayerCarry:
        if isinstance(self.initial, LstmCarry):
            return LstmCarry(
                self.initial.h.expand(batch, -1).clone(), self.initial.c.expand(batch, -1).clone()
            )
        return HiddenCarry(self.initial.h.expand(batch, -1).clone())

    def step(self, carry: LayerCarry, x: Tensor) -> tuple[LayerCarry, Tensor]:
        match self.weights:
            case LstmWeights():
                return lstm_cell(self.weights, cast("LstmCarry", carry), x)
            case GruWeights():
                return gru_cell(self.weights, cast("HiddenCarry", carry), x)
            case RnnWeights():
                return rnn_cell(self.weights, cast("HiddenCarry", carry), x)

    def run(self, x: Tensor) -> Tensor:
        """[T, B, I] -> [T, B, P], from the beginning, or from the end for what runs backwards."""
        carry = self.begin(x.shape[1])
        rows: list[Tensor] = []
        for row in x.flip(0) if self.backwards else x:
            carry, y = self.step(carry, row)
            rows.append(y)
        return torch.stack(rows[::-1] if self.backwards else rows)


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
        cast_weights = {name: weights[name].to(dtype) for name in spec.weight_shapes}
        self.spec = spec
        self.dtype = dtype
        self._embedding = cast_weights.get("embedding.weight")  # [V, E]
        self._layers = tuple(
            tuple(
                _pass(layer, layer_tensors(cast_weights, number, prefix), prefix, dtype)
                for prefix in layer.directions
            )
            for number, layer in enumerate(spec.layers)
        )
        self._attention = (
            None if spec.attention is None else attention_weights(spec.attention, cast_weights)
        )
        self._head = (
            None
            if spec.head is None
            else _Linear(cast_weights["head.weight"], cast_weights.get("head.bias"))
        )

    def initial_carry(self, batch: int) -> Carry:
        """The carry of `batch` new sessions: zeros, or what the weights hold."""
        return tuple(passes[0].begin(batch) for passes in self._layers)

    def memory(self, rows: Tensor, lengths: Tensor | None = None) -> Memory:
        """Prepares what a batch of sessions attends over.

        Args:
            rows: [B, M, A].
            lengths: how many rows of each session exist, [B]; all of them if not given.
        """
        assert self._attention is not None, "the model has no attention"
        return attention_memory(self._attention, rows.to(self.dtype), lengths)

    def step(self, carry: Carry, x: Tensor, memory: Memory | None = None) -> tuple[Carry, Tensor]:
        """One step of every session in the batch.

        Args:
            carry: the carry after the step before.
            x: tokens [B], any integer dtype, or features [B, F].
            memory: from `memory`, for a model with attention.

        Returns:
            The new carry, and the output rows [B, O].
        """
        assert self.spec.streamable, "the model has layers that run from the end"
        y, z = self._embed(x), None
        if self._attention is not None:
            assert memory is not None, "the model attends over a memory"
            z, _ = attend(self._attention, memory, carry[-1].h)
            y = torch.cat((y, z), dim=-1)
        parts: list[LayerCarry] = []
        for (layer,), before in zip(self._layers, carry, strict=True):
            after, y = layer.step(before, y)
            parts.append(after)
        return tuple(parts), self._output(y, z)

    def run(
        self, x: Tensor, carry: Carry | None = None, memory: Memory | None = None
    ) -> tuple[Carry, Tensor]:
        """Many steps of every session in the batch.

        Args:
            x: tokens [T, B] or features [T, B, F], T at least 1.
            carry: where to go on from; the initial carry if not given.
            memory: as in `step`.

        Returns:
            The carry after the last step, and all output rows [T, B, O].
        """
        carry = self.initial_carry(x.shape[1]) if carry is None else carry
        rows: list[Tensor] = []
        for row in x:
            carry, y = self.step(carry, row, memory)
            rows.append(y)
        return carry, torch.stack(rows)

    def predict(self, x: Tensor) -> Tensor:
        """Whole sequences, also through layers that run from the end.

        Args:
            x: tokens [T, B] or features [T, B, F], T at least 1.

        Returns:
            All output rows [T, B, O].
        """
        assert self._attention is None, "run a model with attention by `run`"
        y = self._embed(x)
        for passes in self._layers:
            y = torch.cat([each.run(y) for each in passes], dim=-1)
        return self._output(y, None)

    def _embed(self, x: Tensor) -> Tensor:
        return x.to(self.dtype) if self._embedding is None else self._embedding[x.long()]

    def _output(self, y: Tensor, z: Tensor | None) -> Tensor:
        if z is not None and self.spec.attention is not None and self.spec.attention.head:
            y = torch.cat((y, z), dim=-1)
        if self._head is not None:
            y = self._head(y)
        match self.spec.output.activation:
            case "none":
                return y
            case "softmax":
                return y.softmax(dim=-1)
            case "log_softmax":
                return y.log_softmax(dim=-1)
            case "sigmoid":
                return y.sigmoid()


def _pass(
    layer: RecurrentLayer, tensors: Mapping[str, Tensor], prefix: str, dtype: torch.dtype
) -> _Pass:
    parts = {
        name: tensors[f"initial_{name}"] if layer.initial_state else torch.zeros(shape, dtype=dtype)
        for name, shape in layer.carry_shapes.items()
    }
    h = parts["h"][None]
    initial = LstmCarry(h, parts["c"][None]) if "c" in parts else HiddenCarry(h)
    backwards = layer.direction == "reverse" or bool(prefix)
    return _Pass(cell_weights(layer, tensors), initial, backwards)
