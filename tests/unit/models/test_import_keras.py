"""Files of Keras 3, and in the formats of Keras 2, against what Keras 3 answers."""

from __future__ import annotations

import fcntl
import io
import json
import os
import shutil
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from conveyor_models import BundleError, ImportFileError, UnsupportedModuleError
from conveyor_models.importers import import_model
from tests.unit.models.importing import error, network_of, rows_of

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
    "stateful",
    "dense_before",
    "dense_between",
    "normalized",
    "norm_on_top",
    "words_dense",
    "heads",
    "heads_sigmoid",
    "heads_joined",
    "flips",
    "flips_sliced",
    "backwards_twice",
    "two_directions",
    "states",
)
OLD = ("plain", "hard", "words", "normalized", "functional", "heads", "cudnn")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files, written once: Keras takes its time, and processes of one run share them."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder = base / "keras_files"
    with (base / "keras_files.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "complete").exists():
            folder.mkdir(exist_ok=True)
            write_files(folder)
            (folder / "complete").touch()
    return folder


def write_files(folder: Path) -> None:
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
    network = network_of(model)
    if not network.spec.streamable:
        return
    carry = network.initial_carry(x.shape[1])
    rows: list[torch.Tensor] = []
    for chunk in x.split([1, 1, 7, 1, 15]):
        carry, out = network.run(chunk, carry)
        rows.append(out)
    assert error(torch.cat(rows).numpy(), expected) < KERAS_ERROR_MAX


@pytest.mark.parametrize("suffix", ["keras", "h5"])
@pytest.mark.parametrize("name", OLD)
def test_a_model_of_keras_2_answers_as_its_equal_in_keras_3(
    name: str, suffix: str, files: Path
) -> None:
    model = import_model(files / f"old_{name}.{suffix}")
    x, expected = answers(files, f"old_{name}")
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
    assert "lstm gives the last step's row; the bundle gives every step's" in model.notes


@pytest.mark.parametrize("suffix", ["keras", "h5"])
@pytest.mark.parametrize(
    ("name", "at", "said"),
    [
        ("slice_last", -1, "get_item gives the last step's row"),
        ("slice_first", 0, "get_item gives the first step's row"),
        ("last_backwards", 0, "gru gives the first step's row"),
    ],
)
def test_the_note_says_which_row_is_what_keras_gives(
    name: str, at: int, said: str, suffix: str, files: Path
) -> None:
    model = import_model(files / f"{name}.{suffix}")
    x, expected = answers(files, name)
    assert error(rows_of(model, x)[at], expected) < KERAS_ERROR_MAX
    assert any(note.startswith(said) for note in model.notes)


def test_notes_say_what_was_folded_and_which_numbers_are_which(files: Path) -> None:
    notes = import_model(files / "heads.keras").notes
    assert (
        "3 outputs side by side in one row, in this order: value has 1, mean has 2, lstm has 5"
        in notes
    )
    assert any(note.startswith("dense_1, value folded into the head: ") for note in notes)
    notes = import_model(files / "dense_between.keras").notes
    assert any(note.startswith("dense folded into bidirectional: ") for note in notes)
    assert any(
        note.startswith("time_distributed_1, dense_2 folded into the head") for note in notes
    )
    spec = import_model(files / "flips.keras").spec("model")
    assert [layer.direction for layer in spec.layers] == [
        "reverse",
        "reverse",
        "forward",
        "reverse",
    ]
    spec = import_model(files / "two_directions.keras").spec("model")
    assert [layer.direction for layer in spec.layers] == ["bidirectional"]


def test_the_hard_sigmoid_of_keras_2_is_another_one(files: Path) -> None:
    for suffix in ("keras", "h5"):
        layer = import_model(files / f"old_hard.{suffix}").spec("model").layers[1]
        # The slope is that which a bundle has if it says nothing, 0.2.
        assert layer.options == {"gate_activation": "hard_sigmoid", "reset": "before"}


REFUSED = {
    "masking": "mask: Masking",
    "mask_zero": "table: mask_zero",
    "activation": "odd: activation relu in a LSTM, expected tanh: a bundle has no place for it yet",
    "gate": "odd: recurrent_activation relu, expected sigmoid or hard_sigmoid: a bundle has no",
    "rnn_gate": "odd: activation elu in a SimpleRNN: a bundle has no place for it yet",
    "merge": "odd: merge_mode 'sum'",
    "backwards": "odd: go_backwards",
    "both_last": "odd: Bidirectional with return_sequences=False: ",
    "convolution": "odd: Conv1D",
    "norm": "odd: LayerNormalization",
    "before": "odd: activation relu of a Dense layer: a bundle has no place for it yet",
    "gates_before": "odd: activation sigmoid, and gru comes after it: a bundle has no place for it",
    "between": "odd: activation softmax, and gru_1 comes after it: a bundle has no place for it",
    "twice": "odd: activation tanh of a Dense layer: a bundle has no place for it yet",
    "head_activation": "odd: activation relu of a Dense layer: a bundle has no place for it yet",
    "activation_layer": "odd: ReLU is not supported",
    "nested": "odd: a model within the model",
    "flatten": "odd: Flatten is not supported",
    "encoder_decoder": "encoder: return_state: the model uses its state|decoder: ",
    "state_outputs": "odd: return_state: the model uses its state as well as its rows",
    "shared": "odd: is used more than once",
    "two_inputs": "model: has 2 inputs, expected one",
    "uneven_heads": "model: a and b have different activations",
    "soft_heads": "model: softmax of a and b apart is not softmax of them together",
    "training": "odd: is called with training=True",
    "far_mean": r"odd: adds -100000 to feature 1, expected at most 1024: .* would lose digits",
    "other_axis": r"odd: BatchNormalization along axis 1",
    "half": "odd: dtype mixed_float16",
    "branches": "sum: Add reads gru and gru_1",
    "two_outputs": "model: gru and aside come from different layers",
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


def test_other_versions_are_refused(files: Path, tmp_path: Path) -> None:
    for version, said in (("1.2.2", r"1\.2\.2"), (None, "of an unknown version"), ("4.0", "4")):
        old = changed(
            files / "lstm.keras", tmp_path / "m.keras", metadata={"keras_version": version}
        )
        with pytest.raises(ImportFileError, match=f"written by Keras {said}.*expected 2 or 3"):
            import_model(old)


@pytest.mark.parametrize(
    ("name", "layers"),
    [("only.weights.h5", "lstm"), ("old_plain_only.h5", "dense, gru, lstm")],
)
def test_weights_alone_are_refused_with_what_to_do(name: str, layers: str, files: Path) -> None:
    with pytest.raises(ImportFileError) as caught:
        import_model(files / name)
    said = str(caught.value)
    assert f"holds the weights of a Keras model ({layers}) and not its structure" in said
    assert f"model.load_weights('{name}') and model.save('model.keras')" in said


def test_an_hdf5_file_of_anything_else_is_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "data.h5", "w") as file:
        file["x"] = np.zeros(3)
    with pytest.raises(ImportFileError, match="holds no Keras model"):
        import_model(tmp_path / "data.h5")


def test_time_major_is_refused(files: Path, tmp_path: Path) -> None:
    def turn(config: dict[str, Any]) -> None:
        config["config"]["layers"][1]["config"]["time_major"] = True

    file = changed(files / "old_plain.keras", tmp_path / "m.keras", turn)
    with pytest.raises(UnsupportedModuleError, match="lstm: time_major"):
        import_model(file)


def test_models_of_early_keras_2_are_read(files: Path, tmp_path: Path) -> None:
    """A list of layers without an input, a GRU that is older than `reset_after`."""

    def older(config: dict[str, Any]) -> None:
        layers = config["config"]["layers"][1:]
        layers[0]["config"]["batch_input_shape"] = [None, None, 3]
        del layers[1]["config"]["reset_after"]
        config["config"] = layers

    file = changed(files / "old_hard.keras", tmp_path / "m.keras", older)
    x, expected = answers(files, "old_hard")
    assert error(rows_of(import_model(file), x), expected) < KERAS_ERROR_MAX


def test_an_input_that_rounds_its_features_is_refused(files: Path, tmp_path: Path) -> None:
    def rounded(config: dict[str, Any]) -> None:
        config["config"]["layers"][0]["config"]["dtype"] = "float16"

    file = changed(files / "lstm.keras", tmp_path / "m.keras", rounded)
    with pytest.raises(UnsupportedModuleError, match="dtype float16 of its features rounds them"):
        import_model(file)
    x, expected = answers(files, "words")  # the type of tokens rounds nothing
    words = changed(files / "words.keras", tmp_path / "w.keras", rounded)
    assert error(rows_of(import_model(words), x), expected) < KERAS_ERROR_MAX


@pytest.mark.parametrize("depth", [900, 100_000])
def test_a_structure_of_endless_depth_is_refused(depth: int, files: Path, tmp_path: Path) -> None:
    file = tmp_path / "m.keras"
    nested = '{"class_name": "Functional", "config": {"layers": [{"class_name": "LSTM", "config":'
    nested += f'{{"name": "odd"}}, "inbound_nodes": [{{"args": {"[" * depth}{"]" * depth}}}]}}]}}}}'
    with zipfile.ZipFile(file, "w") as archive, zipfile.ZipFile(files / "lstm.keras") as sound:
        archive.writestr("metadata.json", sound.read("metadata.json"))
        archive.writestr("config.json", nested)
        archive.writestr("model.weights.h5", sound.read("model.weights.h5"))
    with pytest.raises(BundleError, match=r"recursion|too deep|model: has 0 inputs"):
        import_model(file)


def test_an_archive_that_unpacks_to_far_more_than_it_is_takes_no_memory(
    files: Path, tmp_path: Path
) -> None:
    file = tmp_path / "model.keras"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with zipfile.ZipFile(files / "lstm.keras") as sound:
            for name in ("metadata.json", "config.json"):
                archive.writestr(name, sound.read(name))
        with archive.open("model.weights.h5", "w", force_zip64=True) as entry:
            for _ in range(160):
                entry.write(bytes(2**20))
    tracemalloc.start()
    try:
        with pytest.raises(ImportFileError, match=r"unpacks to 1677\d+ bytes, expected at most"):
            import_model(file)
        assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
    finally:
        tracemalloc.stop()


def test_one_dataset_is_not_read_as_many(files: Path, tmp_path: Path) -> None:
    """Hard links to one dataset would unpack a small file to any size."""

    def wide(config: dict[str, Any]) -> None:
        plain = {"units": 128, "use_bias": False, "activation": "linear", "dtype": "float32"}
        config["config"]["layers"][0]["config"]["batch_shape"] = [None, None, 128]
        config["config"]["layers"][1:] = [
            {"class_name": "Dense", "config": {**plain, "name": f"d{n}"}} for n in range(200)
        ]

    data = io.BytesIO()
    with h5py.File(data, "w") as file:
        file["x"] = np.zeros((128, 128), np.float32)
        for number in range(200):
            group = file.create_group(f"layers/dense{f'_{number}' if number else ''}/vars")
            group["0"] = file["x"]
    harmful = changed(files / "lstm.keras", tmp_path / "m.keras", wide, weights=data.getvalue())
    with pytest.raises(UnsupportedModuleError, match="more bytes than the file has"):
        import_model(harmful)


def test_without_the_extra_the_message_says_what_to_install(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(BundleError, match=r"h5py is not installed: .*pip install .*\[importers\]"):
        import_model(files / "lstm.keras")
