"""ONNX's LSTM, GRU and RNN nodes as layers.

ONNX has its gates as i, o, f, c and z, r, h, two biases side by side in B, and the peepholes as
i, o, f in P. Its `input_forget` makes f = 1 - i, where a coupled cell of ours has i = 1 - f: with
s(-a) = 1 - s(a), a forget gate whose weights are those of ONNX's input gate, negated, is ONNX's
forget gate, and the input gate that follows from it is ONNX's as well.

Source: the operators' definitions in ONNX; what they leave open is as ONNX Runtime has it, which
applies `clip` to the sums that go into f and g and not to h's, and lets `input_forget` keep i.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from conveyor_models.importers.common import ImportedLayer, refused, tensor_of
from conveyor_models.importers.gates import blocks, gru_tensors, joined, lstm_tensors
from conveyor_models.importers.onnx_shapes import Length
from conveyor_models.importers.onnx_states import (
    does_not_fit,
    initial_tensors,
    lengths_note,
    outside,
)
from conveyor_models.importers.onnx_values import Value, known

GATES: Final = {"LSTM": "iofg", "GRU": "zrn", "RNN": "h"}
"""Letters of the blocks of rows, ours in ONNX's order: its c is g, its h of a GRU is n."""
DEFAULT_FUNCTIONS: Final = {
    "LSTM": ("sigmoid", "tanh", "tanh"),
    "GRU": ("sigmoid", "tanh"),
    "RNN": ("tanh",),
}
_INPUTS: Final = ("X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P")
_TAKE_ALPHA: Final = ("affine", "elu", "hardsigmoid", "leakyrelu", "scaledtanh", "thresholdedrelu")
_TAKE_BETA: Final = ("affine", "hardsigmoid", "scaledtanh")
_ATTRIBUTES: Final = frozenset(
    {
        "activation_alpha",
        "activation_beta",
        "activations",
        "clip",
        "direction",
        "hidden_size",
        "input_forget",
        "layout",
        "linear_before_reset",
    }
)


@dataclass(frozen=True, slots=True)
class CellNode:
    """A recurrent node and what is known of its inputs."""

    name: str
    op: str
    attributes: Mapping[str, Any]
    inputs: tuple[Value | None, ...]

    def given(self, what: str) -> Value | None:
        """An optional input."""
        place = _INPUTS.index(what)
        return self.inputs[place] if place < len(self.inputs) else None

    @property
    def batch_first(self) -> bool:
        """Whether X is [B, T, I] and Y [B, T, D, H]."""
        layout = self.attributes.get("layout", 0)
        if layout not in (0, 1):
            raise refused(self.name, f"layout {layout}")
        return layout == 1

    @property
    def direction(self) -> str:
        """forward, reverse or bidirectional."""
        value = self.attributes.get("direction", b"forward")
        text = value.decode("ascii", "replace") if isinstance(value, bytes) else str(value)
        if text not in ("forward", "reverse", "bidirectional"):
            raise refused(self.name, f"direction {text!r}")
        return text

    @property
    def ways(self) -> int:
        """How many directions."""
        return 2 if self.direction == "bidirectional" else 1


def cell_layers(node: CellNode) -> list[ImportedLayer]:
    """A layer for each direction of a node, in its order."""
    surplus = sorted(node.attributes.keys() - _ATTRIBUTES)
    if surplus:
        raise refused(node.name, f"attribute {surplus[0]} is not known")
    return [_one_way(node, way) for way in range(node.ways)]


def cell_notes(node: CellNode, length: Length, rows_from: str, producer: str) -> list[str]:
    """What somebody should know about a node.

    Args:
        node: the node.
        length: of its sequences.
        rows_from: the input whose rows flow on.
        producer: what wrote the file.

    Raises:
        UnsupportedModuleError: its initial state or its lengths are computed inside the graph.
    """
    notes = [lengths_note(node.name, node.given("sequence_lens"), length, rows_from)]
    for part in ("h", "c") if node.op == "LSTM" else ("h",):
        what = f"initial_{part}"
        notes.append(outside(node.name, what, node.given(what), rows_from))
    before = node.op == "GRU" and not node.attributes.get("linear_before_reset", 0)
    if before and producer == "pytorch":
        notes.append(
            f"{node.name}: linear_before_reset is 0, which nn.GRU has not: PyTorch exports its own"
            " GRU with 1, so check that the file computes what your module does"
        )
    return [note for note in notes if note is not None]


