"""The order of gates: blocks of rows brought from a framework's order into the bundle's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from conveyor_models.importers.common import refused

LSTM_GATES: Final = "ifgo"
"""The bundle's order of an LSTM's gates: input, forget, cell (g), output."""
GRU_GATES: Final = "rzn"
"""The bundle's order of a GRU's gates: reset, update, new."""


def blocks(tensor: Tensor, gates: str) -> dict[str, Tensor]:
    """The rows of each gate.

    Args:
        tensor: [G * H, ...], one block of H rows for each of the G gates.
        gates: a letter for each gate, in the order of the blocks.

    Returns:
        Letter -> [H, ...], views of `tensor`.

    Raises:
        UnsupportedModuleError: the rows do not divide into as many blocks, or a letter comes twice.

    Example:
        >>> blocks(torch.arange(4), "zr")["r"]
        tensor([2, 3])
    """
    rows = tensor.shape[0] if tensor.dim() else 0
    if not rows or len(set(gates)) != len(gates) or rows % len(gates):
        raise refused(
            f"gates {gates!r}",
            f"a tensor of shape {list(tensor.shape)}, expected as many rows for each gate",
        )
    return dict(zip(gates, tensor.chunk(len(gates)), strict=True))


def joined(parts: Mapping[str, Tensor], gates: str) -> Tensor:
    """The blocks one below the other; undoes `blocks`, in another order of gates if asked to.

    Args:
        parts: letter -> [H, ...], as `blocks` gives them.
        gates: the letters in the order wanted.

    Returns:
        [G * H, ...]

    Raises:
        UnsupportedModuleError: a letter has no block, or the blocks differ in shape.

    Example:
        >>> joined(blocks(torch.arange(4), "zr"), "rz")
        tensor([2, 3, 0, 1])
    """
    missing = [gate for gate in gates if gate not in parts]
    if missing or len({parts[gate].shape for gate in gates}) != 1:
        shapes = {gate: list(part.shape) for gate, part in parts.items()}
        raise refused(f"gates {gates!r}", f"blocks {shapes}, expected one of one shape for each")
    return torch.cat([parts[gate] for gate in gates])


def lstm_tensors(
    input_weight: Tensor, recurrent_weight: Tensor, bias: Tensor, gates: str
) -> dict[str, Tensor]:
    """The bundle's tensors of an LSTM, its gates brought into the bundle's order.

    Args:
        input_weight: [4 * H, I], what multiplies a row of I features.
        recurrent_weight: [4 * H, P], what multiplies h; P is H without a projection.
        bias: [4 * H]; where a framework has two, their sum.
        gates: the order of the four blocks of rows, of the letters of "ifgo": input, forget, cell
            (g), output. PyTorch has "ifgo", ONNX "iofg" and Keras "ifgo".

    Returns:
        `weight_input`, `weight_recurrent` and `bias` of one layer, to be stored under
        `layers.K.weight_input` and so on.

    Raises:
        UnsupportedModuleError: the shapes do not fit each other, or the letters are others.

    Example:
        >>> tensors = lstm_tensors(W, R, B[: 4 * H] + B[4 * H :], "iofg")  # of an ONNX node
    """
    given = {"weight_input": input_weight, "weight_recurrent": recurrent_weight, "bias": bias}
    _check_gates(gates, LSTM_GATES)
    _check_rows(given)
    return {name: joined(blocks(tensor, gates), LSTM_GATES) for name, tensor in given.items()}


def gru_tensors(
    weights: tuple[Tensor, Tensor], biases: tuple[Tensor, Tensor], gates: str, reset: str
) -> dict[str, Tensor]:
    """The bundle's tensors of a GRU, its gates brought into the bundle's order.

    Args:
        weights: what multiplies a row [3 * H, I], and what multiplies h [3 * H, H].
        biases: the one beside either, [3 * H] each; zeros where a framework has one alone.
        gates: the order of the three blocks of rows, of the letters of "rzn": reset, update, new.
            PyTorch has "rzn", ONNX and Keras "zrn" (they call n h).
        reset: "after" where the reset gate multiplies R h + b (PyTorch, Keras), "before" where it
            multiplies h (ONNX unless `linear_before_reset`); then the two biases of n are one.

    Returns:
        `weight_input`, `weight_recurrent` and `bias` of one layer, with "after" `bias_recurrent`
        as well, which is [H].

    Raises:
        UnsupportedModuleError: the shapes do not fit each other, or `gates` or `reset` is another.

    Example:
        >>> tensors = gru_tensors(
        ...     (kernel.T, recurrent_kernel.T), (bias[0], bias[1]), "zrn", "after"
        ... )  # of a GRU of Keras
    """
    _check_gates(gates, GRU_GATES)
    if reset not in ("after", "before"):
        raise refused(f"reset {reset!r}", "expected 'after' or 'before'")
    given = {"weight_input": weights[0], "weight_recurrent": weights[1]}
    if weights[1].dim() == 2 and weights[1].shape[0] != 3 * weights[1].shape[1]:
        raise refused("weight_recurrent", f"shape {list(weights[1].shape)}, expected [3 * H, H]")
    _check_rows(given | {"bias": biases[0]})
    _check_rows(given | {"bias": biases[1]})
    of_input, of_h = (blocks(each, gates) for each in biases)
    summed = {gate: of_input[gate] + of_h[gate] for gate in gates}
    if reset == "after":
        summed["n"] = of_input["n"]
    tensors = {name: joined(blocks(each, gates), GRU_GATES) for name, each in given.items()}
    tensors["bias"] = joined(summed, GRU_GATES)
    return tensors | ({"bias_recurrent": of_h["n"].clone()} if reset == "after" else {})


def _check_gates(gates: str, letters: str) -> None:
    if sorted(gates) != sorted(letters):
        raise refused(f"gates {gates!r}", f"expected the letters of {letters!r}, each once")


def _check_rows(given: Mapping[str, Tensor]) -> None:
    """Two matrices and a bias have as many rows."""
    dims = {"weight_input": 2, "weight_recurrent": 2, "bias": 1}
    rows = given["weight_recurrent"].shape[0] if given["weight_recurrent"].dim() else 0
    for name, tensor in given.items():
        if tensor.dim() != dims[name] or tensor.shape[0] != rows:
            raise refused(
                name,
                f"shape {list(tensor.shape)}, expected [{rows}{', any' if dims[name] == 2 else ''}]"
                " beside the recurrent weight",
            )
