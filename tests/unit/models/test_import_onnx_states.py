"""Where recurrent nodes of ONNX begin and end: computed states are refused, never dropped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from conveyor_models import BundleError, UnsupportedModuleError
from tests.unit.models.importing import FLOAT32_ERROR_MAX, error
from tests.unit.models.onnx_files import (
    graph_model,
    imported,
    judged,
    normal,
    said,
    served,
    weights,
)

X = ("x", TensorProto.FLOAT, ["t", "b", 4])
CONSTANTS: dict[str, Any] = {
    "zero": np.array([0]),
    "one": np.array([1]),
    "two": np.array([2]),
    "three": np.array([3]),
    "four": np.array([4]),
    "end": np.array([2**40]),
}
node = helper.make_node


def named(op: str, letter: str, reads: int, ways: int = 1) -> dict[str, Any]:
    found = weights(op, 3, reads, ways, seed=ord(letter))
    return {f"{letter}{name}": each for name, each in found.items()}


def gru(y: str, x: str = "x", h0: str = "", lens: str = "", **attributes: Any) -> Any:
    """Its weights are named after its output, so are its last state and its rows [T, B, H]."""
    names = [f"{y}{name}" for name in "WRB"]
    return node(
        "GRU", [x, *names, lens, h0], [y, f"{y}_h"], name=f"gru_{y}", hidden_size=3, **attributes
    )


def rows(y: str) -> Any:
    return node("Squeeze", [y, "one"], [f"{y}_rows"], name=f"rows_{y}")


def graph(
    nodes: Sequence[Any],
    inputs: Sequence[Any] = (X,),
    outputs: Sequence[str] = ("a_rows",),
    **constants: Any,
) -> onnx.ModelProto:
    own = named("GRU", "a", 4) | named("GRU", "b", 3) | named("GRU", "c", 4)
    used = {name for each in nodes for name in each.input}
    every = CONSTANTS | own | constants
    kept = {name: each for name, each in every.items() if name in used}
    return graph_model(nodes, inputs, outputs, kept)


def state(*shape: Any, name: str = "s") -> tuple[str, int, list[Any]]:
    return (name, TensorProto.FLOAT, list(shape))


# --- Initial states ------------------------------------------------------------------------------

OUTSIDE: dict[str, tuple[list[Any], tuple[str, int, list[Any]]]] = {
    "as it is": ([], state(1, "b", 3, name="h0")),
    "transposed": ([node("Transpose", ["s"], ["h0"], perm=[1, 0, 2])], state("b", 1, 3)),
    "one of two layers'": ([node("Slice", ["s", "one", "two", "zero"], ["h0"])], state(2, "b", 3)),
    "a half of its numbers": (
        [node("Slice", ["s", "three", "end", "two"], ["h0"])],
        state(1, "b", 6),
    ),
    "a split": ([node("Split", ["s"], ["h0", "rest"], axis=0)], state(2, "b", 3)),
    "an entry": (
        [node("Gather", ["s", "one"], ["h0"], axis=0)],
        state(2, "b", 3),
    ),
    "unsqueezed": ([node("Unsqueeze", ["s", "zero"], ["h0"])], state("b", 3)),
    "two laid together and apart": (
        [
            node("Concat", ["s", "r"], ["sr"], axis=0),
            node("Slice", ["sr", "one", "two", "zero"], ["h0"]),
        ],
        state(1, "b", 3),
    ),
}


@pytest.mark.parametrize("case", OUTSIDE)
def test_an_input_that_is_only_moved_is_the_carry_of_a_session(case: str, tmp_path: Path) -> None:
    nodes, given = OUTSIDE[case]
    more = [state(1, "b", 3, name="r")] if "two laid" in case else []
    model = graph([*nodes, gru("a", h0="h0"), rows("a")], [X, given, *more])
    found = imported(model, tmp_path)
    assert said(found, "gru_a: initial_h is given from outside, so a session begins with zeros")
    x = normal(7, 1, 4)
    shape = [1 if each == "b" else each for each in given[2]]
    feeds = {"x": x, given[0]: np.zeros(shape, np.float32)}
    feeds |= {"r": np.zeros((1, 1, 3), np.float32)} if more else {}
    expected = judged(model, feeds)["a_rows"]
    assert error(served(found, x), expected) < FLOAT32_ERROR_MAX


COMPUTED: dict[str, tuple[Callable[[], onnx.ModelProto], str]] = {
    "the state another layer ended with": (
        lambda: graph([gru("c"), gru("a", h0="c_h"), rows("a")]),
        "gru_a: initial_h is the state that gru_c ended with",
    ),
    "that state, of another input": (
        lambda: graph(
            [gru("c", x="src"), gru("a", h0="c_h"), rows("a")],
            [X, ("src", TensorProto.FLOAT, ["u", "b", 4])],
        ),
        "gru_a: initial_h is the state that gru_c ended with",
    ),
    "that state, moved": (
        lambda: graph(
            [
                gru("c"),
                node("Transpose", ["c_h"], ["t"], perm=[1, 0, 2]),
                node("Transpose", ["t"], ["h0"], perm=[1, 0, 2]),
                gru("a", h0="h0"),
                rows("a"),
            ]
        ),
        "gru_a: initial_h is the state that gru_c ended with",
    ),
    "that state beside an input": (
        lambda: graph(
            [
                gru("c"),
                node("Concat", ["s", "c_h"], ["both"], axis=0),
                node("Slice", ["both", "one", "two", "zero"], ["h0"]),
                gru("a", h0="h0"),
                rows("a"),
            ],
            [X, state(1, "b", 3)],
        ),
        "gru_a: initial_h is the state that gru_c ended with",
    ),
    "a linear layer on an input": (
        lambda: graph(
            [node("MatMul", ["s", "K"], ["h0"], "fc"), gru("a", h0="h0"), rows("a")],
            [X, state(1, "b", 5)],
            K=np.ones((5, 3), np.float32),
        ),
        "gru_a: initial_h is computed inside the graph, by fc from s",
    ),
    "a sum with a constant": (
        lambda: graph(
            [node("Add", ["s", "k"], ["h0"], "plus"), gru("a", h0="h0"), rows("a")],
            [X, state(1, "b", 3)],
            k=np.ones(3, np.float32),
        ),
        "gru_a: initial_h is computed inside the graph, by plus from s",
    ),
    "a function of an input": (
        lambda: graph(
            [node("Tanh", ["s"], ["h0"], "tanh"), gru("a", h0="h0"), rows("a")],
            [X, state(1, "b", 3)],
        ),
        r"gru_a: initial_h is computed inside the graph \(tanh: operator Tanh",
    ),
    "the first row": (
        lambda: graph(
            [
                node("Slice", ["x", "zero", "one", "zero"], ["h0"]),
                gru("a", h0="h0"),
                rows("a"),
            ],
            aW=weights("GRU", 3, 4)["W"],
        ),
        "gru_a: initial_h is cut from x, whose rows are the model's input",
    ),
    "a row by its number": (
        lambda: graph(
            [
                node("Gather", ["x", "zero"], ["h0"], axis=0),
                gru("a", h0="h0"),
                rows("a"),
            ]
        ),
        "gru_a: initial_h is cut from x",
    ),
    "a mean of the rows": (
        lambda: graph(
            [
                node("ReduceMean", ["x"], ["h0"], "mean", axes=[0], keepdims=1),
                gru("a", h0="h0"),
                rows("a"),
            ]
        ),
        r"gru_a: initial_h is computed inside the graph \(mean: operator ReduceMean",
    ),
    "random numbers": (
        lambda: graph(
            [
                node("RandomNormal", [], ["h0"], "noise", shape=[1, 1, 3]),
                gru("a", h0="h0"),
                rows("a"),
            ]
        ),
        r"gru_a: initial_h is computed inside the graph \(noise: operator RandomNormal",
    ),
}


@pytest.mark.parametrize("case", COMPUTED)
def test_a_state_that_the_graph_computes_is_refused(case: str, tmp_path: Path) -> None:
    make, message = COMPUTED[case]
    with pytest.raises(UnsupportedModuleError, match=message):
        imported(make(), tmp_path)


def test_the_initial_c_of_an_lstm_is_held_to_the_same(tmp_path: Path) -> None:
    own = weights("LSTM", 3, 4)
    names = [*own, "", "zeros", "c0"]
    nodes = [
        node("Slice", ["x", "zero", "one", "zero"], ["c0"]),
        node("LSTM", ["x", *names], ["y"], "cell", hidden_size=3),
    ]
    zeros = {"zeros": np.zeros((1, 1, 3), np.float32)}
    constants = own | zeros | {"zero": np.array([0]), "one": np.array([1])}
    with pytest.raises(UnsupportedModuleError, match="cell: initial_c is cut from x"):
        imported(graph_model(nodes, [X], ["y"], constants), tmp_path)


@pytest.mark.parametrize("how", ["Expand", "Tile", "Mul", "static"])
def test_a_learned_state_begins_every_session(how: str, tmp_path: Path) -> None:
    h0 = normal(1, 1, 3, seed=5)
    batch: Any = "b"
    nodes = [
        node("Shape", ["x"], ["shape"]),
        node("Slice", ["shape", "one", "two"], ["batch"]),
        node("Concat", ["one", "batch", "three"], ["target"], axis=0),
        node("Concat", ["one", "batch", "one"], ["times"], axis=0),
    ]
    if how == "Tile":
        nodes += [node("Tile", ["learned", "times"], ["h0"])]
    elif how == "Mul":
        nodes += [
            node("Expand", ["learned", "target"], ["wide"]),
            node("Mul", ["wide", "factor"], ["h0"]),
        ]
    else:
        nodes += [node("Expand", ["learned", "target"], ["h0"])]
        batch = 2 if how == "static" else "b"
    model = graph(
        [*nodes, gru("a", h0="h0"), rows("a")],
        [("x", TensorProto.FLOAT, ["t", batch, 4])],
        learned=h0,
        factor=np.float32(0.5),
    )
    found = imported(model, tmp_path)
    x = normal(6, 2, 4)
    assert error(served(found, x), judged(model, {"x": x})["a_rows"]) < FLOAT32_ERROR_MAX
    assert found.spec("model").layers[0].initial_state
    assert not found.notes


# --- Lengths of sequences ------------------------------------------------------------------------


def lengths_of_whole_sequences(minus: bool = False) -> list[Any]:
    """The number of steps for each of the batch, as int32, or one less."""
    return [
        node("Shape", ["x"], ["shape"]),
        node("Slice", ["shape", "zero", "one"], ["steps"]),
        node("Slice", ["shape", "one", "two"], ["batch"]),
        *([node("Sub", ["steps", "one"], ["fewer"])] if minus else []),
        node("Cast", ["fewer" if minus else "steps"], ["narrow"], to=TensorProto.INT32),
        node("Expand", ["narrow", "batch"], ["lens"]),
    ]


def constant_lengths(number: int) -> list[Any]:
    value = numpy_helper.from_array(np.array([number], np.int32))
    return [
        node("Shape", ["x"], ["shape"]),
        node("Slice", ["shape", "one", "two"], ["batch"]),
        node("ConstantOfShape", ["batch"], ["lens"], value=value),
    ]


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("how", ["computed", "added", "static", "constant"])
def test_lengths_of_whole_sequences_change_nothing(
    how: str, direction: str, tmp_path: Path
) -> None:
    steps: Any = "t" if how in ("computed", "added") else 5
    constants: dict[str, Any] = {}
    if how == "added":
        zeros = numpy_helper.from_array(np.array([0], np.int32))
        nodes = lengths_of_whole_sequences()[:-1]
        nodes += [
            node("ConstantOfShape", ["batch"], ["none"], value=zeros),
            node("Add", ["none", "narrow"], ["lens"]),
        ]
    elif how == "constant":
        nodes, constants = [], {"lens": np.array([5, 5], np.int32)}
    else:
        nodes = lengths_of_whole_sequences() if how == "computed" else constant_lengths(5)
    model = graph(
        [*nodes, gru("a", lens="lens", direction=direction), rows("a")],
        [("x", TensorProto.FLOAT, [steps, 2 if how == "constant" else "b", 4])],
        **constants,
    )
    found = imported(model, tmp_path)
    x = normal(5, 2, 4)
    assert error(served(found, x), judged(model, {"x": x})["a_rows"]) < FLOAT32_ERROR_MAX


def test_lengths_from_outside_are_those_of_the_rows_that_are_sent(tmp_path: Path) -> None:
    model = graph([gru("a", lens="n"), rows("a")], [X, ("n", TensorProto.INT32, ["b"])])
    found = imported(model, tmp_path)
    assert said(found, "gru_a: sequence_lens is given from outside")
    x = normal(6, 1, 4)
    expected = judged(model, {"x": x, "n": np.array([4], np.int32)})["a_rows"]
    assert error(served(found, x[:4]), expected[:4]) < FLOAT32_ERROR_MAX


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        (constant_lengths(3), "gru_a: sequence_lens is a constant"),
        (lengths_of_whole_sequences(minus=True), "gru_a: sequence_lens is computed inside"),
        (
            [
                node("ReduceSum", ["mask", "one"], ["long"], "count", keepdims=0),
                node("Cast", ["long"], ["lens"], to=TensorProto.INT32),
            ],
            r"gru_a: sequence_lens is computed inside the graph \(count: operator ReduceSum",
        ),
    ],
    ids=["a constant", "one less", "of a mask"],
)
def test_lengths_that_may_end_a_sequence_are_refused(
    nodes: list[Any], message: str, tmp_path: Path
) -> None:
    mask = ("mask", TensorProto.INT64, ["b", "t"])
    model = graph([*nodes, gru("a", lens="lens"), rows("a")], [X, mask])
    with pytest.raises(UnsupportedModuleError, match=message):
        imported(model, tmp_path)


# --- Final states and outputs --------------------------------------------------------------------


def test_a_final_state_alone_is_the_last_row(tmp_path: Path) -> None:
    model = graph([gru("a")], outputs=["a_h"])
    found = imported(model, tmp_path)
    x = normal(6, 2, 4)
    assert error(served(found, x)[-1:], judged(model, {"x": x})["a_h"]) < FLOAT32_ERROR_MAX
    assert said(found, "a_h is the last step's row; the bundle gives every step's")


def test_a_reverse_layer_ends_at_the_first_row(tmp_path: Path) -> None:
    model = graph([gru("a", direction="reverse")], outputs=["a_h"])
    found = imported(model, tmp_path)
    x = normal(6, 2, 4)
    assert error(served(found, x)[:1], judged(model, {"x": x})["a_h"]) < FLOAT32_ERROR_MAX
    assert said(found, "a_h is the first step's row")


def test_final_states_beside_rows_are_the_carry(tmp_path: Path) -> None:
    nodes = [
        gru("a"),
        rows("a"),
        gru("b", x="a_rows"),
        rows("b"),
        node("Concat", ["a_h", "b_h"], ["states"], axis=0),
    ]
    model = graph(nodes, outputs=["b_rows", "states"])
    found = imported(model, tmp_path)
    assert said(found, "states is a final state: the carry that a session keeps, and no output")
    x = normal(6, 2, 4)
    assert error(served(found, x), judged(model, {"x": x})["b_rows"]) < FLOAT32_ERROR_MAX


@pytest.mark.parametrize("which", [-1, 1])
def test_the_last_layers_state_of_several_is_its_last_row(which: int, tmp_path: Path) -> None:
    nodes = [
        gru("a"),
        rows("a"),
        gru("b", x="a_rows"),
        node("Concat", ["a_h", "b_h"], ["states"], axis=0),
        node("Gather", ["states", "which"], ["top"], axis=0),
        node("Gemm", ["top", "K", "k"], ["out"], transB=1),
    ]
    model = graph(
        nodes,
        outputs=["out"],
        which=np.array(which),
        K=normal(2, 3),
        k=normal(2),
    )
    found = imported(model, tmp_path)
    x = normal(6, 2, 4)
    assert error(served(found, x)[-1], judged(model, {"x": x})["out"]) < FLOAT32_ERROR_MAX


STRAY: dict[str, tuple[Callable[[], onnx.ModelProto], str]] = {
    "a state that is computed with": (
        lambda: graph(
            [gru("a"), rows("a"), node("Mul", ["a_h", "a_h"], ["sq"], "square")],
            outputs=["a_rows", "sq"],
        ),
        "square: Mul: of two paths",
    ),
    "a state added to the rows": (
        lambda: graph(
            [gru("a"), rows("a"), node("Add", ["a_rows", "a_h"], ["sum"], "plus")],
            outputs=["sum"],
        ),
        "plus: Add",
    ),
    "a state of another stack": (
        lambda: graph([gru("a"), rows("a"), gru("c")], outputs=["a_rows", "c_h"]),
        "c_h: is the state of gru_c, which is not on the way to a_rows",
    ),
    "two stacks": (
        lambda: graph([gru("a"), rows("a"), gru("c"), rows("c")], outputs=["a_rows", "c_rows"]),
        "joins gru_a, gru_c",
    ),
    "the rows of a lower layer": (
        lambda: graph(
            [gru("a"), rows("a"), gru("b", x="a_rows"), rows("b")], outputs=["a_rows", "b_rows"]
        ),
        "joins two paths, gru_a and gru_b",
    ),
    "the input": (
        lambda: graph(
            [gru("a"), rows("a"), node("Identity", ["x"], ["same"])], outputs=["a_rows", "same"]
        ),
        "joins two paths",
    ),
    "the states of two layers alone": (
        lambda: graph(
            [
                gru("a"),
                rows("a"),
                gru("b", x="a_rows"),
                node("Concat", ["a_h", "b_h"], ["states"], axis=0),
            ],
            outputs=["states"],
        ),
        "states: expected an output of rows",
    ),
    "a second input added": (
        lambda: graph(
            [node("Add", ["x", "w"], ["xw"], "plus"), gru("a", x="xw"), rows("a")],
            [X, ("w", TensorProto.FLOAT, ["t", "b", 4])],
        ),
        "plus: joins two inputs, w and x",
    ),
    "a second input beside it": (
        lambda: graph(
            [node("Concat", ["x", "w"], ["xw"], "beside", axis=2), gru("a", x="xw"), rows("a")],
            [("x", TensorProto.FLOAT, ["t", "b", 2]), ("w", TensorProto.FLOAT, ["t", "b", 2])],
        ),
        "beside: joins two inputs, w and x",
    ),
    "steps left out": (
        lambda: graph(
            [node("Slice", ["x", "one", "end", "zero"], ["cut"], "cut"), gru("a", x="cut")],
            outputs=["a"],
        ),
        "cut: Slice: takes a part of an axis",
    ),
    "steps in another order": (
        lambda: graph(
            [node("Gather", ["x", "order"], ["cut"], "shuffle", axis=0), gru("a", x="cut")],
            [("x", TensorProto.FLOAT, [3, "b", 4])],
            outputs=["a"],
            order=np.array([1, 0, 2]),
        ),
        "shuffle: Gather: 3 entries",
    ),
    "time in the batch": (
        lambda: graph(
            [node("Reshape", ["x", "flat"], ["cut"], "flat"), gru("a", x="cut")],
            [("x", TensorProto.FLOAT, [5, 2, 4])],
            outputs=["a"],
            flat=np.array([10, 1, 4]),
        ),
        "gru_a: GRU: X has its time merged",
    ),
    "time and batch exchanged by a reshape": (
        lambda: graph(
            [node("Reshape", ["x", "flat"], ["cut"], "flat"), gru("a", x="cut")],
            [("x", TensorProto.FLOAT, [5, 2, 4])],
            outputs=["a"],
            flat=np.array([2, 5, 4]),
        ),
        "flat: reshapes to something",
    ),
    "two layers along different axes of one step": (
        lambda: graph(
            [
                gru("a"),
                rows("a"),
                node("Transpose", ["a_rows"], ["turned"], perm=[1, 0, 2]),
                gru("b", x="turned"),
                rows("b"),
            ],
            [("x", TensorProto.FLOAT, [1, "b", 4])],
            outputs=["b_rows"],
        ),
        "gru_b: GRU: X has its time along another axis",
    ),
    "two layers side by side": (
        lambda: graph(
            [
                gru("a"),
                rows("a"),
                gru("c"),
                rows("c"),
                node("Concat", ["a_rows", "c_rows"], ["out"], "beside", axis=2),
            ],
            outputs=["out"],
        ),
        "beside: joins gru_a, gru_c, which are not one layer forward and one in reverse",
    ),
    "a residual connection": (
        lambda: graph(
            [
                gru("a"),
                rows("a"),
                gru("b", x="a_rows"),
                rows("b"),
                node("Add", ["a_rows", "b_rows"], ["out"], "residual"),
            ],
            outputs=["out"],
        ),
        "residual: joins two paths, gru_a and gru_b",
    ),
}


@pytest.mark.parametrize("case", STRAY)
def test_what_would_be_dropped_is_refused_by_name(case: str, tmp_path: Path) -> None:
    make, message = STRAY[case]
    with pytest.raises(UnsupportedModuleError, match=message):
        imported(make(), tmp_path)


def test_a_step_function_is_the_model_that_it_steps(tmp_path: Path) -> None:
    """One step with the state as input and output, as people export it for a loop of theirs."""
    nodes = [
        node("Unsqueeze", ["x", "zero"], ["wide"]),
        node("Unsqueeze", ["h", "zero"], ["h0"]),
        gru("a", x="wide", h0="h0"),
        node("Squeeze", ["a", "two_axes"], ["out"]),
        node("Squeeze", ["a_h", "zero"], ["h_new"]),
    ]
    model = graph(
        nodes,
        [("x", TensorProto.FLOAT, ["b", 4]), state("b", 3, name="h")],
        ["out", "h_new"],
        two_axes=np.array([0, 1]),
    )
    found = imported(model, tmp_path)
    x, h, expected = normal(7, 2, 4), np.zeros((2, 3), np.float32), []
    for row in x:
        step = judged(model, {"x": row, "h": h})
        h = step["h_new"]
        expected.append(step["out"])
    assert error(served(found, x), np.stack(expected)) < FLOAT32_ERROR_MAX


@pytest.mark.parametrize(("before", "producer"), [(0, "pytorch"), (1, "pytorch"), (0, "other")])
def test_a_reset_before_is_not_pytorchs(before: int, producer: str, tmp_path: Path) -> None:
    model = graph([gru("a", linear_before_reset=before), rows("a")])
    model.producer_name = producer
    noted = said(imported(model, tmp_path), "linear_before_reset is 0, which nn.GRU has not")
    assert noted == (before == 0 and producer == "pytorch")


# --- Bounds --------------------------------------------------------------------------------------


def doubled(start: str, op: str, times: int, **attributes: Any) -> tuple[list[Any], str]:
    nodes = []
    for number in range(times):
        name = f"double{number}"
        nodes.append(node(op, [start, start], [name], name, **attributes))
        start = name
    return nodes, start


@pytest.mark.parametrize("what", ["a constant", "a shape", "a length", "rows", "maps"])
def test_a_small_file_cannot_ask_for_much(what: str, tmp_path: Path) -> None:
    if what == "rows":
        nodes, last = doubled("a_rows", "Concat", 40, axis=2)
        model = graph([gru("a"), rows("a"), *nodes], outputs=[last])
    elif what == "maps":
        nodes = [
            node("MatMul", ["a_rows" if not n else f"m{n - 1}", "K"], [f"m{n}"], f"m{n}")
            for n in range(100)
        ]
        model = graph([gru("a"), rows("a"), *nodes], outputs=["m99"], K=np.eye(3, dtype=np.float32))
    else:
        first = {"a constant": "k", "a shape": "shape", "a length": "shape"}[what]
        op = "Mul" if what == "a length" else "Concat"
        nodes, last = doubled(first, op, 40, **({} if op == "Mul" else {"axis": 0}))
        shape = [node("Shape", ["x"], ["shape"])] if first == "shape" else []
        made = [node("ConstantOfShape", [last], ["made"])] if shape else []
        end = "made" if made else last
        add = node("Add", ["a_rows", end], ["out"], "plus")
        model = graph(
            [*shape, *nodes, *made, gru("a"), rows("a"), add],
            outputs=["out"],
            k=np.ones(3, np.float32),
        )
    with pytest.raises(BundleError, match=r"expected at most|more than 8 terms|more than 64"):
        imported(model, tmp_path)
