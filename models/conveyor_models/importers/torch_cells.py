"""PyTorch's recurrent modules, as their tensors show them.

PyTorch keeps its gates as i, f, g, o and r, z, n, with two biases beside each, and its GRU has the
reset gate after the product. A module names the tensors of layer k `weight_ih_lK` and so on; a cell
(`nn.LSTMCell`, `nn.GRUCell`, `nn.RNNCell`) has the same tensors without `_lK`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from torch import Tensor

from conveyor_models.importers.common import ImportedLayer, refused, two_ways
from conveyor_models.importers.gates import gru_tensors, lstm_tensors

MODULES_MAX: Final = 64
_PART: Final = re.compile(
    r"(?:(?P<module>.+)\.)?(?P<part>(?:weight_(?:ih|hh|hr)|bias_(?:ih|hh)))"
    r"(?:_l(?P<layer>[0-9]{1,3})(?P<reverse>_reverse)?)?"
)
_KINDS: Final = {4: "lstm", 3: "gru", 1: "rnn"}
"""Blocks of rows -> cell."""
_GATES: Final = {kind: blocks for blocks, kind in _KINDS.items()}


@dataclass(slots=True)
class Recurrent:
    """One nn.LSTM, nn.GRU or nn.RNN, or one cell of these."""

    name: str
    is_cell: bool
    """Whether it is an nn.LSTMCell, nn.GRUCell or nn.RNNCell."""
    parts: dict[tuple[int, bool], dict[str, Tensor]]
    """(layer, whether it runs from the end) -> weight_ih and so on -> tensor."""
    keys: list[str]
    """Of the state dict, that it is made of."""
    initial: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    """h and c that every sequence begins with, [layers * directions, size] each."""

    @property
    def shown(self) -> str:
        """The name, for messages."""
        return self.name or "state dict"

    @property
    def ways(self) -> tuple[bool, ...]:
        """The directions: False runs forward, True from the end."""
        return (False, True) if any(reverse for _, reverse in self.parts) else (False,)

    @property
    def depth(self) -> int:
        """Number of layers.

        Raises:
            UnsupportedModuleError: one is missing.
        """
        numbers = sorted({number for number, _ in self.parts})
        if numbers != list(range(len(numbers))):
            raise refused(self.shown, f"has layers {numbers}, one is missing")
        return len(numbers)

    @property
    def sizes(self) -> tuple[int, int]:
        """Features it reads and features it puts out.

        Raises:
            UnsupportedModuleError: a weight is missing.
        """
        first, last = self._weights(0), self._weights(self.depth - 1)
        return first[0].shape[1], len(self.ways) * last[1].shape[1]

    def _weights(self, layer: int) -> tuple[Tensor, Tensor]:
        found = self.parts.get((layer, False), {})
        pair = found.get("weight_ih"), found.get("weight_hh")
        if pair[0] is None or pair[1] is None or pair[0].dim() != 2 or pair[1].dim() != 2:
            absent = "weight_ih" if pair[0] is None or pair[0].dim() != 2 else "weight_hh"
            raise refused(self._layer_name(layer), f"{absent} is missing or not a matrix")
        return pair[0], pair[1]

    @property
    def kind(self) -> str:
        """lstm, gru or rnn.

        Raises:
            UnsupportedModuleError: its weights have the shapes of none.
        """
        return _kind_and_size(self.shown, self.parts.get((0, False), {}))[0]

    def initial_shape(self, part: str) -> tuple[int, int]:
        """Of the initial `h` or `c` of all its layers and directions: [rows, size].

        Raises:
            UnsupportedModuleError: it has no such part.
        """
        kind, cell_size = _kind_and_size(self.shown, self.parts.get((0, False), {}))
        if part == "c" and kind != "lstm":
            raise refused(self.shown, f"a {kind} has no c, it begins with h alone")
        rows = self.depth * len(self.ways)
        return rows, cell_size if part == "c" else self._weights(0)[1].shape[1]

    def layers(self, wanted: str | None) -> list[ImportedLayer]:
        """Its layers, of the kind wanted where the shapes leave the choice.

        Args:
            wanted: one of `options.CELLS`, or None.

        Raises:
            UnsupportedModuleError: a tensor is missing or of another shape.
        """
        layers: list[ImportedLayer] = []
        for number in range(self.depth):
            name = self._layer_name(number)
            if any((number, way) not in self.parts for way in self.ways):
                raise refused(name, "one of its two directions is missing")
            found = [self._one_way(name, number, way, wanted) for way in self.ways]
            layers.append(found[0] if len(found) == 1 else two_ways(*found, name=name))
        for below, layer in itertools.pairwise(layers):
            if layer.input_size != below.output_size:
                raise refused(
                    layer.name, f"reads {layer.input_size}, expected {below.output_size} numbers"
                )
        return layers

    def _layer_name(self, number: int) -> str:
        if self.is_cell:
            return self.shown
        return f"{self.name}.l{number}" if self.name else f"l{number}"

    def _one_way(self, name: str, number: int, way: bool, wanted: str | None) -> ImportedLayer:
        layer = _one_way(name, self.parts[number, way], wanted)
        if any(bool(state.any()) for state in self.initial.values()):
            row = number * len(self.ways) + way
            layer.table["initial_state"] = True
            for part, state in self.initial.items():
                layer.tensors[f"initial_{part}"] = state[row].clone()
        return layer


def recurrent_modules(state: Mapping[str, Tensor]) -> dict[str, Recurrent]:
    """The recurrent modules of a state dict, by name.

    Raises:
        UnsupportedModuleError: there are too many, or one is a module and a cell at once.
    """
    found: dict[str, Recurrent] = {}
    for key, tensor in state.items():
        match = _PART.fullmatch(key)
        if match is None:
            continue
        name, is_cell = match["module"] or "", match["layer"] is None
        module = found.setdefault(name, Recurrent(name, is_cell, {}, []))
        if module.is_cell != is_cell:
            raise refused(key, "is of a cell, beside tensors of a module with layers")
        module.keys.append(key)
        place = int(match["layer"] or 0), match["reverse"] is not None
        module.parts.setdefault(place, {})[match["part"]] = tensor
    if len(found) > MODULES_MAX:
        raise refused("state dict", f"{len(found)} recurrent modules, at most {MODULES_MAX}")
    return found


def _one_way(name: str, parts: Mapping[str, Tensor], wanted: str | None) -> ImportedLayer:
    """One direction of one layer."""
    kind, size = _kind_and_size(name, parts)
    _check_shapes(name, parts, size * _GATES[kind])
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
