"""The element-wise part of each cell, from the sums of its gates to the new carry.

`TorchCells` runs on any device and knows every function a gate may have. `engine.compiled_cells`
has the usual functions as one native call.
"""

from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

from conveyor_models import GateFunction
from conveyor_server.engine.functions import GATE, Functions, columns_of, from_half_
from conveyor_server.engine.logistic import logistic_
from conveyor_server.engine.products import ProductFamily


@dataclass(frozen=True, slots=True, eq=False)
class Peepholes:
    """Weights of the gates that see the cell state, [width] each; None where one does not."""

    input: Tensor | None = None
    forget: Tensor | None = None
    output: Tensor | None = None


NO_PEEPHOLES: Final = Peepholes()


class Cells(Protocol):
    """Sums are [rows, gates * width]; those of candidates come doubled, see `engine.functions`.

    They are written to: where the docstring says so, they hold the gates afterwards.
    """

    def lstm(self, sums: Tensor, c: Tensor, *, keep: bool) -> tuple[Tensor, Tensor]:
        """i, f, g, o, of a coupled layer f, g, o, and c -> o * tanh(c') and c'.

        With `keep` the sums become the gates.
        """
        ...

    def gru_seen(self, sums: Tensor, h: Tensor) -> Tensor:
        """r, z, which become gates, and h -> r * h."""
        ...

    def gru_before(self, gates: Tensor, sums: Tensor, h: Tensor) -> Tensor:
        """The gates r, z, and n of what `gru_seen` gave -> h'. Sums become n."""
        ...

    def gru_after(self, gates: Tensor, read: Tensor, sums: Tensor, h: Tensor) -> Tensor:
        """r, z, which become gates, the input's and h's part of n -> h'. Sums become n."""
        ...

    def tanh(self, sums: Tensor) -> Tensor:
        """Doubled sums become their tanh; returned as they are."""
        ...

    def relu(self, sums: Tensor) -> Tensor:
        """Sums, not doubled, become their rectified value; returned as they are."""
        ...


class TorchCells:
    """Implements `Cells` with torch."""

    def __init__(self, functions: Functions, peepholes: Peepholes, *, coupled: bool) -> None:
        """All of one layer; the last two are an LSTM's."""
        self._functions = functions
        self._peepholes = peepholes
        self._coupled = coupled

    def lstm(self, sums: Tensor, c: Tensor, *, keep: bool) -> tuple[Tensor, Tensor]:
        """See `Cells.lstm`; the sums become the gates in any case."""
        functions, peepholes, width = self._functions, self._peepholes, c.shape[1]
        *i, f, g, o = columns_of(sums, sums.shape[1] // width)
        if peepholes.forget is not None:
            f.addcmul_(c, peepholes.forget)
        if peepholes.input is not None:
            i[0].addcmul_(c, peepholes.input)
        if functions.plain:
            logistic_(sums[:, : sums.shape[1] - width])
        else:
            functions.gate_(sums[:, : sums.shape[1] - 2 * width])
            functions.half_candidate_(g)
        from_half_(g)
        c = torch.addcmul(g, f, c - g) if self._coupled else (f * c).addcmul_(i[0], g)
        if peepholes.output is not None:
            o.addcmul_(c, peepholes.output)
        functions.gate_(o)
        return from_half_(logistic_(c + c)).mul_(o), c

    def gru_seen(self, sums: Tensor, h: Tensor) -> Tensor:
        """See `Cells.gru_seen`."""
        self._functions.gate_(sums)
        return sums[:, : h.shape[1]] * h

    def gru_before(self, gates: Tensor, sums: Tensor, h: Tensor) -> Tensor:
        """See `Cells.gru_before`."""
        n = from_half_(self._functions.half_candidate_(sums))
        return torch.addcmul(n, gates[:, h.shape[1] :], h - n)  # z h + (1 - z) n

    def gru_after(self, gates: Tensor, read: Tensor, sums: Tensor, h: Tensor) -> Tensor:
        """See `Cells.gru_after`."""
        r, z = columns_of(self._functions.gate_(gates), 2)
        n = from_half_(self._functions.half_candidate_(sums.mul_(r).add_(read)))
        return torch.addcmul(n, z, h - n)  # z h + (1 - z) n

    def tanh(self, sums: Tensor) -> Tensor:
        """See `Cells.tanh`."""
        return from_half_(self._functions.half_candidate_(sums))

    def relu(self, sums: Tensor) -> Tensor:
        """See `Cells.relu`."""
        return self._functions.clip_(sums, GATE).relu_()


def make_cells(
    function: GateFunction,
    width: int,
    family: ProductFamily,
    peepholes: Peepholes = NO_PEEPHOLES,
    *,
    coupled: bool = False,
) -> Cells:
    """The quickest there are for a layer of so many units, padding counted."""
    functions = Functions(function)
    if not (family.compiled and functions.plain):
        return TorchCells(functions, peepholes, coupled=coupled)
    from conveyor_server.engine.compiled_cells import CompiledCells  # noqa: PLC0415  needs numba

    return CompiledCells(width, peepholes, coupled=coupled)
