"""PyTorch: what a state dict, or a module, says in the bundle's terms.

PyTorch keeps its gates as i, f, g, o and r, z, n, with two biases beside each, and its GRU has the
reset gate after the product. `torch_file` reads the files.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from torch import Tensor, nn

from conveyor_models.importers.common import (
    ImportedLayer,
    ImportedModel,
    exact_float32,
    gru_tensors,
    listed,
    lstm_tensors,
    refused,
    two_ways,
)
from conveyor_models.importers.options import NO_OPTIONS, ImportOptions

RecurrentModule: TypeAlias = nn.LSTM | nn.GRU | nn.RNN

MODULES_MAX: Final = 64
_PART: Final = re.compile(
    r"(?:(?P<module>.+)\.)?(?P<part>(?:weight_(?:ih|hh|hr)|bias_(?:ih|hh)))"
    r"_l(?P<layer>[0-9]{1,3})(?P<reverse>_reverse)?"
)
_KINDS: Final = {4: "lstm", 3: "gru", 1: "rnn"}
"""Blocks of rows -> cell."""
_EMBEDDING_WORDS: Final = ("emb", "lookup", "vocab", "wte")
_HEAD_WORDS: Final = ("head", "out", "fc", "decoder", "classif", "readout", "logit")
_HEAD_WORDS_LOOSE: Final = (*_HEAD_WORDS, "lin", "dense", "proj")


def weights_from_torch(
    stack: RecurrentModule | Sequence[RecurrentModule],
    *,
    embedding: nn.Embedding | None = None,
    head: nn.Linear | None = None,
) -> dict[str, Tensor]:
    """The weights of a trained network under the names of the bundle format.

    Args:
        stack: one `nn.LSTM`, `nn.GRU` or `nn.RNN` of any number of layers, or several stacked on
            each other.
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
        kind = module.mode.lower().replace("_", "-")  # LSTM, GRU, RNN_TANH or RNN_RELU
        for found in _modules(state).values():
            model.layers += found.layers(kind)
    if head is not None:
        model.head = head.weight.detach().cpu().float().clone()
        if head.bias is not None:  # pyright: ignore[reportUnnecessaryComparison]
            model.head_bias = head.bias.detach().cpu().float().clone()
    return {name: tensor.clone() for name, tensor in model.weights.items()}


def model_from_state(
    state: Mapping[str, Tensor], options: ImportOptions = NO_OPTIONS
) -> ImportedModel:
    """What a state dict was the state of.

    Args:
        state: name -> tensor; everything in it has to have a place.
        options: what shapes and names do not tell.

    Raises:
        UnsupportedModuleError: a tensor has no place in a bundle, or could have several.
    """
    exact = {name: exact_float32(name, tensor) for name, tensor in state.items()}
    modules = _modules(exact)
    if not modules:
        raise refused("state dict", "holds no nn.LSTM, nn.GRU or nn.RNN")
    order = _in_order(modules, options.order)
    model = ImportedModel(activation=options.activation or "none")
    for name in order:
        model.layers += modules[name].layers(_kind_wanted(name, modules, options))
    used = {key for module in modules.values() for key in module.keys}
    rest = {name: tensor for name, tensor in exact.items() if name not in used}
    _place_rest(model, rest, options)
    model.notes.append(
        "a state dict does not say what lies between its modules: dropout is rightly ignored,"
        " a function without weights would be missed"
    )
    return model


# --- Recurrent modules ---------------------------------------------------------------------------


@dataclass(slots=True)
class _Module:
    """One nn.LSTM, nn.GRU or nn.RNN, as its tensors show it."""

    name: str
    parts: dict[tuple[int, bool], dict[str, Tensor]]
    """(layer, whether it runs from the end) -> weight_ih and so on -> tensor."""
    keys: list[str]

    def layers(self, wanted: str | None) -> list[ImportedLayer]:
        """Its layers, of the kind wanted where the shapes leave the choice."""
        numbers = sorted({number for number, _ in self.parts})
        if numbers != list(range(len(numbers))):
            raise refused(self.name or "state dict", f"has layers {numbers}, one is missing")
        ways = (False, True) if any(reverse for _, reverse in self.parts) else (False,)
        layers: list[ImportedLayer] = []
        for number in numbers:
            name = f"{self.name}.l{number}" if self.name else f"l{number}"
            if any((number, way) not in self.parts for way in ways):
                raise refused(name, "one of its two directions is missing")
            found = [_one_way(name, self.parts[number, way], wanted) for way in ways]
            layers.append(found[0] if len(found) == 1 else two_ways(*found, name=name))
        for below, layer in itertools.pairwise(layers):
            if layer.input_size != below.output_size:
                raise refused(
                    layer.name, f"reads {layer.input_size}, expected {below.output_size} numbers"
                )
        return layers

    @property
    def sizes(self) -> tuple[int, int]:
        """What it reads and what it puts out, for the order of several."""
        last = max(number for number, _ in self.parts)
        first = self.parts.get((0, False), {}).get("weight_ih")
        recurrent = self.parts.get((last, False), {}).get("weight_hh")
        if first is None or recurrent is None or first.dim() != 2 or recurrent.dim() != 2:
            raise refused(self.name or "state dict", "its weights are not complete")
        both = 2 if (last, True) in self.parts else 1
        return first.shape[1], both * recurrent.shape[1]