def _one_way(node: CellNode, way: int) -> ImportedLayer:
    gates = GATES[node.op]
    recurrent = _tensor(node, "R", (node.ways, None, None))[way]  # [G * H, H]
    size = recurrent.shape[1]
    rows = len(gates) * size
    if node.attributes.get("hidden_size", size) != size or recurrent.shape[0] != rows:
        raise refused(
            node.name,
            f"R: {list(recurrent.shape)}, hidden_size {node.attributes.get('hidden_size')}",
        )
    weight = _tensor(node, "W", (node.ways, rows, None))[way]  # [G * H, I]
    if node.given("B") is None:
        biases = torch.zeros(2 * rows)
    else:
        biases = _tensor(node, "B", (node.ways, 2 * rows))[way]
    table: dict[str, Any] = {"cell": node.op.lower(), "size": size}
    table |= _functions(node, way)
    if node.direction == "reverse" or way == 1:
        table["direction"] = "reverse"
    both = biases[:rows], biases[rows:]
    match node.op:
        case "LSTM":
            tensors = _lstm(node, way, table, (weight, recurrent, both[0] + both[1]))
        case "GRU":
            after = _flag(node, "linear_before_reset")
            table["reset"] = "after" if after else "before"
            tensors = gru_tensors((weight, recurrent), both, gates, table["reset"])
        case _:
            tensors = {"weight_input": weight.clone(), "weight_recurrent": recurrent.clone()}
            tensors["bias"] = both[0] + both[1]
    parts = ("h", "c") if node.op == "LSTM" else ("h",)
    given = {part: node.given(f"initial_{part}") for part in parts}
    initial = initial_tensors(node.name, given, (way, node.ways, size), node.batch_first)
    if initial:
        table["initial_state"] = True
        tensors |= initial
    return ImportedLayer(node.name, table, tensors)


def _flag(node: CellNode, name: str) -> bool:
    value = node.attributes.get(name, 0)
    if value not in (0, 1):
        raise refused(node.name, f"{name} {value}")
    return value == 1


def _lstm(
    node: CellNode, way: int, table: dict[str, Any], given: tuple[Tensor, Tensor, Tensor]
) -> dict[str, Tensor]:
    size = table["size"]
    peepholes: dict[str, Tensor] = {}
    if node.given("P") is not None:
        peepholes = blocks(_tensor(node, "P", (node.ways, 3 * size))[way], "iof")
    if _flag(node, "input_forget"):
        table["coupled"] = True
        tensors: dict[str, Tensor] = {}
        for name, tensor in zip(("weight_input", "weight_recurrent", "bias"), given, strict=True):
            parts = blocks(tensor, GATES["LSTM"])
            tensors[name] = joined(parts | {"f": -parts["i"]}, "fgo")
        if peepholes:
            peepholes = {"f": -peepholes["i"], "o": peepholes["o"]}
    else:
        tensors = lstm_tensors(*given, gates=GATES["LSTM"])
    if peepholes:
        names = {"i": "input", "f": "forget", "o": "output"}
        table["peepholes"] = [names[gate] for gate in "ifo" if gate in peepholes]
        tensors |= {f"peephole_{names[gate]}": peepholes[gate].clone() for gate in peepholes}
    return tensors


def _tensor(node: CellNode, what: str, shape: tuple[int | None, ...]) -> Tensor:
    array = known(node.name, what, node.given(what))
    fits = array.ndim == len(shape) and all(
        wanted in (None, found) for wanted, found in zip(shape, array.shape, strict=True)
    )
    if not fits or array.dtype.kind != "f":
        raise refused(node.name, does_not_fit(what, array))
    return tensor_of(f"{node.name}: {what}", array)


# --- Functions -----------------------------------------------------------------------------------


def _functions(node: CellNode, way: int) -> dict[str, Any]:
    """What model.toml says of the activations and the clip."""
    default = DEFAULT_FUNCTIONS[node.op]
    given = [_plain(each) for each in node.attributes.get("activations", ())]
    names = given or [*default] * node.ways
    if len(names) != len(default) * node.ways:
        raise refused(node.name, f"activations: {len(names)} of them")
    alphas = _numbers(names, node.attributes.get("activation_alpha", ()), _TAKE_ALPHA)
    betas = _numbers(names, node.attributes.get("activation_beta", ()), _TAKE_BETA)
    first = way * len(default)
    own = names[first : first + len(default)]
    table: dict[str, Any] = {}
    if node.op == "RNN":
        if own[0] not in ("tanh", "relu"):
            raise refused(node.name, f"activation {own[0]} is not supported")
        if own[0] == "relu":
            table["nonlinearity"] = "relu"
    else:
        for name in own[1:]:
            if name != "tanh":
                raise refused(node.name, f"activation {name} in the place of tanh")
        table |= _gate_function(node, own[0], alphas[first], betas[first])
    if "clip" in node.attributes:
        clip = _shortest(node.attributes["clip"])
        if not 0 < clip < float("inf"):
            raise refused(node.name, f"clip {clip}")
        table["clip"] = clip
    return table


def _gate_function(
    node: CellNode, name: str, alpha: float | None, beta: float | None
) -> dict[str, Any]:
    if name == "sigmoid":
        return {}
    if name != "hardsigmoid":
        raise refused(node.name, f"activation {name} in the place of sigmoid")
    slope, offset = (0.2 if alpha is None else alpha), (0.5 if beta is None else beta)
    if offset != 0.5 or slope <= 0:
        raise refused(node.name, f"HardSigmoid with alpha {slope} and beta {offset}")
    return {"gate_activation": "hard_sigmoid", "hard_sigmoid_slope": slope}


def _plain(name: object) -> str:
    text = name.decode("ascii", "replace") if isinstance(name, bytes) else str(name)
    return text.lower()


def _numbers(names: list[str], values: Any, takers: tuple[str, ...]) -> list[float | None]:
    """The values that belong to each function: handed out in order to those that take one."""
    left = [_shortest(value) for value in values]
    return [left.pop(0) if left and name in takers else None for name in names]


def _shortest(value: float) -> float:
    """The shortest decimal that is this float32: 0.2, not 0.20000000298."""
    return float(str(np.float32(value)))
