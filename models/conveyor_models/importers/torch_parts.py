"""What a state dict holds: its tensors, grouped into modules that a bundle can have.

A state dict is names and tensors. Here each tensor finds its module, by the names that PyTorch
gives its parts and by shape; what no bundle can hold is refused by name. Where the modules stand is
for `torch_order` to find out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, TypeVar

import torch
from torch import Tensor

from conveyor_models.errors import AmbiguousModuleError
from conveyor_models.importers.common import exact_float32, kind_of, listed, refused
from conveyor_models.importers.options import ImportOptions
from conveyor_models.importers.torch_cells import Recurrent, recurrent_modules

T = TypeVar("T")
ROOT: Final = "."
"""What the module whose tensors have no prefix is called in options and messages."""
NAME_CHARACTERS_MAX: Final = 500
_WRAPPERS: Final = ("module", "_orig_mod")
_STATISTICS: Final = ("running_mean", "running_var")
_INTEGERS: Final = (torch.int8, torch.uint8, torch.qint8, torch.quint8, torch.qint32)

_PARAMETRIZED: Final = re.compile(r"(?:(.+)\.)?parametrizations\.([^.]+)\..+")
_REWRITTEN: Final = re.compile(r"(?:(.+)\.)?(\w+)_(g|orig|raw)")
_UNDO: Final = {
    ("g", "v"): ("weight norm", "torch.nn.utils.remove_weight_norm(model.{}, {!r})"),
    ("orig", "mask"): ("pruning", "torch.nn.utils.prune.remove(model.{}, {!r})"),
    ("orig", "u"): ("spectral norm", "torch.nn.utils.remove_spectral_norm(model.{}, {!r})"),
}
"""Endings of the two tensors that a weight is computed from -> what does it, what undoes it."""


@dataclass(frozen=True, slots=True, eq=False)
class Matrix:
    """An nn.Linear or an nn.Embedding."""

    name: str
    weight: Tensor
    """[outputs, inputs] of an nn.Linear, [tokens, size] of an nn.Embedding."""
    bias: Tensor | None
    """[outputs]"""


@dataclass(frozen=True, slots=True, eq=False)
class Norm:
    """An nn.BatchNorm1d; each tensor is [size]."""

    name: str
    mean: Tensor
    variance: Tensor
    weight: Tensor | None
    bias: Tensor | None


@dataclass(frozen=True, slots=True)
class Parts:
    """The modules of a state dict, by name, in its order."""

    recurrent: dict[str, Recurrent]
    matrices: dict[str, Matrix]
    norms: dict[str, Norm]

    @property
    def names(self) -> list[str]:
        """Of all modules."""
        return [*self.recurrent, *self.matrices, *self.norms]


def parts_of(state: Mapping[str, Tensor], options: ImportOptions) -> Parts:
    """Groups the tensors of a state dict.

    Args:
        state: name -> tensor.
        options: `initial_state` names tensors that are no module's.

    Raises:
        AmbiguousModuleError: a tensor could be an initial state.
        UnsupportedModuleError: a tensor is of no module that a bundle can have.
    """
    for name in state:
        if len(name) > NAME_CHARACTERS_MAX or not name.isprintable():
            raise refused(
                repr(name[:80]),
                f"a name of {len(name)} characters, expected printable ones and at most"
                f" {NAME_CHARACTERS_MAX}",
            )
    _check_rewritten(state)
    rest = {
        name: _exact(name, tensor)
        for name, tensor in state.items()
        if not _counts_batches(name, state)
    }
    recurrent = recurrent_modules(rest)
    if not recurrent:
        raise refused(
            "state dict",
            "holds no nn.LSTM, nn.GRU or nn.RNN and no cell of these"
            f" (there is {listed(sorted(state)) or 'nothing'})",
        )
    for module in recurrent.values():
        for key in module.keys:
            del rest[key]
    _take_initial(recurrent, rest, options.initial_state)
    norms = _take_norms(rest)
    matrices = _take_matrices(rest)
    if rest:
        raise _without_place(rest, recurrent, options)
    return Parts(recurrent, matrices, norms)


def resolved(name: str, known: Iterable[str], flag: str) -> str:
    """The module that an option names.

    Args:
        name: the whole name or its last parts, with or without what wrappers add.
        known: the names of the file.
        flag: the option, for the message.

    Raises:
        UnsupportedModuleError: there is none, or there are several.
    """
    names = list(known)
    if name == ROOT and "" in names:
        return ""
    if name in names:
        return name
    short = _unwrapped(name)
    found = [each for each in names if f".{_unwrapped(each)}".endswith(f".{short}")]
    exact = [each for each in found if _unwrapped(each) == short]
    chosen = exact or found
    if len(chosen) != 1 or not short:
        there = "these are several" if len(chosen) > 1 else "there is"
        shown = listed([shown_name(each) for each in (chosen or sorted(names))]) or "none"
        raise refused(name, f"{flag} names it; {there} {shown}")
    return chosen[0]


def by_module(flag: str, given: Mapping[str, T], known: Iterable[str]) -> dict[str, T]:
    """What an option says of modules, by their names in the file; not what it says of all.

    Raises:
        UnsupportedModuleError: one is not there.
    """
    return {resolved(name, known, flag): value for name, value in given.items() if name}


def shown_name(name: str) -> str:
    """A module's name as an option takes it."""
    return name or ROOT


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _key(module: str, part: str) -> str:
    return f"{module}.{part}" if module else part


