"""Files of Keras 3, written by Keras 3, against what Keras answers."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from conveyor_models import BundleError, ImportFileError, UnsupportedModuleError
from conveyor_models.importers import import_model
from tests.unit.models.importing import error, rows_of

KERAS_ERROR_MAX = 5e-6
"""Keras on torch, in float32 and in another order of additions, over 25 steps."""
NAMES = (
    "lstm",
    "lstm_of_one",
    "lstm_17",
    "lstm_without_bias",
    "lstm_hard",
    "gru",
    "gru_before",
    "gru_hard",
    "gru_without_bias",
    "gru_before_without_bias",
    "rnn",
    "rnn_relu",
    "both_lstm",
    "both_gru",
    "both_rnn",
    "words",
    "head",
    "logs",
    "functional",
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("keras")
    script = Path(__file__).with_name("keras_files.py")
    home = folder / "home"  # where Keras would otherwise keep its settings
    done = subprocess.run(
        [sys.executable, str(script), str(folder)],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
        env=os.environ | {"KERAS_HOME": str(home), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    yield folder
    shutil.rmtree(folder)


def answers(folder: Path, name: str) -> tuple[torch.Tensor, Any]:
    """x [T, B, ...] and what Keras made of it, time first."""
    found = np.load(folder / f"{name}.npz")
    y = found["y"]
    return torch.from_numpy(found["x"].swapaxes(0, 1)), y.swapaxes(0, 1) if y.ndim == 3 else y


@pytest.mark.parametrize("suffix", ["keras", "h5"])
@pytest.mark.parametrize("name", NAMES)
def test_a_model_answers_as_in_keras(name: str, suffix: str, files: Path) -> None:
    model = import_model(files / f"{name}.{suffix}")
    x, expected = answers(files, name)
    assert error(rows_of(model, x), expected) < KERAS_ERROR_MAX


def test_both_kinds_of_file_hold_the_same(files: Path) -> None:
    for name in NAMES:
        one, other = (import_model(files / f"{name}.{suffix}") for suffix in ("keras", "h5"))
        assert one.spec("model") == other.spec("model")
        assert all(torch.equal(one.weights[key], other.weights[key]) for key in one.weights)


def test_the_options_are_said_in_the_bundle(files: Path) -> None:
    layer = import_model(files / "lstm_hard.keras").spec("model").layers[0]
    assert layer.options == {"gate_activation": "hard_sigmoid", "hard_sigmoid_slope": str(1 / 6)}
    assert import_model(files / "gru_before.h5").spec("model").layers[0].options["reset"] == (
        "before"
    )
    spec = import_model(files / "words.keras").spec("model")
    assert spec.vocabulary_size == 11
    assert spec.output.activation == "softmax"


@pytest.mark.parametrize("suffix", ["keras", "h5"])
def test_a_model_of_the_last_row_gives_it_last(suffix: str, files: Path) -> None:
    model = import_model(files / f"last.{suffix}")
    x, expected = answers(files, "last")
    assert error(rows_of(model, x)[-1], expected) < KERAS_ERROR_MAX
    assert any("return_sequences=False" in note for note in model.notes)


REFUSED = {
    "masking": "mask: Masking",
    "mask_zero": "table: mask_zero",
    "activation": "odd: activation relu",
    "gate": "odd: recurrent_activation relu",
    "rnn_gate": "odd: activation elu",
    "merge": "odd: merge_mode 'sum'",
    "backwards": "odd: go_backwards",
    "both_last": "odd: Bidirectional with return_sequences=False",
    "convolution": "odd: Conv1D",
    "norm": "odd: LayerNormalization",
    "before": "odd: a Dense before",
    "twice": "odd: a second Dense",
    "head_activation": "odd: activation relu",
    "half": "odd: dtype mixed_float16",
    "branches": r"sum: reads|gru_1: reads",
    "two_outputs": "aside: reads",
    "no_recurrence": "model: holds no LSTM",
}


@pytest.mark.parametrize("suffix", ["keras", "h5"])
@pytest.mark.parametrize(("name", "said"), REFUSED.items(), ids=REFUSED.keys())
def test_what_a_bundle_cannot_express_is_refused_by_name(
    name: str, said: str, suffix: str, files: Path
) -> None:
    with pytest.raises(UnsupportedModuleError, match=said):
        import_model(files / f"refused_{name}.{suffix}")


# --- Files that mean harm, or are broken ---------------------------------------------------------


def changed(
    source: Path,
    target: Path,
    change: Callable[[dict[str, Any]], None] | None = None,
    metadata: dict[str, Any] | None = None,
    weights: bytes | None = None,
) -> Path:
    """A copy of a .keras with another structure or other weights."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name == "config.json" and change is not None:
                config = json.loads(data)
                change(config)
                data = json.dumps(config).encode()
            if name == "metadata.json" and metadata is not None:
                data = json.dumps(metadata).encode()
            if name == "model.weights.h5" and weights is not None:
                data = weights
            new.writestr(name, data)
    return target


def hdf5(write: Callable[[Any], None]) -> bytes:
    """Weights of `lstm`, written otherwise."""
    data = io.BytesIO()
    with h5py.File(data, "w") as file:
        write(file.create_group("layers/lstm/cell/vars"))
        for place, shape in enumerate([(3, 20), (5, 20), (20,)]):
            if str(place) not in file["layers/lstm/cell/vars"]:
                file[f"layers/lstm/cell/vars/{place}"] = np.zeros(shape, np.float32)
    return data.getvalue()