def _modules(state: Mapping[str, Tensor]) -> dict[str, _Module]:
    found: dict[str, _Module] = {}
    for key, tensor in state.items():
        match = _PART.fullmatch(key)
        if match is None:
            continue
        name = match["module"] or ""
        module = found.setdefault(name, _Module(name, {}, []))
        module.keys.append(key)
        place = int(match["layer"]), match["reverse"] is not None
        module.parts.setdefault(place, {})[match["part"]] = tensor
    if len(found) > MODULES_MAX:
        raise refused("state dict", f"{len(found)} recurrent modules, at most {MODULES_MAX}")
    return found


def _one_way(name: str, parts: Mapping[str, Tensor], wanted: str | None) -> ImportedLayer:
    """One direction of one layer."""
    kind, size = _kind_and_size(name, parts)
    _check_shapes(name, parts, size * {"lstm": 4, "gru": 3, "rnn": 1}[kind])
    of_input, of_h = parts["weight_ih"], parts["weight_hh"]
    none = of_h.new_zeros(of_h.shape[0])
    biases = parts.get("bias_ih", none), parts.get("bias_hh", none)
    table: dict[str, object] = {"cell": kind, "size": size}
    if wanted is not None and wanted.partition("-")[0] != kind:
        raise refused(name, f"has the shapes of {kind}, not of {wanted}")
    if kind == "lstm":
        tensors = lstm_tensors(of_input, of_h, biases[0] + biases[1], "ifgo")
        if "weight_hr" in parts:
            table["projection"] = parts["weight_hr"].shape[0]
            tensors["weight_projection"] = parts["weight_hr"].clone()
    elif kind == "gru":
        tensors = gru_tensors((of_input, of_h), biases, "rzn", "after")
    else:
        tensors = {"weight_input": of_input.clone(), "weight_recurrent": of_h.clone()}
        tensors["bias"] = biases[0] + biases[1]
        if wanted is None:
            raise refused(name, "an nn.RNN: say --cell rnn-tanh or --cell rnn-relu")
        if wanted == "rnn-relu":
            table["nonlinearity"] = "relu"
    return ImportedLayer(name, table, tensors)


def _kind_and_size(name: str, parts: Mapping[str, Tensor]) -> tuple[str, int]:
    for part in ("weight_ih", "weight_hh"):
        if part not in parts or parts[part].dim() != 2:
            raise refused(name, f"{part} is missing or not a matrix")
    rows, hidden = parts["weight_hh"].shape
    projection = parts.get("weight_hr")
    if projection is not None:
        if projection.dim() != 2 or projection.shape[0] != hidden:
            raise refused(name, f"weight_hr: {list(projection.shape)}, expected {hidden} rows")
        if rows != 4 * projection.shape[1]:
            raise refused(name, "has a projection and not the four gates of nn.LSTM")
        return "lstm", projection.shape[1]
    count, left = divmod(rows, hidden) if hidden else (0, 1)
    if left or count not in _KINDS:
        raise refused(
            name, f"weight_hh: {rows} rows of {hidden}, which is no nn.LSTM, nn.GRU or nn.RNN"
        )
    return _KINDS[count], hidden


def _check_shapes(name: str, parts: Mapping[str, Tensor], rows: int) -> None:
    if parts["weight_ih"].shape[0] != rows:
        raise refused(name, f"weight_ih: {parts['weight_ih'].shape[0]} rows, expected {rows}")
    if ("bias_ih" in parts) != ("bias_hh" in parts):
        raise refused(name, "one of the two biases is missing")
    for part in ("bias_ih", "bias_hh"):
        if part in parts and parts[part].shape != (rows,):
            raise refused(name, f"{part}: shape {list(parts[part].shape)}, expected [{rows}]")


def _kind_wanted(name: str, modules: Mapping[str, _Module], options: ImportOptions) -> str | None:
    for module in options.cells:
        if module and module not in modules:
            raise refused(module, f"--cell names it; there is {listed(sorted(modules))}")
    return options.cells.get(name, options.cells.get(""))