def _module(key: str) -> str:
    return key.rpartition(".")[0]


# --- Tensors that are not what they seem ---------------------------------------------------------


def _check_rewritten(state: Mapping[str, Tensor]) -> None:
    """Refuses weights that are computed from others before each use."""
    for key in state:
        match = _PARAMETRIZED.fullmatch(key)
        if match is not None:
            module, part = shown_name(match[1] or ""), match[2]
            raise refused(
                key,
                f"{part} of {module} is computed from it (weight norm, spectral norm or another"
                " parametrization); before saving call torch.nn.utils.parametrize."
                f"remove_parametrizations(model.{module}, {part!r})",
            )
        match = _REWRITTEN.fullmatch(key)
        if match is None:
            continue
        module, part = match[1] or "", match[2]
        for (ending, partner), (what, undo) in _UNDO.items():
            if match[3] == ending and f"{_key(module, part)}_{partner}" in state:
                raise refused(
                    key,
                    f"{part} of {shown_name(module)} is computed from it ({what}); before saving"
                    f" call {undo.format(shown_name(module), part)}",
                )
        if match[3] == "raw" and part.startswith("weight_"):
            raise refused(key, f"{part} of {shown_name(module)} is computed from it (weight drop)")


def _counts_batches(name: str, state: Mapping[str, Tensor]) -> bool:
    """Whether it is the counter of a batch normalisation, which evaluation does not use."""
    module, _, part = name.rpartition(".")
    return part == "num_batches_tracked" and _key(module, "running_mean") in state


def _exact(name: str, tensor: Tensor) -> Tensor:
    if tensor.is_quantized or tensor.dtype in _INTEGERS:
        raise refused(
            name,
            f"holds {kind_of(tensor.dtype)}: quantised; save the state dict before quantising",
        )
    return exact_float32(name, tensor)


# --- Modules -------------------------------------------------------------------------------------


def _take_initial(
    recurrent: Mapping[str, Recurrent], rest: dict[str, Tensor], wanted: Mapping[str, str]
) -> None:
    """Gives the tensors that --initial-state names to their modules."""
    for target, tensor_name in wanted.items():
        module_name, _, part = target.rpartition(".")
        flag = f"--initial-state {target}={tensor_name}"
        if module_name or ROOT in target:
            module = recurrent[resolved(module_name or ROOT, recurrent, flag)]
        elif len(recurrent) == 1:
            module = next(iter(recurrent.values()))
        else:
            raise refused(flag, f"say of which module: {listed(sorted(recurrent))}")
        if part in module.initial:
            raise refused(flag, f"the initial {part} of {module.shown} is given twice")
        key = resolved(tensor_name, rest, flag)
        module.initial[part] = _initial_rows(key, rest.pop(key), module, part)
    for module in recurrent.values():
        if "c" in module.initial and "h" not in module.initial:
            module.initial["h"] = torch.zeros(module.initial_shape("h"))
        elif "h" in module.initial and module.kind == "lstm":
            module.initial.setdefault("c", torch.zeros(module.initial_shape("c")))


def _initial_rows(key: str, tensor: Tensor, module: Recurrent, part: str) -> Tensor:
    rows, size = module.initial_shape(part)
    if not _fits_initial(tensor, (rows, size)):
        raise refused(
            key,
            f"shape {list(tensor.shape)} as the initial {part} of {module.shown},"
            f" expected [{rows}, 1, {size}]: one row for each layer and direction",
        )
    return tensor.reshape(rows, size)


