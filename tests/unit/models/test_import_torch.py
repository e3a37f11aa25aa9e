"""State dicts of PyTorch, written by PyTorch, against the modules they are of."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from conveyor_models import BundleError, BundleFileError, ImportFileError, UnsupportedModuleError
from conveyor_models.importers import ImportOptions, import_model, weights_from_torch
from tests.unit.models.importing import (
    FLOAT32_ERROR_MAX,
    error,
    fill,
    import_state,
    network_of,
    rows_of,
)

MODULES: dict[str, tuple[Callable[[], Any], dict[str, str]]] = {
    "lstm": (lambda: nn.LSTM(3, 5), {}),
    "lstm without bias": (lambda: nn.LSTM(3, 17, bias=False), {}),
    "lstm of one": (lambda: nn.LSTM(1, 1), {}),
    "lstm of three layers": (lambda: nn.LSTM(3, 7, 3), {}),
    "lstm projected": (lambda: nn.LSTM(3, 9, 2, proj_size=4), {}),
    "lstm bidirectional": (lambda: nn.LSTM(3, 5, 2, bidirectional=True), {}),
    "lstm projected both ways": (
        lambda: nn.LSTM(3, 9, 2, proj_size=4, bidirectional=True),
        {},
    ),
    "gru": (lambda: nn.GRU(3, 5), {}),
    "gru without bias": (lambda: nn.GRU(17, 3, bias=False), {}),
    "gru bidirectional": (lambda: nn.GRU(3, 5, 2, bidirectional=True), {}),
    "rnn": (lambda: nn.RNN(3, 5, 2), {"": "rnn-tanh"}),
    "rnn relu": (lambda: nn.RNN(3, 5, nonlinearity="relu"), {"": "rnn-relu"}),
    "rnn bidirectional": (lambda: nn.RNN(3, 5, bidirectional=True), {"": "rnn-tanh"}),
}


class Tagger(nn.Module):
    def __init__(self, head_bias: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 4)
        self.encoder = nn.GRU(4, 6)
        self.rnn = nn.LSTM(6, 5, bidirectional=True)
        self.fc = nn.Linear(10, 7, bias=head_bias)

    def forward(self, tokens: Tensor) -> Tensor:
        y, _ = self.encoder(self.embedding(tokens))
        y, _ = self.rnn(y)
        return self.fc(y).log_softmax(-1)


@pytest.mark.parametrize(("make", "cells"), MODULES.values(), ids=MODULES.keys())
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_a_module_comes_out_as_it_went_in(
    make: Callable[[], Any], cells: dict[str, str], suffix: str, tmp_path: Path
) -> None:
    module = make()
    fill(module)
    file = tmp_path / f"state{suffix}"
    if suffix == ".safetensors":
        safetensors.torch.save_file(module.state_dict(), file)
    else:
        torch.save(module.state_dict(), file)
    model = import_model(file, ImportOptions(cells=cells))
    x = torch.randn(40, 2, module.input_size)
    with torch.no_grad():
        expected, _ = module(x)
    assert error(rows_of(model, x), expected.numpy()) < FLOAT32_ERROR_MAX
    for name, tensor in weights_from_torch(module).items():
        assert torch.equal(model.weights[name], tensor)


@pytest.mark.parametrize(
    "cell",
    [nn.LSTMCell(3, 5), nn.GRUCell(3, 5), nn.RNNCell(3, 5), nn.RNNCell(3, 5, nonlinearity="relu")],
)
def test_the_weights_of_a_cell_are_those_of_its_module(cell: Any) -> None:
    kind: Any = {nn.LSTMCell: nn.LSTM, nn.GRUCell: nn.GRU, nn.RNNCell: nn.RNN}[type(cell)]
    module = kind(3, 5)
    module.load_state_dict({f"{name}_l0": each for name, each in cell.state_dict().items()})
    expected = weights_from_torch(module)
    found = weights_from_torch(cell)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("head_bias", [True, False])
def test_embedding_stack_and_head_are_found(head_bias: bool, tmp_path: Path) -> None:
    module = Tagger(head_bias)
    fill(module)
    options = ImportOptions(order=("encoder", "rnn"), activation="log_softmax")
    model = import_state(module.state_dict(), tmp_path, options)
    tokens = torch.randint(11, (20, 3))
    with torch.no_grad():
        expected = module(tokens)
    assert error(rows_of(model, tokens), expected.numpy()) < FLOAT32_ERROR_MAX
    assert [layer.name for layer in model.layers] == ["encoder.l0", "rnn.l0"]
    assert model.spec("tagger").head is not None


def test_the_carry_is_pytorchs(tmp_path: Path) -> None:
    module = nn.GRU(3, 6, 2)
    fill(module)
    network = network_of(import_state(module.state_dict(), tmp_path))
    x = torch.randn(15, 2, 3)
    with torch.no_grad():
        _, h = module(x)
    carry, _ = network.run(x)
    for part, expected in zip(carry, h, strict=True):
        torch.testing.assert_close(part.h, expected, rtol=1e-5, atol=1e-6)


def test_half_precision_is_taken_and_double_only_where_it_is_exact(tmp_path: Path) -> None:
    module = nn.LSTM(2, 3).half()
    model = import_state(module.state_dict(), tmp_path)
    assert torch.equal(
        model.weights["layers.0.weight_input"], module.state_dict()["weight_ih_l0"].float()
    )
    single = nn.LSTM(2, 3)
    import_state(single.double().state_dict(), tmp_path)
    with pytest.raises(UnsupportedModuleError, match=r"weight_ih_l0: holds 64-bit floats"):
        import_state(nn.LSTM(2, 3, dtype=torch.float64).state_dict(), tmp_path)


def state(**modules: nn.Module) -> dict[str, Tensor]:
    return nn.ModuleDict(modules).state_dict()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "nothing recurrent": (state(fc=nn.Linear(3, 4)), "holds no nn.LSTM"),
    "a plain rnn without a flag": (state(rnn=nn.RNN(3, 4)), r"rnn\.l0: .*--cell rnn-tanh"),
    "a normalisation": (state(norm=nn.LayerNorm(4), rnn=nn.LSTM(3, 4)), r"norm\.(weight|bias)"),
    "a buffer": (
        nn.LSTM(3, 4).state_dict() | {"num_batches_tracked": torch.tensor(3)},
        "num_batches_tracked: holds 64-bit integers",
    ),
    "half a layer": (
        {k: v for k, v in nn.LSTM(3, 4).state_dict().items() if k != "weight_hh_l0"},
        "weight_hh is missing",
    ),
    "one bias": (
        {k: v for k, v in nn.LSTM(3, 4).state_dict().items() if k != "bias_hh_l0"},
        "one of the two biases",
    ),
    "a layer left out": (
        {k: v for k, v in nn.LSTM(3, 4, 3).state_dict().items() if "l1" not in k},
        "one is missing",
    ),
    "one way of a layer left out": (
        {
            k: v
            for k, v in nn.LSTM(3, 4, 2, bidirectional=True).state_dict().items()
            if not k.endswith("l1_reverse")
        },
        r"l1: one of its two directions",
    ),
    "a bias of another shape": (
        nn.LSTM(3, 4).state_dict() | {"bias_ih_l0": torch.zeros(3)},
        r"bias_ih: shape \[3\]",
    ),
    "a transposed matrix": (
        nn.LSTM(3, 4).state_dict() | {"weight_ih_l0": torch.zeros(3, 16)},
        "weight_ih: 3 rows, expected 16",
    ),
    "an unknown number of gates": (
        nn.LSTM(3, 4).state_dict() | {"weight_hh_l0": torch.zeros(20, 4)},
        "weight_hh: 20 rows of 4",
    ),
    "whole numbers": (
        nn.LSTM(3, 4).state_dict() | {"weight_ih_l0": torch.zeros(16, 3, dtype=torch.int64)},
        "weight_ih_l0: holds 64-bit integers",
    ),
    "a weight that is not a number": (
        nn.LSTM(3, 4).state_dict() | {"bias_hh_l0": torch.full((16,), torch.nan)},
        "^bias_hh_l0: has a NaN",
    ),
    "an infinite weight in double precision": (
        nn.LSTM(3, 4).state_dict() | {"bias_hh_l0": torch.full((16,), torch.inf).double()},
        "^bias_hh_l0: has a NaN or an infinity",
    ),
    "a sparse tensor": (
        nn.LSTM(3, 4).state_dict() | {"weight_ih_l0": torch.eye(16, 3).to_sparse()},
        "weight_ih_l0: holds a sparse tensor",
    ),
    "something beside its tensors": (
        nn.LSTM(3, 4).state_dict() | {"epoch": 3},
        "epoch: is int, not a tensor; save module.state_dict",
    ),
    "a tensor beside the state dict of a checkpoint": (
        {"model": nn.LSTM(3, 4).state_dict(), "mean": torch.ones(3)},
        r"mean: a tensor beside the state dict 'model' .*torch\.load\('state.pt'\)\['model'\]",
    ),
}


@pytest.mark.parametrize(("given", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_what_has_no_place_is_refused_by_name(
    given: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModuleError, match=said):
        import_state(given, tmp_path).spec("model")


def test_options_decide_what_shapes_leave_open(tmp_path: Path) -> None:
    modules = state(
        a=nn.RNN(4, 4), b=nn.LSTM(4, 4), pre=nn.Linear(4, 9, bias=False), z=nn.Linear(4, 4)
    )
    options = ImportOptions(
        cells={"a": "rnn-relu"}, order=("b", "a"), embedding="pre", head="z", activation="sigmoid"
    )
    spec = import_state(modules, tmp_path, options).spec("model")
    assert [layer.cell for layer in spec.layers] == ["lstm", "rnn"]
    assert spec.layers[1].options == {"nonlinearity": "relu"}
    assert spec.vocabulary_size == 9
    assert spec.output.activation == "sigmoid"
    for wrong, said in [
        (
            ImportOptions(order=("b",), cells={"a": "rnn-relu"}),
            "b: --order has to name a as well",
        ),
        (ImportOptions(order=("b", "a"), cells={"c": "lstm"}), "c: --cell names it"),
        (
            ImportOptions(order=("b", "a"), cells={"": "gru", "a": "rnn-tanh"}),
            "of lstm, not of gru",
        ),
        (ImportOptions(order=("b", "a"), cells={"a": "rnn-tanh"}, head="y"), "y: --head names it"),
    ]:
        with pytest.raises(UnsupportedModuleError, match=said):
            import_state(modules, tmp_path, wrong)


# --- Files that mean harm, or are broken ---------------------------------------------------------


class Canary:
    """Unpickling it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def test_a_malicious_pickle_is_refused_and_does_nothing(tmp_path: Path) -> None:
    canary, file = tmp_path / "canary", tmp_path / "model.pt"
    torch.save({"weight_ih_l0": Canary(canary)}, file)
    with pytest.raises(ImportFileError, match="never run"):
        import_model(file)
    file.write_bytes(pickle.dumps(Canary(canary)))
    with pytest.raises(ImportFileError, match="other pickles are never loaded"):
        import_model(file)
    torch.save(nn.LSTM(2, 3), file)
    with pytest.raises(ImportFileError, match="never run"):
        import_model(file)
    assert not canary.exists()
    # And the canary does sing where a pickle is loaded.
    pickle.loads(pickle.dumps(Canary(canary)))
    assert canary.exists()


