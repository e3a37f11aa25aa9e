"""Canonical weights from PyTorch modules."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from conveyor_models.errors import UnsupportedModuleError


def weights_from_torch(
    stack: nn.LSTM | Sequence[nn.LSTM],
    *,
    embedding: nn.Embedding | None = None,
    head: nn.Linear | None = None,
) -> dict[str, Tensor]:
    """The weights of a trained network under the names of the bundle format.

    PyTorch keeps its gates in our order (i, f, g, o) but has two biases, which are added here.

    Args:
        stack: one `nn.LSTM` of any number of layers, or several stacked on each other.
        embedding: the table of a model that reads tokens.
        head: the linear layer after the stack.

    Returns:
        Float32 tensors on the CPU that share no memory with the modules.

    Raises:
        UnsupportedModuleError: an LSTM is bidirectional, or the embedding rescales its rows.
    """
    weights: dict[str, Tensor] = {}
    if embedding is not None:
        if embedding.max_norm is not None:
            raise UnsupportedModuleError("embedding: max_norm is not supported", key="embedding")
        weights["embedding.weight"] = embedding.weight
    index = 0
    for lstm in [stack] if isinstance(stack, nn.LSTM) else stack:
        if lstm.bidirectional:
            raise UnsupportedModuleError(
                f"layers.{index}: a bidirectional LSTM cannot be streamed", key=f"layers.{index}"
            )
        for layer in range(lstm.num_layers):
            for name, tensor in _layer(lstm, layer).items():
                weights[f"layers.{index}.{name}"] = tensor
            index += 1
    if head is not None:
        weights["head.weight"] = head.weight
        if head.bias is not None:  # pyright: ignore[reportUnnecessaryComparison]
            weights["head.bias"] = head.bias
    return {name: tensor.detach().cpu().float().clone() for name, tensor in weights.items()}


def _layer(lstm: nn.LSTM, layer: int) -> dict[str, Tensor]:
    state: dict[str, Tensor] = dict(lstm.named_parameters())
    recurrent = state[f"weight_hh_l{layer}"]
    weights = {
        "weight_input": state[f"weight_ih_l{layer}"],
        "weight_recurrent": recurrent,
        "bias": recurrent.new_zeros(recurrent.shape[0]),
    }
    if lstm.bias:
        weights["bias"] = state[f"bias_ih_l{layer}"] + state[f"bias_hh_l{layer}"]
    if lstm.proj_size:
        weights["weight_projection"] = state[f"weight_hr_l{layer}"]
    return weights
