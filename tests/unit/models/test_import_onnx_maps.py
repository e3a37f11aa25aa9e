"""Affine maps, heads and directions in ONNX graphs: exact in a bundle, or refused by name."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from torch import Tensor, nn

from conveyor_models import UnsupportedModuleError
from conveyor_models.importers import import_model
from tests.unit.models.importing import FLOAT32_ERROR_MAX, error, fill
from tests.unit.models.onnx_files import (
    graph_model,
    imported,
    judged,
    normal,
    said,
    served,
    weights,
)

FILES = Path(__file__).parent / "files"
X = ("x", TensorProto.FLOAT, ["t", "b", 4])
node = helper.make_node


def graph(
    before: Sequence[Any] = (),
    after: Sequence[Any] = (),
    outputs: Sequence[str] = ("rows",),
    *,
    op: str = "LSTM",
    reads: str = "x",
    ways: int = 1,
    inputs: Sequence[Any] = (X,),
    size: int = 4,
    **constants: Any,
) -> onnx.ModelProto:
    """Nodes, a recurrent node that reads `size` numbers and gives `rows` [T, B, 3], nodes."""
    own = weights(op, 3, size, ways)
    cell = node(
        op,
        [reads, *own],
        ["y", "h"],
        name="cell",
        hidden_size=3,
        direction="bidirectional" if ways == 2 else "forward",
    )
    rows = [
        node("Transpose", ["y"], ["turned"], perm=[0, 2, 1, 3]),
        node("Reshape", ["turned", "merge"], ["rows"]),
    ]
    constants |= own | {"merge": np.array([0, 0, -1])}
    return graph_model([*before, cell, *rows, *after], inputs, outputs, constants)


def agrees(
    model: onnx.ModelProto, folder: Path, shape: Sequence[int] = (9, 2, 4)
) -> tuple[Any, dict[str, Any]]:
    """The import and the outputs, of which the first is that of every step."""
    found = imported(model, folder)
    x = normal(*shape)
    expected = judged(model, {"x": x})
    first = next(iter(expected.values()))
    assert error(served(found, x)[..., : first.shape[-1]], first) < FLOAT32_ERROR_MAX
    return found, expected


# --- Before and between layers -------------------------------------------------------------------

MEAN, FACTOR = normal(4, seed=1), np.abs(normal(4, seed=2)) + 0.5
MAPS: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "Sub Div": (
        [node("Sub", ["x", "m"], ["c"], "sub"), node("Div", ["c", "f"], ["z"], "div")],
        {"m": MEAN, "f": FACTOR},
    ),
    "Mul Add": (
        [node("Mul", ["f", "x"], ["c"], "mul"), node("Add", ["m", "c"], ["z"], "add")],
        {"m": MEAN, "f": FACTOR},
    ),
    "scalars": (
        [node("Sub", ["m", "x"], ["c"], "sub"), node("Mul", ["c", "f"], ["z"], "mul")],
        {"m": np.float32(0.3), "f": np.array([[[1.7]]], np.float32)},
    ),
    "Neg": ([node("Neg", ["x"], ["z"], "neg")], {}),
    "MatMul": ([node("MatMul", ["x", "K"], ["z"], "fc")], {"K": normal(4, 4)}),
    "MatMul Add": (
        [node("MatMul", ["x", "K"], ["c"], "fc"), node("Add", ["c", "m"], ["z"], "add")],
        {"K": normal(4, 4), "m": MEAN},
    ),
    "a deviation that the graph computes": (
        [
            node("Sqrt", ["v"], ["r"], "sqrt"),
            node("Add", ["r", "e"], ["f"], "eps"),
            node("Sub", ["x", "m"], ["c"], "sub"),
            node("Div", ["c", "f"], ["z"], "div"),
        ],
        {"m": MEAN, "v": FACTOR, "e": np.float32(1e-3)},
    ),
    "batch normalisation": (
        [
            node("Transpose", ["x"], ["t"], perm=[1, 2, 0]),
            node("BatchNormalization", ["t", "g", "s", "m", "v"], ["n"], "norm", epsilon=1e-3),
            node("Transpose", ["n"], ["z"], perm=[2, 0, 1]),
        ],
        {"g": normal(4, seed=3), "s": normal(4, seed=4), "m": MEAN, "v": FACTOR},
    ),
    "Gemm with alpha and beta": (
        [
            node("Reshape", ["x", "flat"], ["f"]),
            node("Gemm", ["f", "K", "m"], ["c"], "fc", alpha=0.5, beta=2.0, transB=1),
            node("Reshape", ["c", "back"], ["z"]),
        ],
        {
            "K": normal(4, 4),
            "m": MEAN,
            "flat": np.array([-1, 4]),
            "back": np.array([9, 2, 4]),
        },
    ),
    "a row added to itself": (
        [node("MatMul", ["x", "K"], ["c"], "fc"), node("Add", ["x", "c"], ["z"], "residual")],
        {"K": normal(4, 4)},
    ),
}


@pytest.mark.parametrize("ways", [1, 2])
@pytest.mark.parametrize("name", MAPS)
def test_an_affine_map_before_a_layer_is_folded(name: str, ways: int, tmp_path: Path) -> None:
    nodes, constants = MAPS[name]
    inputs = [("x", TensorProto.FLOAT, [9, 2, 4])] if "Gemm" in name else [X]
    model = graph(nodes, reads="z", ways=ways, inputs=inputs, **constants)
    found, _ = agrees(model, tmp_path)
    assert said(found, "folded into cell: the same function")
    assert found.embedding is None
    assert found.head is None


@pytest.mark.parametrize("name", ["Sub Div", "MatMul Add", "batch normalisation"])
def test_an_affine_map_between_layers_is_folded(name: str, tmp_path: Path) -> None:
    nodes, constants = MAPS[name]
    lower = weights("GRU", 4, 4, seed=9)
    first = [
        node("GRU", ["x", "w", "r", "b"], ["low"], "low", hidden_size=4),
        node("Squeeze", ["low", "one"], ["x1"]),
    ]
    for each in nodes:
        copy = onnx.NodeProto.FromString(each.SerializeToString())
        del copy.input[:]
        copy.input.extend("x1" if name == "x" else name for name in each.input)
        first.append(copy)
    constants = constants | {
        "w": lower["W"],
        "r": lower["R"],
        "b": lower["B"],
        "one": np.array([1]),
    }
    found, _ = agrees(graph(first, reads="z", **constants), tmp_path)
    assert [layer.cell for layer in found.spec("model").layers] == ["gru", "lstm"]


def test_a_map_after_an_embedding_is_folded_into_the_layer(tmp_path: Path) -> None:
    nodes = [
        node("Gather", ["table", "x"], ["e"], "table"),
        node("MatMul", ["e", "K"], ["z"], "fc"),
    ]
    tokens = [("x", TensorProto.INT64, ["t", "b"])]
    table, matrix = normal(11, 6), normal(6, 4)
    model = graph(nodes, reads="z", inputs=tokens, table=table, K=matrix)
    found = imported(model, tmp_path)
    x = np.random.default_rng(0).integers(0, 11, (9, 2))
    assert error(served(found, x), judged(model, {"x": x})["rows"]) < FLOAT32_ERROR_MAX


@pytest.mark.parametrize(
    ("places", "how"), [([3, 1, 0, 5], "Gather"), ([1, 2, 3, 4], "Slice"), ([5, 4, 3, 2], "flip")]
)
def test_features_that_are_chosen_are_a_map(places: list[int], how: str, tmp_path: Path) -> None:
    if how == "Gather":
        nodes = [node("Gather", ["x", "places"], ["z"], axis=2)]
    else:
        nodes = [node("Slice", ["x", "from", "to", "two", "step"], ["z"])]
    step = -1 if how == "flip" else 1
    model = graph(
        nodes,
        reads="z",
        inputs=[("x", TensorProto.FLOAT, ["t", "b", 6])],
        places=np.array(places),
        two=np.array([2]),
        step=np.array([step]),
        **{"from": np.array([places[0]]), "to": np.array([places[-1] + step])},
    )
    found, _ = agrees(model, tmp_path, (9, 2, 6))
    assert not found.notes  # nothing is rounded


def test_features_along_another_axis_of_the_input(tmp_path: Path) -> None:
    """[B, F, T], as convolutions have it."""
    model = graph(
        [node("Transpose", ["x"], ["z"], perm=[2, 0, 1])],
        reads="z",
        inputs=[("x", TensorProto.FLOAT, ["b", 4, "t"])],
    )
    found = imported(model, tmp_path)
    x = normal(9, 2, 4)
    expected = judged(model, {"x": x.transpose(1, 2, 0)})["rows"]
    assert error(served(found, x), expected) < FLOAT32_ERROR_MAX


# --- Heads ---------------------------------------------------------------------------------------


def fc(x: str, matrix: str, out: str) -> Any:
    return node("MatMul", [x, matrix], [out], f"fc_{out}")


@pytest.mark.parametrize("ways", [1, 2])
def test_linear_layers_in_a_row_are_one_head(ways: int, tmp_path: Path) -> None:
    nodes = [
        fc("rows", "K", "a"),
        node("Add", ["a", "k"], ["b"], "bias"),
        fc("b", "L", "c"),
        node("Add", ["c", "l"], ["d"], "bias2"),
        node("Div", ["d", "temperature"], ["e"], "scale"),
        node("Softmax", ["e"], ["out"], "softmax", axis=-1),
    ]
    model = graph(
        after=nodes,
        outputs=["out"],
        ways=ways,
        K=normal(3 * ways, 5),
        k=normal(5),
        L=normal(5, 2),
        l=normal(2),
        temperature=np.float32(1.7),
    )
    found, _ = agrees(model, tmp_path)
    assert said(found, "folded into the head")
    assert found.activation == "softmax"


def test_a_bias_on_the_rows_alone_is_a_head(tmp_path: Path) -> None:
    agrees(
        graph(after=[node("Add", ["rows", "k"], ["out"])], outputs=["out"], k=normal(3)), tmp_path
    )


@pytest.mark.parametrize("function", ["", "Sigmoid"])
def test_heads_side_by_side_are_stacked_in_the_order_of_the_outputs(
    function: str, tmp_path: Path
) -> None:
    nodes = [
        fc("rows", "V", "value0"),
        node("Add", ["value0", "v"], ["value1"]),
        fc("rows", "P", "policy1"),
    ]
    if function:
        nodes += [node(function, [f"{each}1"], [each]) for each in ("value", "policy")]
    outputs = ["policy", "value"] if function else ["policy1", "value1"]
    model = graph(after=nodes, outputs=outputs, V=normal(3, 1), v=normal(1), P=normal(3, 4))
    found, expected = agrees(model, tmp_path)
    rows = served(found, normal(9, 2, 4))
    assert error(rows[..., 4:], expected[outputs[1]]) < FLOAT32_ERROR_MAX
    assert said(found, f"numbers 0 to 3 of a row are {outputs[0]}")
    assert said(found, f"number 4 of a row is {outputs[1]}")


def test_rows_beside_a_head_on_them(tmp_path: Path) -> None:
    model = graph(after=[fc("rows", "K", "out")], outputs=["rows", "out"], K=normal(3, 2))
    found, expected = agrees(model, tmp_path)
    rows = served(found, normal(9, 2, 4))
    assert error(rows[..., 3:], expected["out"]) < FLOAT32_ERROR_MAX


@pytest.mark.parametrize("joins", ["Concat", "Add", "Sub"])
def test_linear_layers_that_meet_again_are_one(joins: str, tmp_path: Path) -> None:
    attributes = {"axis": -1} if joins == "Concat" else {}
    nodes = [
        fc("rows", "K", "a"),
        fc("rows", "L", "b"),
        node(joins, ["a", "b"], ["out"], **attributes),
    ]
    agrees(graph(after=nodes, outputs=["out"], K=normal(3, 2), L=normal(3, 2, seed=1)), tmp_path)


def test_logits_with_their_classes_before_time(tmp_path: Path) -> None:
    """[B, O, T], as a loss takes them."""
    nodes = [fc("rows", "K", "a"), node("Transpose", ["a"], ["out"], perm=[1, 2, 0])]
    model = graph(after=nodes, outputs=["out"], K=normal(3, 5))
    found = imported(model, tmp_path)
    x = normal(9, 2, 4)
    expected = judged(model, {"x": x})["out"].transpose(2, 0, 1)
    assert error(served(found, x), expected) < FLOAT32_ERROR_MAX
    assert said(found, "out has the 5 numbers of a row along another axis")


def ends(matrix: Any, size: int = 3, op: str = "LSTM", **attributes: Any) -> onnx.ModelProto:
    """A linear layer on the last states of both directions, laid side by side."""
    own = weights(op, size, 4, ways=2)
    nodes = [
        node(
            op,
            ["x", *own],
            ["y", "h"],
            name="cell",
            hidden_size=size,
            direction="bidirectional",
            **attributes,
        ),
        node("Transpose", ["h"], ["hb"], perm=[1, 0, 2]),
        node("Reshape", ["hb", "flat"], ["both"]),
        fc("both", "K", "logits"),
        node("Add", ["logits", "k"], ["biased"]),
        node("Softmax", ["biased"], ["out"], axis=-1),
    ]
    nodes[3].name = "fc_out"
    constants = own | {"flat": np.array([0, -1]), "K": matrix, "k": normal(matrix.shape[1])}
    return graph_model(nodes, [X], ["out"], constants)


@pytest.mark.parametrize("width", [1, 2, 7])
@pytest.mark.parametrize("op", ["LSTM", "GRU", "RNN", "relu"])
def test_the_last_states_of_both_directions_reach_the_head(
    op: str, width: int, tmp_path: Path
) -> None:
    """For sequences of any length, one of a single step too."""
    more = {"activations": ["Relu", "Relu"]} if op == "relu" else {}
    model = ends(normal(6, width), op="RNN" if more else op, **more)
    found = imported(model, tmp_path)
    assert said(found, "one more layer, cell (ends), keeps that of the first row for the last one")
    assert said(found, "out is the last step's row")
    for steps in (1, 2, 3, 40):
        x = normal(steps, 3, 4, seed=steps)
        expected = judged(model, {"x": x})["out"]
        assert error(served(found, x)[-1], expected) < FLOAT32_ERROR_MAX


REFUSED: dict[str, tuple[Callable[[], onnx.ModelProto], str]] = {
    "a hidden layer with ReLU": (
        lambda: graph(
            after=[fc("rows", "K", "a"), node("Relu", ["a"], ["b"], "relu"), fc("b", "K", "out")],
            outputs=["out"],
            K=np.eye(3, dtype=np.float32),
        ),
        "relu: operator Relu is not supported: a bundle holds",
    ),
    "a sigmoid between two layers": (
        lambda: graph(
            after=[fc("rows", "K", "a"), node("Sigmoid", ["a"], ["b"]), fc("b", "K", "out")],
            outputs=["out"],
            K=np.eye(3, dtype=np.float32),
        ),
        "fc_out: MatMul: after sigmoid, with which a bundle ends",
    ),
    "an activation before the layer": (
        lambda: graph([node("Tanh", ["x"], ["z"], "tanh")], reads="z"),
        "tanh: operator Tanh is not supported",
    ),
    "layer normalisation": (
        lambda: graph(
            after=[node("LayerNormalization", ["rows", "k"], ["out"], "norm", axis=-1)],
            outputs=["out"],
            k=np.ones(3, np.float32),
        ),
        "norm: operator LayerNormalization",
    ),
    "two softmaxes": (
        lambda: graph(
            after=[
                fc("rows", "K", "a"),
                fc("rows", "L", "b"),
                node("Softmax", ["a"], ["p"], axis=-1),
                node("Softmax", ["b"], ["q"], axis=-1),
            ],
            outputs=["p", "q"],
            K=normal(3, 2),
            L=normal(3, 4),
        ),
        "p, q: several outputs with softmax at the end",
    ),
    "a sigmoid and none": (
        lambda: graph(
            after=[fc("rows", "K", "a"), node("Sigmoid", ["a"], ["p"])],
            outputs=["a", "p"],
            K=normal(3, 2),
        ),
        "a, p: several outputs with none and sigmoid at the end",
    ),
    "a constant that differs from step to step": (
        lambda: graph(
            [node("Add", ["x", "k"], ["z"], "positions")],
            reads="z",
            inputs=[("x", TensorProto.FLOAT, [5, "b", 4])],
            k=normal(5, 1, 4),
        ),
        "positions: Add: of a constant of shape",
    ),
    "a constant by what flows": (
        lambda: graph([node("Div", ["k", "x"], ["z"], "div")], reads="z", k=np.float32(2)),
        "div: Div: of a constant by what flows",
    ),
    "a division by 0": (
        lambda: graph([node("Div", ["x", "k"], ["z"], "div")], reads="z", k=np.zeros(4, "f4")),
        "div: Div: divides by 0",
    ),
    "a mean far from 0": (
        lambda: graph(
            [node("Sub", ["x", "m"], ["z"], "sub")], reads="z", m=np.array([0, 0, 3e4, 0], "f4")
        ),
        "sub: adds -30000 to feature 2, expected at most 1024",
    ),
    "a mean far from 0 before a matrix": (
        lambda: graph(
            [node("Sub", ["x", "m"], ["c"], "sub"), node("MatMul", ["c", "K"], ["z"], "fc")],
            reads="z",
            m=np.float32(3e4),
            K=normal(4, 4),
        ),
        "sub: adds -30000 to feature 0, expected at most 1024",
    ),
    "features that are rounded": (
        lambda: graph(
            [
                node("Cast", ["x"], ["whole"], to=TensorProto.INT64),
                node("Cast", ["whole"], ["z"], "back", to=TensorProto.FLOAT),
            ],
            reads="z",
        ),
        "back: Cast: whole numbers made of floats",
    ),
    "a product of rows": (
        lambda: graph([node("Mul", ["x", "x"], ["z"], "square")], reads="z"),
        "square: Mul: of two paths",
    ),
    "batch normalisation in training": (
        lambda: graph(
            [
                node("Transpose", ["x"], ["u"], perm=[1, 2, 0]),
                node("BatchNormalization", ["u", "k", "k", "k", "k"], ["v"], "n", training_mode=1),
                node("Transpose", ["v"], ["z"], perm=[2, 0, 1]),
            ],
            reads="z",
            k=np.ones(4, "f4"),
        ),
        "n: BatchNormalization: in training mode",
    ),
    "a bias for each row of the batch": (
        lambda: graph(
            after=[
                node("Squeeze", ["h", "zero"], ["f"]),
                node("Gemm", ["f", "K", "per_row"], ["out"], "fc"),
            ],
            outputs=["out"],
            inputs=[("x", TensorProto.FLOAT, ["t", 5, 4])],
            K=normal(3, 5),
            per_row=normal(5, 1),
            zero=np.array([0]),
        ),
        r"fc: Gemm: with a bias of shape \[5, 1\]",
    ),
    "directions multiplied": (
        lambda: graph(
            after=[
                node("Split", ["y"], ["f", "r"], axis=1),
                node("Mul", ["f", "r"], ["out"], "mul"),
            ],
            outputs=["out"],
            ways=2,
        ),
        "mul: Mul: of two paths",
    ),
    "too many of the last states of both directions into a layer": (
        lambda: ends(np.eye(1026, 1026, dtype=np.float32), 513),
        "fc_out, biased reads the last state of each direction, .* too many",
    ),
    "steps turned and not turned back": (
        lambda: graph(
            [node("Slice", ["x", "last", "first", "zero", "last"], ["z"], "flip")],
            reads="z",
            last=np.array([-1]),
            first=np.array([-(2**63)]),
            zero=np.array([0]),
        ),
        "rows: has its steps or its batch from the last to the first",
    ),
    "a batch that is turned": (
        lambda: graph(
            [node("Gather", ["x", "turned"], ["z"], "flip", axis=1)],
            reads="z",
            inputs=[("x", TensorProto.FLOAT, ["t", 2, 4])],
            turned=np.array([1, 0]),
        ),
        "cell: LSTM: X has its batch from the last to the first",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_bundle_has_no_place_for_is_refused_by_name(case: str, tmp_path: Path) -> None:
    make, message = REFUSED[case]
    with pytest.raises(UnsupportedModuleError, match=message):
        imported(make(), tmp_path)


# --- Directions ----------------------------------------------------------------------------------


class Turned(nn.Module):
    """Flips around recurrent modules."""

    def __init__(self, kind: Callable[..., Any], what: str) -> None:
        super().__init__()
        self.what = what
        self.forwards = kind(4, 5, batch_first=True)
        self.backwards = kind(4, 5, batch_first=True)
        self.both = kind(4, 5, batch_first=True, bidirectional=True)
        self.head = nn.Linear(10 if "both" in what or "beside" in what else 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.what == "both":
            return self.head(self.both(x.flip(1))[0].flip(1))
        turned = self.backwards(x.flip(1))[0].flip(1)
        if self.what == "beside":
            turned = torch.cat((self.forwards(x)[0], turned), -1)
        return self.head(turned)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("what", ["alone", "beside", "both"])
@pytest.mark.parametrize("dynamic", [True, False])
def test_a_layer_between_flips_runs_in_reverse(
    kind: Callable[..., Any], what: str, dynamic: bool, tmp_path: Path
) -> None:
    module = Turned(kind, what).eval()
    fill(module)
    file = tmp_path / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            (torch.zeros(2, 6, 4),),
            str(file),
            dynamo=False,
            input_names=["x"],
            dynamic_axes={"x": {0: "n", 1: "m"}} if dynamic else None,
        )
    found = import_model(file)
    x = torch.randn(2, 6, 4)
    with torch.no_grad():
        expected = module(x).swapaxes(0, 1).numpy()
    assert error(served(found, x.swapaxes(0, 1).numpy()), expected) < FLOAT32_ERROR_MAX
    directions = [layer.direction for layer in found.spec("model").layers]
    assert directions == ["reverse" if what == "alone" else "bidirectional"]


@pytest.mark.parametrize("lens", ["constant", "computed"])
def test_a_reversed_sequence_is_a_flip_where_it_is_whole(lens: str, tmp_path: Path) -> None:
    steps: Any = 9 if lens == "constant" else "t"
    shape = [
        node("Shape", ["x"], ["shape"]),
        node("Slice", ["shape", "zero", "one"], ["steps"]),
        node("Slice", ["shape", "one", "two"], ["batch"]),
        node("Expand", ["steps", "batch"], ["lens"]),
    ]
    constants = {name: np.array([n]) for n, name in enumerate(("zero", "one", "two"))}
    if lens == "constant":
        shape, constants = [], {"lens": np.array([9, 9])}
    axes = {"time_axis": 0, "batch_axis": 1}
    model = graph(
        [*shape, node("ReverseSequence", ["x", "lens"], ["z"], "flip", **axes)],
        [node("ReverseSequence", ["rows", "lens"], ["out"], "back", **axes)],
        ["out"],
        reads="z",
        inputs=[("x", TensorProto.FLOAT, [steps, 2, 4])],
        **constants,
    )
    found, _ = agrees(model, tmp_path)
    assert [layer.direction for layer in found.spec("model").layers] == ["reverse"]
    early = graph(
        [node("ReverseSequence", ["x", "lens"], ["z"], "flip", **axes)],
        reads="z",
        inputs=[("x", TensorProto.FLOAT, ["t", 2, 4])],
        lens=np.array([4, 5]),
    )
    with pytest.raises(UnsupportedModuleError, match="flip: ReverseSequence: its sequence_lens"):
        imported(early, tmp_path)


def test_both_directions_as_the_node_lays_them_out(tmp_path: Path) -> None:
    model = graph(outputs=["y"], ways=2)
    found = imported(model, tmp_path)
    x = normal(9, 2, 4)
    expected = judged(model, {"x": x})["y"].transpose(0, 2, 1, 3).reshape(9, 2, 6)
    assert error(served(found, x), expected) < FLOAT32_ERROR_MAX
    assert said(found, "y has the 6 numbers of a row along another axis")


def test_the_states_at_both_ends_are_in_two_rows(tmp_path: Path) -> None:
    model = graph(outputs=["h"], ways=2)
    found = imported(model, tmp_path)
    x = normal(9, 2, 4)
    rows, expected = served(found, x), judged(model, {"x": x})["h"]
    assert error(rows[-1][:, :3], expected[0]) < FLOAT32_ERROR_MAX
    assert error(rows[0][:, 3:], expected[1]) < FLOAT32_ERROR_MAX
    assert said(
        found, "h is the first 3 numbers of the last step's row and the others of the first"
    )


@pytest.mark.parametrize("way", [0, 1])
@pytest.mark.parametrize("op", ["Gather", "Slice", "Split"])
def test_one_direction_of_both_is_a_layer_of_its_own(way: int, op: str, tmp_path: Path) -> None:
    if op == "Gather":
        nodes = [node("Gather", ["y", "way"], ["one"], axis=1)]
    elif op == "Slice":
        nodes = [node("Slice", ["rows", "from", "to", "two"], ["one"])]
    else:
        nodes = [
            node("Split", ["y"], ["f", "r"], axis=1),
            node("Squeeze", ["fr"[way], "axis"], ["one"]),
        ]
    model = graph(
        after=[*nodes, fc("one", "K", "out")],
        outputs=["out"],
        ways=2,
        way=np.array(way),
        axis=np.array([1]),
        two=np.array([2]),
        K=normal(3, 2),
        **{"from": np.array([3 * way]), "to": np.array([3 * way + 3])},
    )
    found, _ = agrees(model, tmp_path)
    assert [each.direction for each in found.spec("model").layers] == [["forward", "reverse"][way]]


def test_directions_summed_are_a_head(tmp_path: Path) -> None:
    nodes = [
        node("Split", ["y"], ["f", "r"], axis=1),
        node("Add", ["f", "r"], ["s"]),
        node("Squeeze", ["s", "axis"], ["out"]),
    ]
    agrees(graph(after=nodes, outputs=["out"], ways=2, axis=np.array([1])), tmp_path)


# --- Files of PyTorch's default exporter ---------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "cells"),
    [
        ("lstm-2-layers", ["lstm", "lstm"]),
        ("lstm-bidirectional", ["lstm", "lstm"]),
        ("lstm-last-state", ["lstm"]),
        ("gru-two-heads", ["gru", "gru"]),
        ("gru-batch-norm", ["gru"]),
        ("gru-flipped", ["gru", "gru"]),
        ("gru-learned-state", ["gru"]),
        ("rnn-unrolled", ["rnn", "rnn"]),
    ],
)
def test_what_the_default_exporter_writes(name: str, cells: list[str]) -> None:
    file = FILES / f"dynamo-{name}.onnx"
    found = import_model(file)
    assert [layer.cell for layer in found.spec("model").layers] == cells
    x = normal(5, 2, 6)
    expected = judged(onnx.load(file), {"x": x.swapaxes(0, 1)})
    rows = served(found, x)
    start = 0
    for each in expected.values():
        own = rows[..., start : start + each.shape[-1]]
        start += each.shape[-1]
        right = own[-1] if name == "lstm-last-state" else own.swapaxes(0, 1)
        assert error(right, each) < FLOAT32_ERROR_MAX


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_chain_of_maps_is_what_onnx_runtime_computes(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Maps before the layer and after it, of any kinds in any order."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**31)))
    constants: dict[str, Any] = {}

    def chain(start: str, size: int, letter: str) -> tuple[list[Any], str, int]:
        nodes: list[Any] = []
        for number in range(data.draw(st.integers(0, 4))):
            op = data.draw(st.sampled_from(["Add", "Sub", "Mul", "Div", "MatMul", "Neg", "Gather"]))
            name, key = f"{letter}{number}", f"{letter}k{number}"
            wide = data.draw(st.integers(1, 5))
            match op:
                case "MatMul":
                    constants[key] = rng.normal(0, 0.5, (size, wide)).astype(np.float32)
                    size = wide
                case "Gather":
                    constants[key] = rng.integers(0, size, wide)
                    size = wide
                case "Neg":
                    key = ""
                case _:
                    shape = data.draw(st.sampled_from([(), (1,), (size,), (1, 1, size)]))
                    constants[key] = (rng.choice([-1, 1]) * rng.uniform(0.5, 1.5, shape)).astype(
                        np.float32
                    )
            attributes = {"axis": 2} if op == "Gather" else {}
            operands = [start, key] if key else [start]
            commutes = op in ("Add", "Mul", "Sub") and data.draw(st.booleans())
            nodes.append(
                node(op, operands[::-1] if commutes else operands, [name], name, **attributes)
            )
            start = name
        return nodes, start, size

    before, reads, size = chain("x", 4, "p")
    ways = data.draw(st.sampled_from([1, 2]))
    op = data.draw(st.sampled_from(["LSTM", "GRU", "RNN"]))
    after, out, _ = chain("rows", 3 * ways, "q")
    model = graph(before, after, [out], op=op, reads=reads, ways=ways, size=size, **constants)
    found = imported(model, tmp_path_factory.mktemp("chain"))
    x = normal(6, 2, 4)
    expected = judged(model, {"x": x})[out]
    # Sums may cancel, so the error is held against the numbers that were added.
    rows = served(found, x)
    assert rows.shape == expected.shape
    assert np.abs(rows - expected).max() < 2e-5 * max(1, np.abs(expected).max())
