"""What a file may leave open, and whoever imports it can say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from conveyor_models.importers.common import refused

CELLS: Final = ("lstm", "gru", "rnn-tanh", "rnn-relu")
Activation = Literal["none", "softmax", "log_softmax", "sigmoid"]


@dataclass(frozen=True, slots=True)
class ImportOptions:
    """For PyTorch state dicts, which hold tensors and no structure; other files need none."""

    cells: Mapping[str, str] = field(default_factory=dict[str, str])
    """Module -> one of `CELLS`; under the empty name for all modules."""
    order: Sequence[str] = ()
    """The recurrent modules from the input upwards."""
    embedding: str | None = None
    """The module that is the nn.Embedding."""
    head: str | None = None
    """The module that is the nn.Linear after the stack."""
    activation: Activation | None = None
    """What follows the head."""


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
            raise refused(text, f"expected one of {', '.join(CELLS)}, or MODULE= and one of them")
        found[module] = kind
    return found
