"""What a file may leave open, and whoever imports it can say."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from conveyor_models.importers.common import refused

CELLS: Final = ("lstm", "gru", "rnn-tanh", "rnn-relu")
NO_EMBEDDING: Final = "none"
NOTHING: Final = "none"
Activation = Literal["none", "softmax", "log_softmax", "sigmoid"]


@dataclass(frozen=True, slots=True)
class ImportOptions:
    """For PyTorch state dicts, which hold tensors and no structure; other files need none.

    A module may be named by the last parts of its name, and without `module.` and `_orig_mod.`,
    which `nn.DataParallel` and `torch.compile` add.
    """

    cells: Mapping[str, str] = field(default_factory=dict[str, str])
    """Module -> one of `CELLS`; under the empty name for all modules."""
    order: Sequence[str] = ()
    """Modules from the input to the output: the recurrent ones, or every one. Heads side by side
    are one entry, `actor+critic`."""
    between: str | None = None
    """What lies between the modules that `order` names: `none`, or the name of a function."""
    embedding: str | None = None
    """The module that is the nn.Embedding, or `none` where there is none."""
    head: str | None = None
    """The nn.Linear after the stack; several side by side are `actor,critic`, in the order of their
    outputs."""
    activation: Activation | None = None
    """What follows the head."""
    epsilon: Mapping[str, float] = field(default_factory=dict[str, float])
    """nn.BatchNorm1d -> its `eps`; under the empty name for all."""
    initial_state: Mapping[str, str] = field(default_factory=dict[str, str])
    """`h`, `c`, `MODULE.h` or `MODULE.c` -> the tensor that every session begins with."""


NO_OPTIONS: Final = ImportOptions()


def parse_cells(texts: Sequence[str]) -> dict[str, str]:
    """Reads KIND or MODULE=KIND.

    Raises:
        UnsupportedModuleError: the kind is not known.
    """
    found: dict[str, str] = {}
    for text in texts:
        module, _, kind = text.rpartition("=")
        if kind not in CELLS:
            raise refused(
                f"--cell {text}", f"expected one of {', '.join(CELLS)}, or MODULE= and one of them"
            )
        found[module] = kind
    return found


def parse_epsilon(texts: Sequence[str]) -> dict[str, float]:
    """Reads NUMBER or MODULE=NUMBER.

    Raises:
        UnsupportedModuleError: it is not a number of at least 0.
    """
    found: dict[str, float] = {}
    for text in texts:
        module, _, number = text.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not 0 <= value < math.inf:
            raise refused(f"--epsilon {text}", "expected a number such as 1e-05, or MODULE=NUMBER")
        found[module] = value
    return found


def parse_initial_state(texts: Sequence[str]) -> dict[str, str]:
    """Reads h=TENSOR, MODULE.c=TENSOR, and several of them with commas between.

    Raises:
        UnsupportedModuleError: it is not of this form, or names a part twice.
    """
    found: dict[str, str] = {}
    for text in (part.strip() for whole in texts for part in whole.split(",")):
        part, equals, tensor = text.partition("=")
        if not equals or not tensor or part.rpartition(".")[2] not in ("h", "c"):
            raise refused(
                f"--initial-state {text}",
                "expected h=TENSOR or c=TENSOR, with MODULE. before it where there are several",
            )
        if part in found:
            raise refused(f"--initial-state {text}", f"{part} is given twice")
        found[part] = tensor
    return found


def parse_names(text: str) -> tuple[str, ...]:
    """Reads A,B,C."""
    return tuple(name.strip() for name in text.split(",") if name.strip())
