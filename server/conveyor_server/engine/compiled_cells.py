"""The element-wise part of each cell as one native call."""

import numpy as np
import torch
from torch import Tensor

from conveyor_server.engine import compiled
from conveyor_server.engine.cells import Peepholes


class CompiledCells:
    """Implements `cells.Cells` for gates that are logistic functions of their sums."""

    def __init__(self, width: int, peepholes: Peepholes, *, coupled: bool) -> None:
        """All of one layer; the last two are an LSTM's."""
        self._peephole_input = _vector(peepholes.input, width)
        self._peephole_forget = _vector(peepholes.forget, width)
        self._peephole_output = _vector(peepholes.output, width)
        self._coupled = coupled

    def lstm(self, sums: Tensor, c: Tensor, *, keep: bool) -> tuple[Tensor, Tensor]:
        """See `Cells.lstm`."""
        h_new, c_new = torch.empty_like(c), torch.empty_like(c)
        new = (h_new.numpy(), c_new.numpy(), keep)
        of_forget, of_output = self._peephole_forget, self._peephole_output
        if self._coupled:
            compiled.lstm_coupled(sums.numpy(), c.numpy(), of_forget, of_output, *new)
        else:
            of_input = self._peephole_input
            compiled.lstm(sums.numpy(), c.numpy(), of_input, of_forget, of_output, *new)
        return h_new, c_new

    def gru_seen(self, sums: Tensor, h: Tensor) -> Tensor:
        """See `Cells.gru_seen`."""
        seen = torch.empty_like(h)
        compiled.gru_gates(sums.numpy(), h.numpy(), seen.numpy())
        return seen

    def gru_before(self, gates: Tensor, sums: Tensor, h: Tensor) -> Tensor:
        """See `Cells.gru_before`."""
        h_new = torch.empty_like(h)
        compiled.gru_before(gates.numpy(), sums.numpy(), h.numpy(), h_new.numpy())
        return h_new

    def gru_after(self, gates: Tensor, read: Tensor, sums: Tensor, h: Tensor) -> Tensor:
        """See `Cells.gru_after`."""
        h_new = torch.empty_like(h)
        compiled.gru_after(gates.numpy(), read.numpy(), sums.numpy(), h.numpy(), h_new.numpy())
        return h_new

    def tanh(self, sums: Tensor) -> Tensor:
        """See `Cells.tanh`."""
        compiled.tanh(sums.numpy())
        return sums

    def relu(self, sums: Tensor) -> Tensor:
        """See `Cells.relu`."""
        return sums.relu_()


def _vector(peephole: Tensor | None, width: int) -> compiled.Vector:
    return np.zeros(width, np.float32) if peephole is None else peephole.numpy()
