"""Gates brought into the bundle's order by hand: the public names alone."""

from __future__ import annotations

import doctest
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conveyor_models import UnsupportedModuleError, load_bundle, parse_spec, save_bundle
from conveyor_models.importers import blocks, gru_tensors, joined, lstm_tensors
from tests.unit.docs.markdown import DOCS
from tests.unit.docs.markdown import blocks as blocks_of

INPUTS, SIZE, STEPS = 3, 5, 20


def spec(cell: str, **more: str) -> str:
    lines = [f'{key} = "{value}"' for key, value in more.items()]
    return "\n".join(
        [
            'schema = 1\nname = "by-hand"',
            f'[input]\nkind = "features"\nsize = {INPUTS}',
            f'[[layers]]\ncell = "{cell}"\nsize = {SIZE}',
            *lines,
        ]
    )


def rows(text: str, tensors: dict[str, Tensor], x: Tensor, folder: Path) -> Tensor:
    """Those of a bundle that is written with the tensors and read again."""
    weights = {f"layers.0.{name}": tensor for name, tensor in tensors.items()}
    save_bundle(folder / "by-hand", parse_spec(text), weights)
    return load_bundle(folder / "by-hand").network().predict(x)


@pytest.mark.parametrize("gates", ["ifgo", "iofg", "gofi"])
def test_an_lstm_of_any_order_of_gates(gates: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    module, x = nn.LSTM(INPUTS, SIZE), torch.randn(STEPS, 2, INPUTS)
    bias = module.bias_ih_l0 + module.bias_hh_l0
    theirs = [
        joined(blocks(tensor.detach(), "ifgo"), gates)
        for tensor in (module.weight_ih_l0, module.weight_hh_l0, bias)
    ]
    tensors = lstm_tensors(*theirs, gates=gates)
    with torch.no_grad():
        expected, _ = module(x)
    torch.testing.assert_close(rows(spec("lstm"), tensors, x, tmp_path), expected)


@pytest.mark.parametrize("gates", ["rzn", "zrn", "nzr"])
def test_a_gru_of_any_order_of_gates(gates: str, tmp_path: Path) -> None:
    torch.manual_seed(2)
    module, x = nn.GRU(INPUTS, SIZE), torch.randn(STEPS, 2, INPUTS)
    parameters = (module.weight_ih_l0, module.weight_hh_l0, module.bias_ih_l0, module.bias_hh_l0)
    a, b, c, d = (joined(blocks(tensor.detach(), "rzn"), gates) for tensor in parameters)
    tensors = gru_tensors((a, b), (c, d), gates, "after")
    with torch.no_grad():
        expected, _ = module(x)
    found = rows(spec("gru", reset="after"), tensors, x, tmp_path)
    torch.testing.assert_close(found, expected)


def test_with_the_reset_before_the_biases_are_one() -> None:
    biases = torch.arange(6.0), torch.arange(6.0) * 10
    tensors = gru_tensors((torch.ones(6, 3), torch.ones(6, 2)), biases, "rzn", "before")
    assert torch.equal(tensors["bias"], torch.arange(6.0) * 11)
    assert "bias_recurrent" not in tensors


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "rows that do not divide": (lambda: blocks(torch.ones(7, 2), "ifgo"), r"shape \[7, 2\]"),
    "no rows": (lambda: blocks(torch.ones(0, 2), "ifgo"), r"shape \[0, 2\]"),
    "a number": (lambda: blocks(torch.tensor(1.0), "ifgo"), r"shape \[\]"),
    "a letter twice": (lambda: blocks(torch.ones(8, 2), "iffo"), "gates 'iffo'"),
    "a block that is missing": (lambda: joined({"r": torch.ones(2)}, "rz"), "gates 'rz'"),
    "blocks of two shapes": (
        lambda: joined({"r": torch.ones(2), "z": torch.ones(3)}, "rz"),
        "expected one of one shape for each",
    ),
    "other letters": (
        lambda: lstm_tensors(torch.ones(8, 3), torch.ones(8, 2), torch.ones(8), "ifco"),
        "gates 'ifco': expected the letters of 'ifgo'",
    ),
    "a bias of two": (
        lambda: lstm_tensors(torch.ones(8, 3), torch.ones(8, 2), torch.ones(16), "ifgo"),
        r"bias: shape \[16\], expected \[8\]",
    ),
    "a transposed kernel": (
        lambda: lstm_tensors(torch.ones(3, 8), torch.ones(8, 2), torch.ones(8), "ifgo"),
        r"weight_input: shape \[3, 8\], expected \[8, any\]",
    ),
    "an lstm as a gru": (
        lambda: gru_tensors(
            (torch.ones(12, 3), torch.ones(12, 3)), (torch.ones(12), torch.ones(12)), "rzn", "after"
        ),
        r"weight_recurrent: shape \[12, 3\], expected \[3 \* H, H\]",
    ),
    "another reset": (
        lambda: gru_tensors(
            (torch.ones(6, 3), torch.ones(6, 2)), (torch.ones(6), torch.ones(6)), "rzn", "none"
        ),
        "reset 'none': expected 'after' or 'before'",
    ),
}


@pytest.mark.parametrize(("call", "said"), WRONG.values(), ids=WRONG.keys())
def test_what_does_not_fit_is_refused(call: Callable[[], Any], said: str) -> None:
    with pytest.raises(UnsupportedModuleError, match=said):
        call()


@pytest.mark.parametrize("function", [blocks, joined])
def test_the_examples_are_right(function: Callable[..., Any]) -> None:
    names = {"blocks": blocks, "joined": joined, "torch": torch}
    (found,) = doctest.DocTestFinder(recurse=False).find(function, globs=names)
    assert found.examples
    assert doctest.DocTestRunner().run(found).failed == 0


def test_the_page_shows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = DOCS / "guides" / "importing.md"
    (block,) = [each for each in blocks_of(page, "python") if "lstm_tensors(W" in each.text]
    monkeypatch.chdir(tmp_path)
    exec(block.text, {})
    assert load_bundle(tmp_path / "models" / "by-hand").spec.layers[0].cell == "lstm"