def _in_order(modules: Mapping[str, _Module], wanted: Sequence[str]) -> list[str]:
    """From the input upwards."""
    if wanted:
        if sorted(wanted) != sorted(modules):
            raise refused(",".join(wanted), f"--order has to name {', '.join(sorted(modules))}")
        return list(wanted)
    if len(modules) == 1:
        return list(modules)
    names = sorted(modules)
    said = f"several recurrent modules: say --order {','.join(names)}, from the input upwards"
    if len(modules) > 6:
        raise refused(listed(names), said)
    sizes = {name: module.sizes for name, module in modules.items()}
    chains = _chains(sizes, [])
    if len(chains) != 1:
        raise refused(listed(names), said)
    return chains[0]


def _chains(sizes: Mapping[str, tuple[int, int]], begun: list[str]) -> list[list[str]]:
    """All orders in which each reads what the one before puts out."""
    if len(begun) == len(sizes):
        return [begun]
    fitting = [
        name
        for name in sizes
        if name not in begun and (not begun or sizes[begun[-1]][1] == sizes[name][0])
    ]
    return [chain for name in fitting for chain in _chains(sizes, [*begun, name])]


# --- Embedding and head --------------------------------------------------------------------------


def _place_rest(model: ImportedModel, rest: Mapping[str, Tensor], options: ImportOptions) -> None:
    """Finds the embedding and the head; nothing may be left over."""
    matrices = {
        name.removesuffix("weight").removesuffix("."): tensor
        for name, tensor in rest.items()
        if re.fullmatch(r"(?:.+\.)?weight", name) and tensor.dim() == 2
    }
    for flag, name in (("--embedding", options.embedding), ("--head", options.head)):
        if name is not None and name not in matrices:
            raise refused(name, f"{flag} names it; there is {listed(sorted(matrices)) or 'none'}")
    biased = {name for name in matrices if _key(name, "bias") in rest}
    embedding = options.embedding
    if embedding is None:
        embedding = _find_embedding(model, matrices, biased, options.head)
    if embedding is not None:
        model.embedding = matrices[embedding]
    others = {name: each for name, each in matrices.items() if name != embedding}
    head = options.head if options.head is not None else _find_head(model, others)
    placed = {_key(name, "weight") for name in (embedding, head) if name is not None}
    if head is not None:
        model.head = matrices[head]
        model.head_bias = rest.get(_key(head, "bias"))
        placed.add(_key(head, "bias"))
        if model.head_bias is not None and model.head_bias.shape != (model.head.shape[0],):
            raise refused(_key(head, "bias"), f"shape {list(model.head_bias.shape)}")
    left = sorted(rest.keys() - placed)
    if left:
        raise refused(left[0], f"has no place in a bundle (left over: {listed(left)})")


def _key(module: str, part: str) -> str:
    return f"{module}.{part}" if module else part


def _last(name: str) -> str:
    return name.rpartition(".")[2].lower()


def _has(name: str, words: Sequence[str]) -> bool:
    return any(word in _last(name) for word in words)


def _find_embedding(
    model: ImportedModel, matrices: Mapping[str, Tensor], biased: set[str], head: str | None
) -> str | None:
    reads, top = model.layers[0].input_size, model.layers[-1].output_size
    found = [
        name
        for name, each in matrices.items()
        if name not in biased and name != head and each.shape[1] == reads
    ]
    named = [name for name in found if _has(name, _EMBEDDING_WORDS)]
    if len(named) == 1:
        return named[0]
    if reads == top:  # these could be heads without bias as well
        found = [name for name in found if not _has(name, _HEAD_WORDS_LOOSE)]
        if found:
            raise refused(found[0], "an nn.Embedding or an nn.Linear: say --embedding or --head")
    if len(found) > 1:
        raise refused(listed(sorted(found)), "say which is the nn.Embedding with --embedding")
    if found and matrices[found[0]].shape[0] == reads:  # nn.Linear has no other shape there
        raise refused(
            found[0], "could be an nn.Linear before the recurrent layers; say --embedding if not"
        )
    return found[0] if found else None


def _find_head(model: ImportedModel, matrices: Mapping[str, Tensor]) -> str | None:
    top = model.layers[-1].output_size
    found = [name for name, each in matrices.items() if each.shape[1] == top]
    if len(found) > 1:
        raise refused(listed(sorted(found)), "say which is the nn.Linear at the end with --head")
    if not found:
        return None
    before = model.embedding is None and matrices[found[0]].shape[0] == model.layers[0].input_size
    if before and not _has(found[0], _HEAD_WORDS):
        raise refused(
            found[0], "could come before the recurrent layers; say --head if it comes after them"
        )
    return found[0]
