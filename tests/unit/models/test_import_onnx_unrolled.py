"""Cells in a loop, which come out of an exporter step by step."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from conveyor_models import UnsupportedModuleError
from conveyor_models.importers import import_model
from tests.unit.models.importing import FLOAT32_ERROR_MAX, error, fill
from tests.unit.models.onnx_files import graph_model, judged, normal, said, served

node = helper.make_node
CELLS = [nn.LSTMCell, nn.GRUCell, nn.RNNCell]
SIZE, STEPS = 5, 4


class Loop(nn.Module):
    """One or two cells stepped by hand, in ways that are layers and in ways that are not."""

    def __init__(
        self, kind: Callable[..., Any], how: str = "", reads: int = 3, **more: Any
    ) -> None:
        super().__init__()
        self.first, self.second = kind(reads, SIZE, **more), kind(SIZE, SIZE, **more)
        self.other = kind(reads, SIZE, **more)
        self.head, self.before = nn.Linear(SIZE, 2), nn.Linear(reads, reads)
        self.norm = nn.LayerNorm(SIZE)
        self.h0, self.c0 = nn.Parameter(torch.zeros(1, SIZE)), nn.Parameter(torch.zeros(1, SIZE))
        self.how, self.pair = how, kind is nn.LSTMCell

    def step(self, cell: nn.Module, x: Tensor, state: tuple[Tensor, Tensor]) -> Any:
        if self.pair:
            return cell(x, state)
        return cell(x, state[0]), state[1]

    def begin(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.how == "learned":
            return self.h0.expand(x.shape[0], -1), self.c0.expand(x.shape[0], -1)
        zeros = x.new_zeros(x.shape[0], SIZE)
        if self.how == "state from x":
            return x[:, 0, :1].expand(-1, SIZE) * self.h0, zeros
        return zeros, zeros

    def order(self, steps: int) -> list[int]:
        whole = list(range(steps))
        orders = {"reverse": whole[::-1], "skip": whole[::2], "late": whole[1:]}
        return orders.get(self.how, [0, *whole] if self.how == "twice" else whole)

    def forward(self, x: Tensor) -> Tensor:
        lower, upper = self.begin(x), self.begin(x)
        rows: list[Tensor] = []
        for number in self.order(x.shape[1]):
            row = self.before(x[:, number]) if self.how == "mapped" else x[:, number]
            cell = self.other if self.how == "others" and number % 2 else self.first
            lower = self.step(cell, row, lower)
            if self.how == "scaled":
                lower = lower[0] * 2, lower[1]
            if self.how == "normed":
                lower = self.norm(lower[0]), lower[1]
            if self.how == "reset" and number == 1:
                lower = self.begin(x)
            if self.how == "two":
                upper = self.step(self.second, lower[0], upper)
            top = upper[0] if self.how == "two" else lower[0]
            rows.append(self.head(top) if self.how == "each" else top)
        if self.how == "reverse":
            rows = rows[::-1]
        if self.how == "last":
            return self.head(rows[-1])
        y = torch.stack(rows, 1)
        return y if self.how == "each" else self.head(y)


def exported(module: nn.Module, file: Path, axes: dict[int, str] | None, reads: int = 3) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module.eval(),
            (torch.zeros(2, STEPS, reads),),
            str(file),
            dynamo=False,
            input_names=["x"],
            dynamic_axes={"x": axes} if axes else None,
        )


@pytest.mark.parametrize("axes", [None, {0: "n"}, {0: "n", 1: "m"}], ids=["", "batch", "time"])
@pytest.mark.parametrize("how", ["", "two", "each", "last", "learned", "mapped"])
@pytest.mark.parametrize("kind", CELLS)
def test_a_loop_is_the_layer_that_it_steps(
    kind: Callable[..., Any], how: str, axes: dict[int, str] | None, tmp_path: Path
) -> None:
    module = Loop(kind, how)
    fill(module)
    file = tmp_path / "model.onnx"
    exported(module, file, axes)
    found = import_model(file)
    x = normal(STEPS, 2, 3)
    (expected,) = judged(onnx.load(file), {"x": x.swapaxes(0, 1)}).values()
    rows = served(found, x)
    right = rows[-1] if how == "last" else rows.swapaxes(0, 1)
    assert error(right, expected) < FLOAT32_ERROR_MAX
    cell = {"LSTMCell": "lstm", "GRUCell": "gru", "RNNCell": "rnn"}[kind.__name__]
    layers = found.spec("model").layers
    assert [layer.cell for layer in layers] == [cell] * (2 if how == "two" else 1)
    assert layers[0].initial_state == (how == "learned")
    open_ended = axes is not None and 1 in axes
    assert said(found, f"is written out for {STEPS} steps; the bundle takes any") == open_ended
    # The layer is that of the module, over more steps than the file has.
    long = normal(11, 1, 3)
    with torch.no_grad():
        whole = module(torch.from_numpy(long).swapaxes(0, 1))
    longer = served(found, long)
    right = longer[-1] if how == "last" else longer.swapaxes(0, 1)
    assert error(right, whole.numpy()) < FLOAT32_ERROR_MAX


@pytest.mark.parametrize("kind", CELLS)
def test_a_loop_from_the_end_is_a_reverse_layer(kind: Callable[..., Any], tmp_path: Path) -> None:
    module = Loop(kind, "reverse")
    fill(module)
    exported(module, tmp_path / "model.onnx", None)
    found = import_model(tmp_path / "model.onnx")
    x = normal(STEPS, 2, 3)
    with torch.no_grad():
        expected = module(torch.from_numpy(x).swapaxes(0, 1)).swapaxes(0, 1).numpy()
    assert error(served(found, x), expected) < FLOAT32_ERROR_MAX
    assert [layer.direction for layer in found.spec("model").layers] == ["reverse"]


@pytest.mark.parametrize(
    ("kind", "more"),
    [*((kind, {"bias": False}) for kind in CELLS), (nn.RNNCell, {"nonlinearity": "relu"})],
    ids=str,
)
def test_options_of_cells(kind: Callable[..., Any], more: dict[str, Any], tmp_path: Path) -> None:
    module = Loop(kind, **more)
    fill(module)
    exported(module, tmp_path / "model.onnx", {0: "n"})
    found = import_model(tmp_path / "model.onnx")
    x = normal(STEPS, 2, 3)
    with torch.no_grad():
        expected = module(torch.from_numpy(x).swapaxes(0, 1)).swapaxes(0, 1).numpy()
    assert error(served(found, x), expected) < FLOAT32_ERROR_MAX


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        *(
            (kind, how)
            for kind in CELLS
            for how in ("skip", "late", "twice", "others", "scaled", "normed", "state from x")
        ),
        (nn.LSTMCell, "reset"),
    ],
)
def test_a_loop_that_is_no_layer_is_refused(
    kind: Callable[..., Any], how: str, tmp_path: Path
) -> None:
    module = Loop(kind, how)
    fill(module)
    exported(module, tmp_path / "model.onnx", None)
    with pytest.raises(UnsupportedModuleError, match=r".+: .+"):
        import_model(tmp_path / "model.onnx")


class Step(nn.Module):
    """One step, with its state as inputs and outputs."""

    def __init__(self, kind: Callable[..., Any], reads: int) -> None:
        super().__init__()
        self.cell, self.head = kind(reads, SIZE), nn.Linear(SIZE, 2)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        if isinstance(self.cell, nn.LSTMCell):
            h, c = self.cell(x, (h, c))
            return self.head(h), h, c
        h = self.cell(x, h)
        return self.head(h), h, c + 0


class Stateless(Step):
    """Without the c that only an LSTM has."""

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        h = self.cell(x, h)
        return self.head(h), h


@pytest.mark.parametrize("kind", CELLS)
def test_one_step_of_a_cell_is_the_layer(kind: Callable[..., Any], tmp_path: Path) -> None:
    module = (Step if kind is nn.LSTMCell else Stateless)(kind, 3).eval()
    fill(module)
    count = 2 if kind is nn.LSTMCell else 1
    file = tmp_path / "model.onnx"
    states = [torch.zeros(1, SIZE)] * count
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            (torch.zeros(1, 3), *states),
            str(file),
            dynamo=False,
            input_names=["x", "h", "c"][: 1 + count],
            output_names=["out", "h_new", "c_new"][: 1 + count],
        )
    found = import_model(file)
    assert said(found, "its state is given from outside, so a session begins with zeros")
    assert said(found, "h_new is a final state: the carry that a session keeps")
    x, expected = normal(8, 1, 3), []
    with torch.no_grad():
        for row in torch.from_numpy(x):
            out, *states = module(row, *states)
            expected.append(out)
    assert error(served(found, x), torch.stack(expected).numpy()) < FLOAT32_ERROR_MAX


def test_a_step_whose_state_is_as_long_as_its_row_is_refused(tmp_path: Path) -> None:
    """Which of two inputs of the same length is the state, no file says."""
    module = Stateless(nn.RNNCell, SIZE).eval()
    file = tmp_path / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            (torch.zeros(1, SIZE), torch.zeros(1, SIZE)),
            str(file),
            dynamo=False,
            input_names=["x", "h"],
        )
    with pytest.raises(UnsupportedModuleError, match="have the same length"):
        import_model(file)


@pytest.mark.parametrize("kind", CELLS)
def test_a_step_in_the_middle_of_a_loop_is_not_the_last(
    kind: Callable[..., Any], tmp_path: Path
) -> None:
    module = Loop(kind, "each")
    fill(module)
    file = tmp_path / "model.onnx"
    exported(module, file, {0: "n"})
    model = onnx.load(file)
    heads = [each.output[0] for each in model.graph.node if each.name.startswith("/head")]
    x = normal(STEPS, 2, 3)
    for number, name in enumerate(heads):
        del model.graph.output[:]
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, 1, None))
        file.write_bytes(model.SerializeToString())
        if number in (0, STEPS - 1):
            found = import_model(file)
            (expected,) = judged(model, {"x": x.swapaxes(0, 1)}).values()
            assert error(served(found, x)[number], expected) < FLOAT32_ERROR_MAX
            assert said(found, "first step's row" if number == 0 else "last step's row")
        else:
            message = f"{name}: step {number}, that is neither the last nor the first one"
            with pytest.raises(UnsupportedModuleError, match=message):
                import_model(file)


def test_a_first_state_that_was_folded_away_has_to_be_zeros(tmp_path: Path) -> None:
    """A constant in the place of R h0 + b: only where it is b, h0 is zeros."""
    module = Loop(nn.RNNCell, "learned")
    fill(module)
    file = tmp_path / "model.onnx"
    exported(module, file, None)
    x = normal(STEPS, 2, 3)
    for h0 in (torch.zeros(1, SIZE), torch.full((1, SIZE), 0.4)):
        model = onnx.load(file)
        bias = module.first.bias_hh.detach()
        folded = bias + h0 @ module.first.weight_hh.detach().T
        gemm = next(
            each
            for each in model.graph.node
            if each.op_type == "Gemm" and each.input[1].endswith("weight_hh")
        )
        constant = onnx.numpy_helper.from_array(np.repeat(folded.numpy(), 2, 0), gemm.output[0])
        model.graph.node.remove(gemm)
        model.graph.initializer.append(constant)
        folded_file = tmp_path / "folded.onnx"
        folded_file.write_bytes(model.SerializeToString())
        if h0.any():
            with pytest.raises(UnsupportedModuleError, match="its weights or its initial state"):
                import_model(folded_file)
            continue
        (expected,) = judged(model, {"x": x.swapaxes(0, 1)}).values()
        rows = served(import_model(folded_file), x)
        assert error(rows.swapaxes(0, 1), expected) < FLOAT32_ERROR_MAX


@pytest.mark.parametrize("place", ["of the state's map", "added to it"])
def test_a_bias_for_each_row_of_the_batch_is_no_bias_of_a_cell(place: str, tmp_path: Path) -> None:
    """Where the batch is as large as the layer, its numbers are as many as a bias has."""
    inputs = ["h0", "R", "per_row"] if place == "of the state's map" else ["h0", "R"]
    nodes = [
        node("Squeeze", ["x", "zero"], ["row"]),
        node("MatMul", ["row", "W"], ["of_row"], "W"),
        node("Gemm", inputs, ["of_h"], "R"),
        node("Add", ["of_h", "per_row"], ["biased"], "bias"),
        node("Add", ["of_row", "of_h" if len(inputs) == 3 else "biased"], ["sum"], "sum"),
        node("Tanh", ["sum"], ["out"], "tanh"),
    ]
    constants = {"W": normal(4, 3), "R": normal(3, 3, seed=1), "per_row": normal(3, 1, seed=2)}
    constants |= {"h0": np.zeros((3, 3), np.float32), "zero": np.array([0])}
    model = graph_model(nodes, [("x", TensorProto.FLOAT, [1, 3, 4])], ["out"], constants)
    assert judged(model, {"x": normal(1, 3, 4)})
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(UnsupportedModuleError, match=r"with a bias of|Add: of a constant"):
        import_model(tmp_path / "model.onnx")