def test_a_header_bomb_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    with pytest.raises(ImportFileError, match="header of 4611686018427387904 bytes"):
        import_model(file)
    file.write_bytes(struct.pack("<Q", 200) + b"[" * 200)
    with pytest.raises(ImportFileError, match=r"not valid JSON|announces"):
        import_model(file)
    huge = b'{"weight_hh_l0":{"dtype":"F32","shape":[1048576,1048576],"data_offsets":[0,4]}}'
    file.write_bytes(struct.pack("<Q", len(huge)) + huge + bytes(4))
    with pytest.raises(ImportFileError, match="numbers in its tensors"):
        import_model(file)


def test_a_view_that_claims_to_be_huge_is_refused(tmp_path: Path) -> None:
    given = {"weight_hh_l0": torch.zeros(1).expand(2**20, 2**20)}
    with pytest.raises(ImportFileError, match="values"):
        import_state(given, tmp_path)


def test_a_zip_bomb_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model/data.pkl", bytes(1_000_000))
    with pytest.raises(ImportFileError, match="compressed"):
        import_model(file)
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("model/data.pkl", b"x")
    # The central directory says 4 GiB - 2 of a file of one byte, twice over the limit with zip64.
    whole = data.getvalue()
    at = whole.index(b"PK\x01\x02")
    file.write_bytes(whole[: at + 20] + struct.pack("<II", 2**32 - 2, 2**32 - 2) + whole[at + 28 :])
    with pytest.raises(ImportFileError, match=r"data\.pkl: 4294967294 bytes"):
        import_model(file)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_truncated_file_is_refused(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"model{suffix}"
    if suffix == ".pt":
        torch.save(nn.LSTM(3, 5).state_dict(), file)
    else:
        safetensors.torch.save_file(nn.LSTM(3, 5).state_dict(), file)
    whole = file.read_bytes()
    for length in (0, 1, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(ImportFileError):
            import_model(file)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleFileError, match="missing"):
        import_model(tmp_path / "absent.pt")
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(BundleFileError, match="is a folder, expected a file"):
        import_model(tmp_path / "folder.pt")
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(BundleFileError, match="not a regular file"):
        import_model(tmp_path / "pipe.pt")
    (tmp_path / "model.weights").write_bytes(b"x")
    with pytest.raises(ImportFileError, match=r"ends in \.weights"):
        import_model(tmp_path / "model.weights")
    assert issubclass(ImportFileError, BundleError)
