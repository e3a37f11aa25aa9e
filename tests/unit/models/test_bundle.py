"""Bundles on disk: written, read back, and every way one can be broken."""

from __future__ import annotations

import json
import os
import pickle
import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from conveyor_models import (
    BundleError,
    BundleFileError,
    ModelSpec,
    SpecError,
    WeightsError,
    digest_of,
    load_bundle,
    parse_spec,
    save_bundle,
)
from conveyor_models.bundle import SPEC_BYTES_MAX
from tests.unit.models.bundles import (
    FEATURES_TOML,
    TOKENS_TOML,
    counted_weights,
    random_weights,
    tokens_spec,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A valid bundle, to be broken."""
    spec = tokens_spec()
    return save_bundle(tmp_path / "tiny", spec, random_weights(spec)).path


def test_a_bundle_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    spec = tokens_spec()
    weights = random_weights(spec)
    saved = save_bundle(tmp_path / "new" / "tiny", spec, weights)
    loaded = load_bundle(saved.path)
    assert loaded.spec == spec
    assert loaded.digest == saved.digest == digest_of(spec, weights)
    assert loaded.weights.keys() == weights.keys()
    assert all(torch.equal(loaded.weights[name], weights[name]) for name in weights)
    assert sorted(path.name for path in loaded.path.iterdir()) == [
        "model.toml",
        "weights.safetensors",
    ]


def test_what_cannot_be_loaded_is_not_saved(tmp_path: Path) -> None:
    spec = tokens_spec()
    weights = random_weights(spec)
    weights["head.bias"][2] = torch.nan
    with pytest.raises(WeightsError, match=r"head\.bias: 1 of 5 values are not finite"):
        save_bundle(tmp_path / "tiny", spec, weights)
    assert not (tmp_path / "tiny").exists()


def _rewrite(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    path = folder / "weights.safetensors"
    weights = safetensors.torch.load(path.read_bytes())
    change(weights)
    path.write_bytes(safetensors.torch.save(weights))


@pytest.mark.parametrize(
    ("change", "key", "said"),
    [
        (lambda w: w.pop("head.bias"), "head.bias", "missing tensor head.bias"),
        (
            lambda w: w.update({"head.scale": torch.ones(1)}),
            "head.scale",
            "tensor head.scale is not one that model.toml asks for",
        ),
        (
            lambda w: w.update({"layers.0.bias_hh": w.pop("layers.0.bias")}),
            "layers.0.bias",
            "missing tensor layers.0.bias; it holds layers.0.bias_hh",
        ),
        (
            lambda w: w.update({"head.weight": torch.ones(5, 8)}),
            "head.weight",
            "tensor head.weight: shape [5, 8], expected [5, 7]",
        ),
        (
            lambda w: w.update({"head.weight": w["head.weight"].T.contiguous()}),
            "head.weight",
            "tensor head.weight: shape [7, 5], expected [5, 7]",
        ),
        (
            lambda w: w.update({"head.bias": w["head.bias"].half()}),
            "head.bias",
            "tensor head.bias: type F16, expected F32",
        ),
        (
            lambda w: w["layers.1.bias"].__setitem__(3, float("nan")),
            "layers.1.bias",
            "tensor layers.1.bias: 1 of 28 values are not finite",
        ),
        (
            lambda w: w["embedding.weight"].__setitem__(0, float("-inf")),
            "embedding.weight",
            "tensor embedding.weight: 3 of 15 values are not finite",
        ),
    ],
)
def test_wrong_tensors_are_named(
    folder: Path, change: Callable[[dict[str, Tensor]], None], key: str, said: str
) -> None:
    _rewrite(folder, change)
    with pytest.raises(WeightsError) as raised:
        load_bundle(folder)
    assert str(raised.value).startswith(f"{folder / 'weights.safetensors'}: {said}")
    assert raised.value.key == key


def _with_header(header: bytes, tensors: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + tensors


DAMAGED = {
    "empty": (b"", "only 0 bytes"),
    "seven bytes": (b"\0" * 7, "only 7 bytes"),
    "header longer than any file": (
        struct.pack("<Q", 2**63) + b"{}",
        "header would have 9,223,372,036,854,775,808 bytes",
    ),
    "header cut off": (struct.pack("<Q", 3) + b"{}", "ends within its header of 3 bytes"),
    "header not JSON": (_with_header(b"{,}"), "header is not valid JSON"),
    "header not text": (_with_header(b"\xff\xfe\xff"), "header is not valid JSON"),
    "header a list": (_with_header(b"[]"), "header is not a JSON object"),
    "header nested": (_with_header(b"[" * 15_000), "header is not valid JSON"),
    "header names twice": (_with_header(b'{"a": 1, "a": 2}'), "duplicate 'a'"),
    "no tensors": (_with_header(b"{}"), "missing tensor embedding.weight"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_weights_are_refused(folder: Path, damage: str) -> None:
    data, said = DAMAGED[damage]
    (folder / "weights.safetensors").write_bytes(data)
    with pytest.raises(WeightsError, match=re.escape(said)):
        load_bundle(folder)


def _header(folder: Path) -> tuple[dict[str, dict[str, object]], bytes]:
    data = (folder / "weights.safetensors").read_bytes()
    (size,) = struct.unpack_from("<Q", data)
    return json.loads(data[8 : 8 + size]), data[8 + size :]


@pytest.mark.parametrize("offsets", [[0, 20], [-20, 0], [2**62, 2**62 + 20], [20, 0], "no"])
def test_offsets_that_do_not_tile_the_file_are_refused(folder: Path, offsets: object) -> None:
    header, tensors = _header(folder)
    header["head.bias"]["data_offsets"] = offsets
    if offsets == [0, 20]:  # what the first tensor already covers
        assert header["embedding.weight"]["data_offsets"] != offsets
    (folder / "weights.safetensors").write_bytes(_with_header(json.dumps(header).encode(), tensors))
    with pytest.raises(WeightsError, match="not valid safetensors"):
        load_bundle(folder)


@pytest.mark.parametrize("entry", [None, 7, [], {}, {"dtype": "F32"}, {"dtype": ["F32"]}])
def test_entries_that_describe_no_tensor_are_refused(folder: Path, entry: object) -> None:
    header, tensors = _header(folder)
    header["head.bias"] = entry  # type: ignore[assignment]
    (folder / "weights.safetensors").write_bytes(_with_header(json.dumps(header).encode(), tensors))
    with pytest.raises(WeightsError, match=r"tensor head\.bias: (type|shape) "):
        load_bundle(folder)


def test_cut_off_tensors_are_refused(folder: Path) -> None:
    path = folder / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(WeightsError, match="not valid safetensors"):
        load_bundle(folder)


def test_a_file_larger_than_the_spec_implies_is_not_read(folder: Path) -> None:
    path = folder / "weights.safetensors"
    with path.open("ab") as file:
        file.truncate(2**40)  # sparse: a terabyte that takes no room
    with pytest.raises(BundleFileError, match=r"1099511627776 bytes, expected at most \d{5}\b"):
        load_bundle(folder)


def test_a_header_larger_than_the_spec_implies_is_not_parsed(folder: Path) -> None:
    header, _ = _header(folder)
    padded = json.dumps(header).encode() + b" " * 18_944
    # Without tensors, so that the file as a whole stays within bounds.
    (folder / "weights.safetensors").write_bytes(_with_header(padded))
    with pytest.raises(WeightsError, match=r"would have [\d,]+ bytes; expected at most 18,944"):
        load_bundle(folder)


def test_metadata_in_the_header_is_allowed(folder: Path) -> None:
    before = load_bundle(folder)
    path = folder / "weights.safetensors"
    path.write_bytes(safetensors.torch.save(dict(before.weights), {"made": "by hand"}))
    assert load_bundle(folder).digest == before.digest


@pytest.mark.parametrize("name", ["model.toml", "weights.safetensors"])
def test_missing_files_are_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(BundleFileError) as raised:
        load_bundle(folder)
    assert str(raised.value) == f"{folder / name}: missing"


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        BundleFileError, match=r"nowhere/model\.toml: missing, and so is the folder"
    ):
        load_bundle(tmp_path / "nowhere")


class _Bomb:
    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return os._exit, (70,)


def test_a_pickle_is_never_loaded(folder: Path) -> None:
    (folder / "weights.safetensors").unlink()
    (folder / "weights.pt").write_bytes(pickle.dumps(_Bomb()))
    with pytest.raises(BundleFileError, match=r"missing; weights\.pt may be a pickle"):
        load_bundle(folder)
    (folder / "weights.pt").rename(folder / "weights.safetensors")
    with pytest.raises(WeightsError):
        load_bundle(folder)


@pytest.mark.parametrize("name", ["model.toml", "weights.safetensors"])
def test_links_may_not_leave_the_folder(folder: Path, name: str) -> None:
    outside = folder.parent / "outside"
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    with pytest.raises(BundleFileError, match=f"{name}: is a link that leaves the bundle's folder"):
        load_bundle(folder)


def test_links_within_the_folder_are_followed(folder: Path) -> None:
    digest = load_bundle(folder).digest
    (folder / "..data").mkdir()
    for name in ("model.toml", "weights.safetensors"):
        (folder / name).rename(folder / "..data" / name)
        (folder / name).symlink_to(Path("..data") / name)
    assert load_bundle(folder).digest == digest


def test_a_loop_of_links_is_refused(folder: Path) -> None:
    (folder / "model.toml").unlink()
    (folder / "model.toml").symlink_to("model.toml")
    with pytest.raises(BundleFileError, match=r"model\.toml: missing"):
        load_bundle(folder)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_only_regular_files_are_read(folder: Path, make: Callable[[Path], None]) -> None:
    path = folder / "weights.safetensors"
    path.unlink()
    make(path)
    with pytest.raises(BundleFileError, match=r"is not a regular file|cannot be read"):
        load_bundle(folder)


def test_a_huge_or_garbled_spec_is_refused(folder: Path) -> None:
    path = folder / "model.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(SpecError, match="not text in UTF-8"):
        load_bundle(folder)
    path.write_bytes(b"#" * (SPEC_BYTES_MAX + 1))
    with pytest.raises(BundleFileError, match="4194305 bytes, expected at most 4194304"):
        load_bundle(folder)
    path.write_bytes(TOKENS_TOML.encode() + b"#" * (SPEC_BYTES_MAX - len(TOKENS_TOML.encode())))
    load_bundle(folder)


def test_every_truncation_and_many_bit_flips_end_in_a_bundle_error(folder: Path) -> None:
    path = folder / "weights.safetensors"
    whole = path.read_bytes()
    (header_bytes,) = struct.unpack_from("<Q", whole)
    digest = load_bundle(folder).digest
    for length in range(0, len(whole), 41):
        path.write_bytes(whole[:length])
        with pytest.raises(BundleError):
            load_bundle(folder)
    for at in range(8 + header_bytes):
        flipped = bytearray(whole)
        flipped[at] ^= 1 << (at % 8)
        path.write_bytes(flipped)
        try:
            bundle = load_bundle(folder)
        except BundleError:
            continue
        assert bundle.digest == digest, f"bit flip at byte {at} of the header changed the weights"


PINNED = "sha256:51c7c29bad1297b052d04d4544dfc157fa38a9d99d1fc956f5eebf521efa299a"


def test_the_digest_of_a_fixed_model_never_changes() -> None:
    spec = parse_spec(TOKENS_TOML)
    assert digest_of(spec, counted_weights(spec)) == PINNED


@pytest.mark.parametrize(
    "toml",
    [
        TOKENS_TOML.replace('"tiny"', '"other"'),
        TOKENS_TOML.replace("schema = 1", 'schema = 1\nversion = 7\ndescription = "x"'),
        TOKENS_TOML.replace('"a"', '"z"'),
        TOKENS_TOML + 'labels = ["1", "2", "3", "4", "5"]\n[limits]\nchunk_steps_max = 9',
        TOKENS_TOML.replace("[head]\n", "[head]\nbias = true\n"),
    ],
)
def test_the_digest_ignores_what_does_not_decide_outputs(toml: str) -> None:
    spec = parse_spec(toml)
    assert digest_of(spec, counted_weights(spec)) == PINNED


def test_the_digest_ignores_the_order_of_tensors() -> None:
    spec = tokens_spec()
    weights = counted_weights(spec)
    assert digest_of(spec, dict(reversed(weights.items()))) == PINNED


def test_the_digest_sees_structure_the_shapes_do_not_show() -> None:
    tomls = [TOKENS_TOML.replace("log_softmax", name) for name in ("softmax", "sigmoid", "none")]
    found = {digest_of(spec, counted_weights(spec)) for spec in map(parse_spec, tomls)}
    assert len(found | {PINNED}) == 4


def test_the_digest_sees_every_tensor() -> None:
    spec = tokens_spec()
    found = {PINNED}
    for name in spec.weight_shapes:
        weights = counted_weights(spec)
        last = weights[name].flatten()[-1:]
        last.copy_(torch.nextafter(last, torch.tensor([torch.inf])))
        found.add(digest_of(spec, weights))
    assert len(found) == 1 + len(spec.weight_shapes)


def test_the_digest_sees_tensors_that_change_places() -> None:
    spec: ModelSpec = parse_spec(FEATURES_TOML.replace("size = 2", "size = 3", 1))
    weights = random_weights(spec)
    swapped = weights | {
        "layers.0.weight_input": weights["layers.0.weight_recurrent"],
        "layers.0.weight_recurrent": weights["layers.0.weight_input"],
    }
    assert digest_of(spec, weights) != digest_of(spec, swapped)
