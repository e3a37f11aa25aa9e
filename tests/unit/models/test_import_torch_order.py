"""State dicts whose structure has to be said: what is asked, and what the answers give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conveyor_models import AmbiguousModuleError, UnsupportedModuleError
from conveyor_models.importers import ImportedModel, ImportOptions
from tests.unit.models.importing import (
    FLOAT32_ERROR_MAX,
    error,
    fill,
    import_state,
    network_of,
    rows_of,
)

STEPS = 24
CUTS = ((0, 1), (1, 6), (6, 17), (17, STEPS))


class Net(nn.Module):
    """Modules under the names given, and a forward that says how they stand."""

    def __init__(
        self,
        forward: Callable[[Any, Tensor], Tensor],
        parameters: dict[str, tuple[int, ...]] | None = None,
        **modules: nn.Module,
    ) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        for name, shape in (parameters or {}).items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))
        self._run = forward
        fill(self, seed=3)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm1d):
                for statistic in (module.running_mean, module.running_var):
                    assert statistic is not None
                    statistic.copy_(torch.rand_like(statistic) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self._run(self, x)


@dataclass(frozen=True)
class Accepted:
    """A network, what has to be said of it, and what its rows are."""

    make: Callable[[], Net]
    options: ImportOptions = field(default_factory=ImportOptions)
    notes: tuple[str, ...] = ()
    vocabulary: int = 0
    features: int = 5


def rows_first(norm: nn.BatchNorm1d, x: Tensor) -> Tensor:
    """A batch normalisation of rows [T, B, F]."""
    return norm(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def looped(cell: Any, x: Tensor, state: Any = None) -> Tensor:
    """A cell, row by row."""
    rows: list[Tensor] = []
    for row in x:
        state = cell(row, state)
        rows.append(state[0] if isinstance(state, tuple) else state)
    return torch.stack(rows)


def tied() -> Net:
    net = Net(lambda m, x: m.out(m.rnn(m.emb(x))[0]), emb=nn.Embedding(9, 6), rnn=nn.LSTM(6, 6))
    net.out = nn.Linear(6, 9)
    net.out.weight = net.emb.weight
    return net


def repeated(state: Tensor, x: Tensor) -> Tensor:
    return state.expand(-1, x.shape[1], -1).contiguous()


ACCEPTED: dict[str, Accepted] = {
    "a linear layer behind the stack": Accepted(
        lambda: Net(lambda m, x: m.fc(m.rnn(x)[0]), rnn=nn.GRU(5, 7), fc=nn.Linear(7, 3)),
        notes=("rows pass through rnn, then fc, and nothing else", "a ReLU", "--activation"),
    ),
    "a linear layer before the stack": Accepted(
        lambda: Net(lambda m, x: m.rnn(m.fc1(x))[0], fc1=nn.Linear(5, 8), rnn=nn.LSTM(8, 5)),
        ImportOptions(order=("fc1", "rnn"), between="none"),
        ("fc1 folded into rnn", "as --between none says"),
    ),
    "the same sizes, the other way round": Accepted(
        lambda: Net(lambda m, x: m.fc1(m.rnn(x)[0]), fc1=nn.Linear(5, 8), rnn=nn.LSTM(8, 5)),
        ImportOptions(order=("rnn", "fc1")),
        ("rows pass through rnn, then fc1",),
        features=8,
    ),
    "the same, said by --head": Accepted(
        lambda: Net(lambda m, x: m.fc1(m.rnn(x)[0]), fc1=nn.Linear(5, 8), rnn=nn.LSTM(8, 5)),
        ImportOptions(head="fc1"),
        features=8,
    ),
    "linear layers behind each other, both ends": Accepted(
        lambda: Net(
            lambda m, x: m.d(m.c(m.rnn(m.b(m.a(x)))[0])),
            a=nn.Linear(5, 4),
            b=nn.Linear(4, 6, bias=False),
            rnn=nn.LSTM(6, 7, 2, bidirectional=True),
            c=nn.Linear(14, 5),
            d=nn.Linear(5, 2),
        ),
        ImportOptions(order=("a", "b", "rnn", "c", "d"), between="none"),
        ("a, b folded into rnn", "c folded into d", "rnn is bidirectional: what comes after it"),
    ),
    "a linear layer between two recurrent ones": Accepted(
        lambda: Net(
            lambda m, x: m.fc(m.second(m.bridge(m.first(x)[0]))[0]),
            first=nn.LSTM(5, 8, proj_size=3),
            bridge=nn.Linear(3, 4),
            second=nn.GRU(4, 6, 2),
            fc=nn.Linear(6, 2),
        ),
        ImportOptions(order=("first", "bridge", "second", "fc"), between="none"),
        ("bridge folded into second",),
    ),
    "an embedding and a linear layer before the stack": Accepted(
        lambda: Net(
            lambda m, x: m.rnn(m.pre(m.emb(x)))[0],
            emb=nn.Embedding(11, 4),
            pre=nn.Linear(4, 6),
            rnn=nn.GRU(6, 3),
        ),
        ImportOptions(order=("emb", "pre", "rnn"), between="none"),
        vocabulary=11,
    ),
    "an embedding as wide as the stack": Accepted(
        lambda: Net(
            lambda m, x: m.out(m.rnn(m.emb(x))[0]),
            emb=nn.Embedding(11, 6),
            rnn=nn.GRU(6, 6),
            out=nn.Linear(6, 11),
        ),
        ImportOptions(embedding="emb"),
        ("rows pass through emb (an nn.Embedding), then rnn, then out",),
        vocabulary=11,
    ),
    "tied weights": Accepted(
        tied, ImportOptions(order=("emb", "rnn", "out"), embedding="emb"), vocabulary=9
    ),
    "two recurrent modules": Accepted(
        lambda: Net(
            lambda m, x: m.fc(m.b(m.a(x)[0])[0]),
            b=nn.LSTM(6, 6),
            a=nn.GRU(5, 6),
            fc=nn.Linear(6, 2),
        ),
        ImportOptions(order=("a", "b")),
        ("rows pass through a, then b, then fc",),
    ),
    "batch normalisation everywhere": Accepted(
        lambda: Net(
            lambda m, x: rows_first(m.c, m.fc(rows_first(m.b, m.rnn(rows_first(m.a, x))[0]))),
            a=nn.BatchNorm1d(5),
            rnn=nn.GRU(5, 6),
            b=nn.BatchNorm1d(6, affine=False),
            fc=nn.Linear(6, 3),
            c=nn.BatchNorm1d(3, eps=0.25),
        ),
        ImportOptions(
            order=("a", "rnn", "b", "fc", "c"), epsilon={"": 1e-5, "c": 0.25}, between="none"
        ),
        ("a folded into rnn", "b, fc, c folded into the head"),
    ),
    "heads side by side": Accepted(
        lambda: Net(
            lambda m, x: torch.cat([m.actor(y := m.rnn(x)[0]), m.critic(y)], -1),
            critic=nn.Linear(6, 1, bias=False),
            rnn=nn.LSTM(5, 6),
            actor=nn.Linear(6, 4),
        ),
        ImportOptions(head="actor,critic"),
        ("0 to 3 are actor's, 4 is critic's", "rnn, then actor beside critic"),
    ),
    "heads side by side behind a linear layer, in one order": Accepted(
        lambda: Net(
            lambda m, x: torch.cat([m.b(y := m.trunk(m.rnn(x)[0])), m.a(y)], -1).sigmoid(),
            a=nn.Linear(4, 2),
            rnn=nn.LSTM(5, 6),
            trunk=nn.Linear(6, 4),
            b=nn.Linear(4, 1),
        ),
        ImportOptions(order=("rnn", "trunk", "b+a"), activation="sigmoid", between="none"),
        ("0 is b's, 1 to 2 are a's", "trunk folded into b+a"),
    ),
    "an lstm cell": Accepted(
        lambda: Net(
            lambda m, x: m.fc(looped(m.cell, x)), cell=nn.LSTMCell(5, 6), fc=nn.Linear(6, 2)
        ),
        notes=("cell is read as a cell of PyTorch",),
    ),
    "a gru cell without bias": Accepted(
        lambda: Net(lambda m, x: looped(m.cell, x), cell=nn.GRUCell(5, 6, bias=False))
    ),
    "an rnn cell": Accepted(
        lambda: Net(lambda m, x: looped(m.cell, x), cell=nn.RNNCell(5, 6, nonlinearity="relu")),
        ImportOptions(cells={"cell": "rnn-relu"}),
    ),
    "a stack of cells": Accepted(
        lambda: Net(
            lambda m, x: looped(m.cells[1], looped(m.cells[0], x)),
            cells=nn.ModuleList([nn.LSTMCell(5, 6), nn.LSTMCell(6, 6)]),
        ),
        ImportOptions(order=("cells.0", "cells.1")),
    ),
    "a learned initial h": Accepted(
        lambda: Net(
            lambda m, x: m.fc(m.rnn(x, repeated(m.h0, x))[0]),
            {"h0": (1, 1, 6)},
            rnn=nn.GRU(5, 6),
            fc=nn.Linear(6, 2),
        ),
        ImportOptions(initial_state={"h": "h0"}),
    ),
    "learned initial h and c of two projected layers": Accepted(
        lambda: Net(
            lambda m, x: m.rnn(x, (repeated(m.a, x), repeated(m.b[:, None], x)))[0],
            {"a": (2, 1, 3), "b": (2, 7)},
            rnn=nn.LSTM(5, 7, 2, proj_size=3),
        ),
        ImportOptions(initial_state={"h": "a", "c": "b"}),
    ),
    "a learned initial h of two layers, both ways": Accepted(
        lambda: Net(
            lambda m, x: m.rnn(x, repeated(m.start, x))[0],
            {"start": (4, 1, 6)},
            rnn=nn.GRU(5, 6, 2, bidirectional=True),
        ),
        ImportOptions(initial_state={"rnn.h": "start"}),
    ),
    "a learned initial c alone, of a cell": Accepted(
        lambda: Net(
            lambda m, x: looped(
                m.cell, x, (torch.zeros(x.shape[1], 6), m.c0.expand(x.shape[1], -1))
            ),
            {"c0": (6,)},
            cell=nn.LSTMCell(5, 6),
        ),
        ImportOptions(initial_state={"c": "c0"}),
    ),
}


def check_outputs(model: ImportedModel, module: nn.Module, x: Tensor) -> None:
    """Whole, step by step and in chunks."""
    module.eval()
    with torch.no_grad():
        expected = module(x).numpy()
    assert error(rows_of(model, x), expected) < FLOAT32_ERROR_MAX
    network = network_of(model)
    if not network.spec.streamable:
        return
    carry, rows = network.initial_carry(x.shape[1]), []
    for row in x:
        carry, y = network.step(carry, row)
        rows.append(y)
    assert error(torch.stack(rows).numpy(), expected) < FLOAT32_ERROR_MAX
    carry, rows = network.initial_carry(x.shape[1]), []
    for begin, end in CUTS:
        carry, y = network.run(x[begin:end], carry)
        rows.append(y)
    assert error(torch.cat(rows).numpy(), expected) < FLOAT32_ERROR_MAX


@pytest.mark.parametrize("case", ACCEPTED.values(), ids=ACCEPTED.keys())
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_what_is_said_is_what_runs(case: Accepted, tmp_path: Path) -> None:
    module = case.make()
    model = import_state(module.state_dict(), tmp_path, case.options)
    x = torch.randn(STEPS, 2, case.features)
    if case.vocabulary:
        x = torch.randint(case.vocabulary, (STEPS, 2))
    check_outputs(model, module, x)
    for said in case.notes:
        assert any(said in note for note in model.notes), model.notes


@pytest.mark.parametrize("name", [name for name, case in ACCEPTED.items() if case.options.order])
def test_each_of_these_is_asked_for(name: str, tmp_path: Path) -> None:
    """Without the options the same files are questions, and an answer offered is accepted."""
    case = ACCEPTED[name]
    given = ImportOptions(activation=case.options.activation)
    with pytest.raises(AmbiguousModuleError, match="--order") as caught:
        import_state(case.make().state_dict(), tmp_path, given)
    for answer in caught.value.answers:
        said = dict(zip(answer[::2], answer[1::2], strict=True))
        options = ImportOptions(
            order=tuple(said["--order"].split(",")),
            between=said.get("--between"),
            embedding=said.get("--embedding"),
            epsilon={"": float(said["--epsilon"])} if "--epsilon" in said else {},
        )
        import_state(case.make().state_dict(), tmp_path, options)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model.", "a.net."]
)
def test_what_wrappers_put_before_the_names_is_no_obstacle(prefix: str, tmp_path: Path) -> None:
    module = Net(lambda m, x: m.fc(m.rnn(x)[0]), rnn=nn.RNN(5, 8), fc=nn.Linear(8, 5))
    state = {prefix + name: tensor for name, tensor in module.state_dict().items()}
    options = ImportOptions(
        cells={"rnn": "rnn-tanh"}, order=("rnn", "fc"), head="fc", embedding="none"
    )
    check_outputs(import_state(state, tmp_path, options), module, torch.randn(STEPS, 2, 5))


def test_a_compiled_part_keeps_its_name(tmp_path: Path) -> None:
    module = Net(lambda m, x: m.fc1(m.rnn(x)[0]), fc1=nn.Linear(5, 8), rnn=nn.LSTM(8, 5))
    state = {
        name.replace("rnn.", "rnn._orig_mod."): tensor
        for name, tensor in module.state_dict().items()
    }
    model = import_state(state, tmp_path, ImportOptions(order=("rnn", "fc1")))
    check_outputs(model, module, torch.randn(STEPS, 2, 8))


def test_an_epsilon_is_of_the_module_named(tmp_path: Path) -> None:
    module = Net(
        lambda m, x: m.rnn(rows_first(m.norm, x))[0], norm=nn.BatchNorm1d(5, 0.5), rnn=nn.GRU(5, 4)
    )
    state = {f"module.net.{name}": tensor for name, tensor in module.state_dict().items()}
    options = ImportOptions(order=("norm", "rnn"), between="none", epsilon={"norm": 0.5})
    check_outputs(import_state(state, tmp_path, options), module, torch.randn(STEPS, 2, 5))


def test_several_modules_each_have_their_initial_state(tmp_path: Path) -> None:
    module = Net(
        lambda m, x: m.b(m.a(x, repeated(m.h_a, x))[0], repeated(m.h_b, x))[0],
        {"h_a": (1, 1, 6), "h_b": (1, 1, 6)},
        a=nn.GRU(5, 6),
        b=nn.GRU(6, 6),
    )
    state = module.state_dict()
    options = ImportOptions(order=("a", "b"), initial_state={"a.h": "h_a", "b.h": "h_b"})
    check_outputs(import_state(state, tmp_path, options), module, torch.randn(STEPS, 2, 5))
    with pytest.raises(AmbiguousModuleError) as caught:
        import_state(state, tmp_path, ImportOptions(order=("a", "b")))
    assert caught.value.answers == (("--initial-state", "a.h=h_a,b.h=h_b"),)
    with pytest.raises(UnsupportedModuleError, match="say of which module: a, b"):
        import_state(state, tmp_path, ImportOptions(initial_state={"h": "h_a"}))
