"""PyTorch: what a state dict, or a module, says in the bundle's terms.

`torch_file` reads the files, `torch_parts` groups the tensors, `torch_order` finds out how the
groups stand, and here they become a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from conveyor_models.importers import folding
from conveyor_models.importers.common import ImportedModel, refused
from conveyor_models.importers.folding import Affine
from conveyor_models.importers.options import NO_OPTIONS, NOTHING, ImportOptions
from conveyor_models.importers.torch_cells import recurrent_modules
from conveyor_models.importers.torch_order import Reading, reading_of
from conveyor_models.importers.torch_parts import Parts, by_module, parts_of, shown_name

RecurrentModule: TypeAlias = nn.LSTM | nn.GRU | nn.RNN | nn.LSTMCell | nn.GRUCell | nn.RNNCell


def weights_from_torch(
    stack: RecurrentModule | Sequence[RecurrentModule],
    *,
    embedding: nn.Embedding | None = None,
    head: nn.Linear | None = None,
) -> dict[str, Tensor]:
    """The weights of a trained network under the names of the bundle format.

    Args:
        stack: one `nn.LSTM`, `nn.GRU` or `nn.RNN` of any number of layers, or a cell of these, or
            several stacked on each other.
        embedding: the table of a model that reads tokens.
        head: the linear layer after the stack.

    Returns:
        Float32 tensors on the CPU that share no memory with the modules. Float64 is rounded.

    Raises:
        UnsupportedModuleError: the embedding rescales its rows.
    """
    model = ImportedModel()
    if embedding is not None:
        if embedding.max_norm is not None:
            raise refused("embedding", "max_norm is not supported")
        model.embedding = embedding.weight.detach().cpu().float().clone()
    for module in [stack] if isinstance(stack, nn.Module) else stack:
        state = {name: each.detach().cpu().float() for name, each in module.named_parameters()}
        for found in recurrent_modules(state).values():
            model.layers += found.layers(_kind(module))
    if head is not None:
        model.head = head.weight.detach().cpu().float().clone()
        if head.bias is not None:  # pyright: ignore[reportUnnecessaryComparison]
            model.head_bias = head.bias.detach().cpu().float().clone()
    return {name: tensor.clone() for name, tensor in model.weights.items()}


def _kind(module: RecurrentModule) -> str:
    """One of `options.CELLS`."""
    match module:
        case nn.LSTMCell():
            return "lstm"
        case nn.GRUCell():
            return "gru"
        case nn.RNNCell():
            return f"rnn-{module.nonlinearity}"
        case _:
            return module.mode.lower().replace("_", "-")  # LSTM, GRU, RNN_TANH or RNN_RELU


def model_from_state(
    state: Mapping[str, Tensor], options: ImportOptions = NO_OPTIONS
) -> ImportedModel:
    """What a state dict was the state of.

    Args:
        state: name -> tensor; everything in it has to have a place.
        options: what shapes do not tell.

    Raises:
        AmbiguousModuleError: it can be understood in several ways, and an option has to decide.
        UnsupportedModuleError: a tensor has no place in a bundle.
    """
    parts = parts_of(state, options)
    kinds = by_module("--cell", options.cells, parts.recurrent)
    layers = {
        name: module.layers(kinds.get(name, options.cells.get("")))
        for name, module in parts.recurrent.items()
    }
    reading = reading_of(parts, options)
    model = ImportedModel(activation=options.activation or "none")
    if reading.embedding is not None:
        model.embedding = parts.matrices[reading.embedding].weight
    maps: list[Affine] = []
    epsilon = by_module("--epsilon", options.epsilon, parts.norms)
    for name in reading.chain:
        if name in parts.recurrent:
            found = layers[name]
            if maps:
                found = [folding.into_layer(folding.chained(maps), found[0]), *found[1:]]
                model.notes.append(folding.note_of(folding.chained(maps), shown_name(name)))
            model.layers, maps = [*model.layers, *found], []
        else:
            maps.append(_affine(name, parts, epsilon.get(name, options.epsilon.get("", 0.0))))
    _add_head(model, parts, reading, maps)
    model.notes += _assumptions(parts, reading, options)
    return model


def _affine(name: str, parts: Parts, epsilon: float) -> Affine:
    matrix, norm, shown = parts.matrices.get(name), parts.norms.get(name), shown_name(name)
    if matrix is not None:
        return folding.linear(shown, matrix.weight, matrix.bias)
    assert norm is not None
    return folding.batch_norm(shown, norm.mean, norm.variance, epsilon, norm.weight, norm.bias)


def _add_head(model: ImportedModel, parts: Parts, reading: Reading, maps: list[Affine]) -> None:
    """Makes one head of the maps after the stack and the linear layers that end it."""
    heads = [parts.matrices[name] for name in reading.heads]
    if len(heads) > 1:
        if model.activation in ("softmax", "log_softmax"):
            raise refused(
                f"--activation {model.activation}",
                f"would run over the outputs of {', '.join(reading.heads)} together; say"
                " --activation none, and compute it where the outputs are used",
            )
        model.notes.append(_rows_of_heads(parts, reading))
    if heads:
        model.head = torch.cat([head.weight for head in heads])
        if any(head.bias is not None for head in heads):
            biases = [
                head.weight.new_zeros(head.weight.shape[0]) if head.bias is None else head.bias
                for head in heads
            ]
            model.head_bias = torch.cat(biases)
    if maps:
        name = "+".join(shown_name(each) for each in reading.heads) or "the head"
        whole = folding.chained(maps)
        model.notes.append(folding.note_of(whole, name))
        if model.head is not None:
            whole = folding.linear(name, model.head, model.head_bias).after(whole)
        model.head, model.head_bias = whole.as_linear()


def _rows_of_heads(parts: Parts, reading: Reading) -> str:
    """Which outputs are whose."""
    said: list[str] = []
    begin = 0
    for name in reading.heads:
        end = begin + parts.matrices[name].weight.shape[0]
        said.append(
            f"{begin} to {end - 1} are {name}'s" if end - begin > 1 else f"{begin} is {name}'s"
        )
        begin = end
    return f"several heads side by side: of the outputs, counted from 0, {', '.join(said)}"


def _assumptions(parts: Parts, reading: Reading, options: ImportOptions) -> list[str]:
    """What was taken for granted, for a state dict cannot say it."""
    one_by_one = reading.names[: len(reading.names) - len(reading.heads)]
    way = [shown_name(name) for name in one_by_one]
    if reading.embedding is not None:
        way[0] += " (an nn.Embedding)"
    if reading.heads:
        way.append(" beside ".join(shown_name(name) for name in reading.heads))
    assumed: list[str] = []
    said: list[str] = []
    if options.between == NOTHING:
        said = [f"as --between {NOTHING} says, nothing computes between {', '.join(way)}"]
    elif len(way) > 1:
        assumed.append(
            f"rows pass through {', then '.join(way)}, and nothing else computes on the way"
            " (dropout does nothing after training; a ReLU, a residual connection or a pooling over"
            " the steps would have been missed)"
        )
    if options.activation is None:
        assumed.append("no function follows at the end (--activation names one)")
    if assumed:
        said.append(f"assumed, because a state dict does not say it: {'; '.join(assumed)}")
    last = [name for name in reading.chain if name in parts.recurrent][-1]
    if reading.names[-1] != last and len(parts.recurrent[last].ways) > 1:
        said.append(
            f"{shown_name(last)} is bidirectional: what comes after it is taken to read both"
            " directions of each step; a module that reads h_n instead, where the reverse direction"
            " ends at the first step, gives other numbers"
        )
    said += [
        f"{shown_name(name)} is read as a cell of PyTorch that reads each row in turn and keeps its"
        " own state from step to step"
        for name, module in parts.recurrent.items()
        if module.is_cell
    ]
    return said