def elsewhere(group: Any) -> None:
    group.create_dataset("0", (3, 20), "f4", external=[("/etc/hostname", 0, 240)])


def virtual(group: Any) -> None:
    layout = h5py.VirtualLayout((3, 20), "f4")
    layout[:] = h5py.VirtualSource("/etc/hostname", "x", (3, 20))
    group.create_virtual_dataset("0", layout)


HARMFUL: dict[str, tuple[Callable[[Any], None], str]] = {
    "another file's bytes": (elsewhere, "is not plain"),
    "another file's dataset": (virtual, "is not plain"),
    "a link to another file": (
        lambda group: group.__setitem__("0", h5py.ExternalLink("/etc/hostname", "/x")),
        "is a link",
    ),
    "a soft link": (lambda group: group.__setitem__("0", h5py.SoftLink("/x")), "is missing|link"),
    "a packed dataset": (
        lambda group: group.create_dataset("0", data=np.zeros((3, 20), "f4"), compression="gzip"),
        "is not plain",
    ),
    "a dataset that unpacks to a terabyte": (
        lambda group: group.create_dataset("0", (2**20, 2**18), "f4", chunks=(1024, 1024)),
        "is not plain",
    ),
    "a dataset that was never written": (
        lambda group: group.create_dataset("0", (3, 20), "f4"),
        "holds fewer bytes",
    ),
    "another shape": (
        lambda group: group.create_dataset("0", data=np.zeros((4, 20), "f4")),
        r"shape \[4, 20\], expected \[3, 20\]",
    ),
    "whole numbers": (
        lambda group: group.create_dataset("0", data=np.zeros((3, 20), "i4")),
        "expected floats",
    ),
    "a group": (lambda group: group.create_group("0"), "is not a dataset"),
    "one too many": (
        lambda group: group.create_dataset("3", data=np.zeros(2, "f4")),
        "no layer of the structure",
    ),
}


@pytest.mark.parametrize(("write", "said"), HARMFUL.values(), ids=HARMFUL.keys())
def test_weights_that_are_not_plain_are_refused(
    write: Callable[[Any], None], said: str, files: Path, tmp_path: Path
) -> None:
    file = changed(files / "lstm.keras", tmp_path / "m.keras", weights=hdf5(write))
    with pytest.raises(UnsupportedModuleError, match=said):
        import_model(file)
    sound = changed(files / "lstm.keras", tmp_path / "s.keras", weights=hdf5(lambda group: None))
    assert not import_model(sound).weights["layers.0.bias"].any()


def test_code_and_unknown_classes_in_the_structure_are_refused(files: Path, tmp_path: Path) -> None:
    def foreign(config: dict[str, Any]) -> None:
        config["config"]["layers"][1]["registered_name"] = "mine>LSTM"

    def module(config: dict[str, Any]) -> None:
        config["config"]["layers"][1]["module"] = "os"

    def lambda_(config: dict[str, Any]) -> None:
        config["config"]["layers"][1]["class_name"] = "Lambda"

    for change, said in (
        (foreign, "somebody else"),
        (module, "somebody else"),
        (lambda_, "Lambda"),
    ):
        with pytest.raises(UnsupportedModuleError, match=f"lstm: .*{said}"):
            import_model(changed(files / "lstm.keras", tmp_path / "m.keras", change))


def test_zip_bombs_and_names_that_point_outside_are_refused(files: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.keras"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("metadata.json", '{"keras_version": "3.9"}')
        archive.writestr("config.json", bytes(17 * 1024 * 1024))
    with pytest.raises(ImportFileError, match=r"config\.json: 17825792 bytes, expected at most"):
        import_model(file)
    for name in ("../config.json", "/config.json", "a/../../b", "..\\x"):
        shutil.copy(files / "lstm.keras", file)
        with zipfile.ZipFile(file, "a") as archive:
            archive.writestr(name, "{}")
        with pytest.raises(ImportFileError, match="points outside"):
            import_model(file)
    with zipfile.ZipFile(file, "w") as archive:
        for number in range(100):
            archive.writestr(f"assets/{number}", b"")
    with pytest.raises(ImportFileError, match="100 entries"):
        import_model(file)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["model.keras"]


def test_a_size_that_lies_is_refused(files: Path, tmp_path: Path) -> None:
    whole = (files / "lstm.keras").read_bytes()
    file = tmp_path / "model.keras"
    at = whole.rindex(b"PK\x01\x02")
    file.write_bytes(whole[: at + 24] + b"\xff\xff\xff\x7f" + whole[at + 28 :])
    with pytest.raises(ImportFileError):
        import_model(file)


@pytest.mark.parametrize("suffix", ["keras", "h5"])
def test_a_truncated_file_is_refused(suffix: str, files: Path, tmp_path: Path) -> None:
    whole = (files / f"lstm.{suffix}").read_bytes()
    file = tmp_path / f"model.{suffix}"
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 100):
        file.write_bytes(whole[:length])
        with pytest.raises(BundleError):
            import_model(file)


def test_other_versions_and_weights_alone_are_refused(files: Path, tmp_path: Path) -> None:
    old = changed(files / "lstm.keras", tmp_path / "m.keras", metadata={"keras_version": "2.15.0"})
    with pytest.raises(ImportFileError, match=r"written by Keras 2\.15\.0"):
        import_model(old)
    with pytest.raises(ImportFileError, match=r"written by Keras None|holds no whole model"):
        import_model(files / "only.weights.h5")


def test_without_the_extra_the_message_says_what_to_install(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(BundleError, match=r"h5py is not installed: .*pip install .*\[importers\]"):
        import_model(files / "lstm.keras")
