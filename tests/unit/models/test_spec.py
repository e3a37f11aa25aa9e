"""What model.toml may say, and what is said about one that is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conveyor_models import ModelSpec, SpecError, parse_spec
from tests.unit.models.bundles import FEATURES_TOML, TOKENS_TOML, features_spec, tokens_spec


def test_sizes_follow_from_the_spec() -> None:
    spec = tokens_spec()
    assert spec.vocabulary_size == 5
    assert spec.input_size == 1
    assert spec.output_size == 5
    assert spec.layer_input_sizes == (3, 2)
    assert spec.carry_shapes == ({"h": (2,), "c": (4,)}, {"h": (7,), "c": (7,)})
    assert spec.carry_values == 2 + 4 + 7 + 7
    assert spec.weight_shapes == {
        "embedding.weight": (5, 3),
        "layers.0.weight_input": (16, 3),
        "layers.0.weight_recurrent": (16, 2),
        "layers.0.bias": (16,),
        "layers.0.weight_projection": (2, 4),
        "layers.1.weight_input": (28, 2),
        "layers.1.weight_recurrent": (28, 7),
        "layers.1.bias": (28,),
        "head.weight": (5, 7),
        "head.bias": (5,),
    }
    assert spec.weight_values == 15 + 48 + 32 + 16 + 8 + 56 + 196 + 28 + 35 + 5
    assert spec.step_multiply_adds == 48 + 32 + 8 + 56 + 196 + 35


def test_defaults_of_the_smallest_model() -> None:
    spec = features_spec()
    assert spec.version == 1
    assert spec.vocabulary_size is None
    assert spec.input_size == 2
    assert spec.output_size == 3, "without a head the output is h of the top layer"
    assert spec.output.activation == "none"
    assert spec.limits.chunk_steps_max is None


def test_a_head_without_bias_has_no_bias_tensor() -> None:
    spec = parse_spec(TOKENS_TOML.replace("[head]\n", "[head]\nbias = false\n"))
    assert "head.weight" in spec.weight_shapes
    assert "head.bias" not in spec.weight_shapes


def test_a_spec_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        tokens_spec().name = "other"  # type: ignore[misc]


def _edited(old: str, new: str, toml: str = TOKENS_TOML) -> str:
    assert old in toml
    return toml.replace(old, new, 1)


WRONG = {
    "not TOML": ("schema = ", None, "not valid TOML"),
    "nested too deeply": ("x = " + "[" * 100_000, None, "not valid TOML"),
    "a number of 5,000 digits": ("schema = " + "9" * 5_000, None, "not valid TOML"),
    "empty": ("", "schema", "missing"),
    "schema": (_edited("schema = 1", "schema = 2"), "schema", "found 2; expected 1"),
    "no name": (_edited('name = "tiny"', ""), "name", "missing"),
    "name in capitals": (_edited('"tiny"', '"Tiny"'), "name", "found 'Tiny'"),
    "name that leaves": (_edited('"tiny"', '"../tiny"'), "name", "found '../tiny'"),
    "name ends a line": (_edited('"tiny"', '"tiny\\n"'), "name", "found 'tiny\\n'"),
    "name too long": (
        _edited('"tiny"', f'"{"n" * 64}"'),
        "name",
        "expected 1 to 63 characters of a-z",
    ),
    "version": (_edited("schema = 1", "schema = 1\nversion = 0"), "version", "found 0"),
    "unknown key": (_edited("schema = 1", "schema = 1\ncolour = 2"), "colour", "unknown key"),
    "unknown table": (TOKENS_TOML + "\n[heads]\nsize = 1", "heads", "unknown key"),
    "unknown key within": (TOKENS_TOML + "\nlabel = 1", "output.label", "unknown key"),
    "input kind": (_edited('"tokens"', '"bytes"'), "input.kind", "found 'bytes'"),
    "input size zero": (_edited("size = 5", "size = 0"), "input.size", "found 0"),
    "input size too large": (_edited("size = 5", "size = 65537"), "input.size", "found 65537"),
    "size as a string": (_edited("size = 3", 'size = "3"'), "embedding.size", "found '3'"),
    "size as a fraction": (_edited("size = 3", "size = 3.0"), "embedding.size", "found 3.0"),
    "size as a boolean": (
        _edited("size = 3", "size = true"),
        "embedding.size",
        "found true; expected a whole number",
    ),
    "too few labels": (
        _edited('"a", ', ""),
        "input.labels",
        "found 4; expected exactly 5",
    ),
    "label twice": (_edited('"b"', '"a"'), "input.labels", "duplicate label 'a'"),
    "empty label": (_edited('"b"', '""'), "input.labels.1", "found ''"),
    "no embedding": (_edited("[embedding]\nsize = 3", ""), "embedding", "needs one"),
    "embedding of features": (
        FEATURES_TOML + "\n[embedding]\nsize = 3",
        "embedding",
        "not used with an input of features",
    ),
    "no layers": (FEATURES_TOML.split("[[layers]]")[0], "layers", "missing"),
    "empty layers": (
        "layers = []\n" + FEATURES_TOML.split("[[layers]]")[0],
        "layers",
        "at least 1 of them",
    ),
    "too many layers": (
        FEATURES_TOML + '\n[[layers]]\ncell = "lstm"\nsize = 1' * 64,
        "layers",
        "at most 64 of them",
    ),
    "unknown cell": (
        _edited('"lstm"', '"lstn"'),
        "layers.0.cell",
        "found 'lstn'; expected one of rnn, lstm, gru",
    ),
    "cell of another type": (_edited('"lstm"', "[]"), "layers.0.cell", "found []; expected one of"),
    "no cell": (_edited('cell = "lstm"', ""), "layers.0.cell", "missing"),
    "projection not below size": (
        _edited("projection = 2", "projection = 4"),
        "layers.0.projection",
        "found 4; expected less than the layer's size 4",
    ),
    "projection zero": (
        _edited("projection = 2", "projection = 0"),
        "layers.0.projection",
        "found 0",
    ),
    "activation": (_edited('"log_softmax"', '"relu"'), "output.activation", "found 'relu'"),
    "output labels": (
        TOKENS_TOML + '\nlabels = ["one"]',
        "output.labels",
        "found 1; expected exactly 5",
    ),
    "limit zero": (
        TOKENS_TOML + "\n[limits]\nchunk_steps_max = 0",
        "limits.chunk_steps_max",
        "found 0",
    ),
    "too many weights": (
        FEATURES_TOML.replace("size = 3", "size = 65536"),
        "sizes",
        "expected at most 1,073,741,824",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_named(wrong: str) -> None:
    text, key, said = WRONG[wrong]
    with pytest.raises(SpecError) as raised:
        parse_spec(text, source=Path("bundle/model.toml"))
    assert str(raised.value).startswith("bundle/model.toml: ")
    assert said in str(raised.value)
    assert raised.value.key == key
    if key is not None:
        assert f"{key}: " in str(raised.value)


def test_only_the_first_problems_are_listed() -> None:
    text = FEATURES_TOML.replace(
        "schema = 1", "schema = 1\n" + "\n".join(f"k{n} = 1" for n in range(50))
    )
    with pytest.raises(SpecError, match="and 42 more") as raised:
        parse_spec(text)
    assert len(str(raised.value)) < 1_000


NAMES = st.from_regex(r"[a-z0-9][a-z0-9_-]{0,62}", fullmatch=True)
SIZES = st.integers(1, 50)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)


@st.composite
def specs(draw: st.DrawFn) -> ModelSpec:
    kind = draw(st.sampled_from(["tokens", "features"]))
    size = draw(st.integers(1, 6))
    labels = st.lists(TEXTS, min_size=size, max_size=size, unique=True)
    layers = []
    for layer_size in draw(st.lists(st.integers(2, 50), min_size=1, max_size=3)):
        layer: dict[str, object] = {"cell": "lstm", "size": layer_size}
        if draw(st.booleans()):
            layer["projection"] = draw(st.integers(1, layer_size - 1))
        layers.append(layer)
    values: dict[str, object] = {
        "schema": 1,
        "name": draw(NAMES),
        "version": draw(st.integers(1, 99)),
        "description": draw(st.text(st.characters(exclude_categories=["Cs"]), max_size=20)),
        "input": {"kind": kind, "size": size, "labels": draw(st.none() | labels)},
        "layers": layers,
        "limits": {"chunk_steps_max": draw(st.none() | st.integers(1, 100))},
    }
    if kind == "tokens":
        values["embedding"] = {"size": draw(SIZES)}
    if draw(st.booleans()):
        values["head"] = {"size": draw(SIZES), "bias": draw(st.booleans())}
    return ModelSpec.model_validate(values)


@given(specs())
def test_toml_says_all_of_a_spec(spec: ModelSpec) -> None:
    assert parse_spec(spec.to_toml()) == spec
