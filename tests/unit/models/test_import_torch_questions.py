"""State dicts that can be understood in several ways, or have no place in a bundle."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm

from conveyor_models import AmbiguousModuleError, UnsupportedModuleError
from conveyor_models.importers import ImportOptions
from conveyor_models.importers.torch_order import MODULES_TRIED_MAX
from tests.unit.models.importing import import_state


def state(**modules: nn.Module) -> dict[str, Tensor]:
    return nn.ModuleDict(modules).state_dict()


TWO_RNNS = state(encoder=nn.LSTM(4, 4), decoder=nn.LSTM(4, 4), fc=nn.Linear(4, 2))
CHAINED = state(first=nn.LSTM(4, 6), second=nn.LSTM(6, 5))
QUESTIONS: dict[str, tuple[dict[str, Tensor], ImportOptions, tuple[str, ...]]] = {
    "a linear layer that fits before and after": (
        state(fc1=nn.Linear(5, 8), lstm=nn.LSTM(8, 5)),
        ImportOptions(),
        ("--order lstm,fc1", "--order fc1,lstm --between none"),
    ),
    "encoder and decoder": (
        TWO_RNNS,
        ImportOptions(),
        ("--order encoder,decoder,fc", "--order decoder,encoder,fc"),
    ),
    "two recurrent modules in the only order that fits": (
        CHAINED,
        ImportOptions(),
        ("--order first,second",),
    ),
    "a list of recurrent modules": (
        {
            f"layers.{name}": each
            for name, each in nn.ModuleList([nn.GRU(3, 3)] * 2).state_dict().items()
        },
        ImportOptions(),
        ("--order layers.0,layers.1", "--order layers.1,layers.0"),
    ),
    "linear layers behind each other": (
        state(gru=nn.GRU(6, 9), head=nn.Sequential(nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 3))),
        ImportOptions(),
        ("--order gru,head.0,head.2 --between none",),
    ),
    "the same with the order alone": (
        state(gru=nn.GRU(6, 9), head=nn.Sequential(nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 3))),
        ImportOptions(order=("gru", "head.0", "head.2")),
        ("--order gru,head.0,head.2 --between none",),
    ),
    "a layer before the stack": (
        state(encoder=nn.Linear(6, 8), lstm=nn.LSTM(8, 7)),
        ImportOptions(),
        ("--order encoder,lstm --between none",),
    ),
    "heads side by side": (
        state(lstm=nn.LSTM(6, 8), actor=nn.Linear(8, 4), critic=nn.Linear(8, 1)),
        ImportOptions(),
        ("--order lstm,actor+critic",),
    ),
    "a head that may stand behind another": (
        state(lstm=nn.LSTM(6, 8), a=nn.Linear(8, 8), b=nn.Linear(8, 1)),
        ImportOptions(),
        ("--order lstm,a+b", "--order lstm,a,b --between none"),
    ),
    "an embedding or a head": (
        state(table=nn.Linear(4, 9, bias=False), rnn=nn.LSTM(4, 4)),
        ImportOptions(),
        ("--order rnn,table", "--order table,rnn"),
    ),
    "an embedding or a layer before the stack": (
        state(pre=nn.Linear(3, 3, bias=False), rnn=nn.LSTM(3, 4)),
        ImportOptions(),
        (
            "--order pre,rnn --embedding none --between none",
            "--order pre,rnn --embedding pre",
        ),
    ),
    "an embedding or a layer that leads past the stack": (
        state(skip=nn.Linear(5, 3, bias=False), rnn=nn.LSTM(5, 4), fc=nn.Linear(4, 3)),
        ImportOptions(),
        ("--order skip,rnn,fc",),
    ),
    "an embedding as wide as the stack": (
        state(emb=nn.Embedding(9, 4), rnn=nn.LSTM(4, 4), out=nn.Linear(4, 9)),
        ImportOptions(),
        ("--order rnn,emb+out", "--order emb,rnn,out"),
    ),
    "batch normalisation": (
        state(rnn=nn.GRU(5, 6), bn=nn.BatchNorm1d(6), fc=nn.Linear(6, 3)),
        ImportOptions(order=("rnn", "bn", "fc"), between="none"),
        ("--order rnn,bn,fc --between none --epsilon 1e-05",),
    ),
    "one more batch normalisation": (
        state(rnn=nn.GRU(5, 6), a=nn.Sequential(nn.BatchNorm1d(6)), b=nn.BatchNorm1d(6)),
        ImportOptions(order=("rnn", "a.0", "b"), between="none", epsilon={"0": 0.001}),
        ("--order rnn,a.0,b --between none --epsilon 1e-05 --epsilon 0=0.001",),
    ),
    "one more initial state": (
        state(a=nn.GRU(5, 6), b=nn.GRU(6, 6)) | {"p": torch.ones(6), "q": torch.ones(6)},
        ImportOptions(initial_state={"a.h": "p"}),
        ("--initial-state a.h=p,b.h=q",),
    ),
    "an initial state": (
        state(rnn=nn.GRU(5, 6)) | {"start": torch.ones(1, 1, 6)},
        ImportOptions(),
        ("--initial-state h=start",),
    ),
    "initial states": (
        state(rnn=nn.LSTM(5, 6)) | {"init_c": torch.ones(6), "init_h": torch.ones(6)},
        ImportOptions(),
        ("--initial-state h=init_h,c=init_c",),
    ),
}


@pytest.mark.parametrize(("given", "options", "ways"), QUESTIONS.values(), ids=QUESTIONS.keys())
def test_what_a_state_dict_leaves_open_is_asked(
    given: dict[str, Tensor], options: ImportOptions, ways: tuple[str, ...], tmp_path: Path
) -> None:
    with pytest.raises(AmbiguousModuleError) as caught:
        import_state(given, tmp_path, options)
    answers = {" ".join(answer) for answer in caught.value.answers}
    assert answers >= set(ways)
    assert all(way in str(caught.value) for way in ways)


def test_a_number_left_out_shows_that_something_stands_there(tmp_path: Path) -> None:
    layers = nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 3), nn.Linear(3, 2)
    given = state(gru=nn.GRU(6, 9), head=nn.Sequential(*layers))
    with pytest.raises(AmbiguousModuleError) as caught:
        import_state(given, tmp_path)
    assert "The numbers of head.0 and head.2 show that there is a module" in str(caught.value)
    assert "head.2 and head.3 show" not in str(caught.value)


def test_many_modules_have_to_be_put_in_order(tmp_path: Path) -> None:
    given = state(rnn=nn.GRU(4, 4), **{f"l{n}": nn.Linear(4, 4) for n in range(MODULES_TRIED_MAX)})
    with pytest.raises(
        AmbiguousModuleError, match="say their order, from the input to the output, with --order"
    ):
        import_state(given, tmp_path)
    order = ("rnn", *(f"l{n}" for n in range(MODULES_TRIED_MAX)))
    import_state(given, tmp_path, ImportOptions(order=order, between="none"))


PLAIN = state(lstm=nn.LSTM(6, 8), fc=nn.Linear(8, 4))
REFUSED: dict[str, tuple[dict[str, Tensor], ImportOptions, str]] = {
    "a function between the modules": (
        PLAIN,
        ImportOptions(order=("lstm", "fc"), between="relu"),
        "--between relu: a bundle has no place for a function",
    ),
    "a function in the order": (
        PLAIN,
        ImportOptions(order=("lstm", "ReLU", "fc")),
        "--order: ReLU: a bundle has no place for a function",
    ),
    "another in the order": (
        PLAIN,
        ImportOptions(order=("lstm", "leaky_relu", "fc")),
        "--order: leaky_relu: a bundle has no place",
    ),
    "dropout in the order": (
        PLAIN,
        ImportOptions(order=("lstm", "dropout", "fc")),
        "--order: dropout: does nothing after training",
    ),
    "a module that is not there": (
        PLAIN,
        ImportOptions(order=("lstm", "gc")),
        "gc: --order names it; there is fc, lstm",
    ),
    "a module twice": (
        PLAIN,
        ImportOptions(order=("lstm", "fc", "fc")),
        "fc: --order names it twice",
    ),
    "an order that leaves one out": (
        state(a=nn.GRU(5, 6), b=nn.GRU(6, 6), fc=nn.Linear(6, 1)),
        ImportOptions(order=("a", "fc")),
        "--order has to name b as well",
    ),
    "an order that does not fit": (
        PLAIN,
        ImportOptions(order=("fc", "lstm")),
        "fc: does not fit the others: fc reads 8 and gives 4, lstm reads 6 and gives 8",
    ),
    "two heads in the middle": (
        state(a=nn.Linear(5, 5), b=nn.Linear(5, 5), rnn=nn.GRU(5, 5)),
        ImportOptions(order=("a+b", "rnn")),
        "can only come last",
    ),
    "a head that the order does not end with": (
        PLAIN | state(b=nn.Linear(8, 2)),
        ImportOptions(order=("lstm", "fc+b"), head="b,fc"),
        "--head b,fc: is not what --order ends with",
    ),
    "a head that does not fit": (
        PLAIN | state(b=nn.Linear(7, 2)),
        ImportOptions(head="fc,b"),
        "b: does not fit the others: b reads 7 and gives 2, lstm reads 6",
    ),
    "softmax over several heads": (
        PLAIN | state(b=nn.Linear(8, 2)),
        ImportOptions(head="fc,b", activation="softmax"),
        "--activation softmax: would run over the outputs of fc, b together",
    ),
    "an embedding with a bias": (
        PLAIN,
        ImportOptions(embedding="fc"),
        "fc: --embedding names it; it has a bias",
    ),
    "one name for embedding and head": (
        state(t=nn.Embedding(9, 4), rnn=nn.LSTM(4, 4)),
        ImportOptions(embedding="t", head="t"),
        "t: --embedding and --head both name it",
    ),
    "an epsilon of nothing": (PLAIN, ImportOptions(epsilon={"bn": 1.0}), "bn: --epsilon names it"),
    "a name that fits two": (
        {f"{side}.{name}": each for side in "ab" for name, each in PLAIN.items()},
        ImportOptions(order=("a.lstm", "lstm")),
        "lstm: --order names it; these are several a.lstm, b.lstm",
    ),
    "an initial state of another shape": (
        state(rnn=nn.GRU(5, 6, 2)) | {"h0": torch.ones(1, 1, 6)},
        ImportOptions(initial_state={"h": "h0"}),
        r"h0: shape \[1, 1, 6\] as the initial h of rnn, expected \[2, 1, 6\]",
    ),
    "initial states for a batch": (
        state(rnn=nn.GRU(5, 6)) | {"h0": torch.ones(1, 3, 6)},
        ImportOptions(initial_state={"h": "h0"}),
        r"expected \[1, 1, 6\]",
    ),
    "an initial c of a gru": (
        state(rnn=nn.GRU(5, 6)) | {"c0": torch.ones(1, 1, 6)},
        ImportOptions(initial_state={"c": "c0"}),
        "rnn: a gru has no c",
    ),
    "an initial state that is not there": (
        PLAIN,
        ImportOptions(initial_state={"h": "h0"}),
        "h0: --initial-state h=h0 names it",
    ),
    "a layer normalisation": (
        state(rnn=nn.GRU(5, 6), norm=nn.LayerNorm(6)),
        ImportOptions(),
        r"norm\.weight: .*nn.LayerNorm.* a bundle has no place .*torch.onnx.export",
    ),
    "an initial state given twice": (
        state(rnn=nn.GRU(5, 6)) | {"h0": torch.ones(6), "h1": torch.ones(6)},
        ImportOptions(initial_state={"h": "h0", "rnn.h": "h1"}),
        "the initial h of rnn is given twice",
    ),
    "a name that a terminal would obey": (
        PLAIN | {"\x1b[2J.weight": torch.ones(3, 3)},
        ImportOptions(),
        r"'\\x1b\[2J.weight': a name of 11 characters, expected printable ones",
    ),
    "a name without end": (
        PLAIN | {"a" * 501: torch.ones(3, 3)},
        ImportOptions(),
        "a name of 501 characters, .*at most 500",
    ),
    "a convolution": (
        state(rnn=nn.GRU(5, 6), conv=nn.Conv1d(5, 5, 3)),
        ImportOptions(),
        r"conv\.weight: .*conv is a convolution",
    ),
    "a tied weight left out": (
        {name: each for name, each in PLAIN.items() if name != "fc.weight"},
        ImportOptions(),
        r"fc\.bias: a bias without its weight",
    ),
    "a batch normalisation without variance": (
        {
            name: each
            for name, each in state(rnn=nn.GRU(5, 6), bn=nn.BatchNorm1d(6)).items()
            if name != "bn.running_var"
        },
        ImportOptions(),
        "bn.running_mean: has no running_var",
    ),
    "a parameter of its own": (
        PLAIN | {"query": torch.ones(3, 3)},
        ImportOptions(),
        r"query: shape \[3, 3\], has no place",
    ),
    "a cell beside a module": (
        nn.GRU(5, 6).state_dict() | nn.GRUCell(5, 6).state_dict(),
        ImportOptions(),
        "weight_ih: is of a cell, beside",
    ),
}


@pytest.mark.parametrize(("given", "options", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_is_refused_by_name(
    given: dict[str, Tensor], options: ImportOptions, said: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModuleError, match=said):
        import_state(given, tmp_path, options)


def rewritten() -> dict[str, tuple[dict[str, Tensor], str]]:
    """Networks whose weights are computed from other tensors before each use."""
    from torch.nn.utils import parametrize

    found: dict[str, tuple[dict[str, Tensor], str]] = {}
    undo = r"parametrize\.remove_parametrizations\(model\.rnn, 'weight_hh_l0'\)"
    for name in ("weight_norm", "spectral_norm", "orthogonal"):
        module = nn.ModuleDict({"rnn": nn.LSTM(4, 4)})
        getattr(parametrizations, name)(module["rnn"], "weight_hh_l0")
        found[name] = module.state_dict(), undo
    assert parametrize.is_parametrized(module["rnn"])
    plain = nn.ModuleDict({"rnn": nn.LSTM(4, 4), "fc": nn.Linear(4, 4)}).state_dict()
    old = {name: each for name, each in plain.items() if name != "rnn.weight_hh_l0"}
    old["rnn.weight_hh_l0_g"] = torch.ones(16, 1)  # as the deprecated function names them
    old["rnn.weight_hh_l0_v"] = plain["rnn.weight_hh_l0"]
    found["old weight norm"] = old, r"remove_weight_norm\(model\.rnn, 'weight_hh_l0'\)"
    module = nn.ModuleDict({"rnn": nn.LSTM(4, 4), "fc": spectral_norm(nn.Linear(4, 4))})
    found["old spectral norm"] = (
        module.state_dict(),
        r"remove_spectral_norm\(model\.fc, 'weight'\)",
    )
    module = nn.ModuleDict({"rnn": nn.LSTM(4, 4), "fc": nn.Linear(4, 4)})
    prune.l1_unstructured(module["fc"], "weight", 0.5)
    found["pruning"] = module.state_dict(), r"prune\.remove\(model\.fc, 'weight'\)"
    found["weight drop"] = (
        plain | {"rnn.weight_hh_l0_raw": plain["rnn.weight_hh_l0"]},
        "weight drop",
    )
    return found


REWRITTEN = rewritten()


@pytest.mark.parametrize(("given", "said"), REWRITTEN.values(), ids=REWRITTEN.keys())
def test_weights_that_are_computed_from_others_are_refused(
    given: dict[str, Tensor], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModuleError, match=said):
        import_state(given, tmp_path)


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    given = PLAIN | {"fc.weight": PLAIN["fc.weight"].to(torch.int8)}
    said = r"fc\.weight: .*quantised; save the state dict before"
    with pytest.raises(UnsupportedModuleError, match=said):
        import_state(given, tmp_path)