def _fits_initial(tensor: Tensor, shape: tuple[int, int]) -> bool:
    rows, size = shape
    found = tuple(tensor.shape)
    return found in ((rows, 1, size), (rows, size)) or (rows == 1 and found == (size,))


def _take_norms(rest: dict[str, Tensor]) -> dict[str, Norm]:
    found: dict[str, Norm] = {}
    for name in [_module(key) for key in rest if key.rpartition(".")[2] == "running_mean"]:
        parts = {
            part: rest.pop(_key(name, part))
            for part in (*_STATISTICS, "weight", "bias")
            if _key(name, part) in rest
        }
        if "running_var" not in parts:
            raise refused(_key(name, "running_mean"), "has no running_var beside it")
        shapes = {tuple(tensor.shape) for tensor in parts.values()}
        if len(shapes) != 1 or len(next(iter(shapes))) != 1:
            raise refused(
                shown_name(name), "the tensors of this nn.BatchNorm1d differ in shape or are no row"
            )
        found[name] = Norm(
            name,
            parts["running_mean"],
            parts["running_var"],
            parts.get("weight"),
            parts.get("bias"),
        )
    return found


def _take_matrices(rest: dict[str, Tensor]) -> dict[str, Matrix]:
    found: dict[str, Matrix] = {}
    for key in [key for key in rest if key.rpartition(".")[2] == "weight"]:
        if rest[key].dim() != 2:
            continue
        name, weight = _module(key), rest.pop(key)
        bias = rest.pop(_key(name, "bias"), None)
        if bias is not None and bias.shape != (weight.shape[0],):
            raise refused(
                _key(name, "bias"), f"shape {list(bias.shape)}, expected [{weight.shape[0]}]"
            )
        found[name] = Matrix(name, weight, bias)
    return found


def _without_place(
    rest: Mapping[str, Tensor], recurrent: Mapping[str, Recurrent], options: ImportOptions
) -> Exception:
    """The error for tensors that are left over."""
    # A module that no bundle holds settles it; what could be an initial state can still be said.
    for key, tensor in rest.items():
        part = key.rpartition(".")[2]
        shape = list(tensor.shape)
        module = shown_name(_module(key))
        if part == "weight" and tensor.dim() == 1:
            return refused(
                key,
                f"shape {shape}: {module} is a normalisation without running statistics"
                " (nn.LayerNorm or alike) or an activation with weights (nn.PReLU); a state dict"
                " does not say where it stands, and a bundle has no place for it."
                " torch.onnx.export writes the structure as well, and importing that file says"
                " what of it a bundle can hold",
            )
        if part == "weight" and tensor.dim() > 2:
            return refused(
                key,
                f"shape {shape}: {module} is a convolution or another layer that has no place in a"
                " bundle",
            )
    for key in rest:
        if key.rpartition(".")[2] == "bias":
            return refused(
                key,
                "a bias without its weight; a weight that is tied to another may have been left"
                " out when saving: save all of module.state_dict() with torch.save",
            )
    asked = _initial_asked(rest, recurrent, options.initial_state)
    if asked is not None:
        return asked
    left = sorted(rest)
    return refused(
        left[0],
        f"shape {list(rest[left[0]].shape)}, has no place in a bundle (left over: {listed(left)});"
        " if the module computes with it, as with a mean and a deviation of its input,"
        " torch.onnx.export writes how, and the importer reads that file",
    )


def _initial_asked(
    rest: Mapping[str, Tensor], recurrent: Mapping[str, Recurrent], given: Mapping[str, str]
) -> AmbiguousModuleError | None:
    """The question whether what is left is where the recurrent modules begin."""
    open_places = [
        (module, part)
        for module in recurrent.values()
        for part in (("h", "c") if module.kind == "lstm" else ("h",))
        if part not in module.initial
    ]
    said = [f"{target}={key}" for target, key in given.items()]
    for key in sorted(rest, key=lambda key: "c" in key.rpartition(".")[2].lower()):
        for place in open_places:
            module, part = place
            if _fits_initial(rest[key], module.initial_shape(part)):
                target = part if len(recurrent) == 1 else f"{shown_name(module.name)}.{part}"
                said.append(f"{target}={key}")
                open_places.remove(place)
                break
        else:
            return None
    flags = ("--initial-state", ",".join(said))
    return AmbiguousModuleError(
        f"{listed(list(rest))}: a parameter with the shape of an initial state; if every session"
        f" begins with it as it is, say {' '.join(flags)}",
        key=next(iter(rest)),
        answers=(flags,),
    )
