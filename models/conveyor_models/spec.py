"""What model.toml may say: the structure of a model, its labels and its limits.

The classes mirror the tables of the file; those of the layers are in `conveyor_models.layers`.
"""

from __future__ import annotations

import json
import math
import tomllib
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, StrictBool, ValidationError, model_validator

from conveyor_models.errors import SpecError
from conveyor_models.layers import Layer
from conveyor_models.problems import found_instead
from conveyor_models.tables import SIZE_MAX, Shape, Size, Table

LAYERS_MAX: Final = 64
LABEL_CHARACTERS_MAX: Final = 256
DESCRIPTION_CHARACTERS_MAX: Final = 4_096
WEIGHT_VALUES_MAX: Final = 2**30
"""Most numbers the weights of one model may hold: 4 GiB of float32."""
PROBLEMS_SHOWN_MAX: Final = 8

_NAME: Final = r"\A[a-z0-9][a-z0-9_-]{0,62}\z"
_PATTERNS: Final = {
    _NAME: "1 to 63 characters of a-z 0-9 _ -, the first one a letter or a digit",
}

Label = Annotated[str, Field(min_length=1, max_length=LABEL_CHARACTERS_MAX)]
Labels = Annotated[tuple[Label, ...], Field(max_length=SIZE_MAX)]


def _check_labels(labels: tuple[str, ...] | None, size: int) -> None:
    if labels is None:
        return
    if len(labels) != size:
        raise ValueError(f"labels: found {len(labels):,}; expected exactly {size:,}")
    seen: set[str] = set()
    for label in labels:
        if label in seen:
            raise ValueError(f"labels: duplicate label {label!r}")
        seen.add(label)


class InputSpec(Table):
    """`[input]`: what one step reads."""

    kind: Literal["tokens", "features"]
    """`tokens`: one index below `size` per step. `features`: `size` numbers per step."""
    size: Size
    labels: Labels | None = None
    """A name for each token, or for each feature."""

    @model_validator(mode="after")
    def _labels_fit(self) -> Self:
        _check_labels(self.labels, self.size)
        return self


class EmbeddingSpec(Table):
    """`[embedding]`: the row of numbers that stands for each token."""

    size: Size


class AttentionSpec(Table):
    """`[attention]`: additive attention over a memory that each session brings (Bahdanau 2014)."""

    memory_size: Size
    """Numbers in one row of the memory."""
    size: Size
    """Length of the vectors in which a row and h are compared."""
    gate: StrictBool = False
    """Whether what was read is scaled by a gate computed from h (Xu et al. 2015)."""
    head: StrictBool = False
    """Whether the head reads [h ; z] rather than h."""

    def weight_shapes(self, hidden_size: int) -> dict[str, Shape]:
        """Name (within the table) and shape of each weight; `hidden_size`: of the top layer's h."""
        shapes: dict[str, Shape] = {
            "weight_query": (self.size, hidden_size),
            "weight_memory": (self.size, self.memory_size),
            "bias": (self.size,),
            "score": (self.size,),
        }
        if self.gate:
            shapes |= {"weight_gate": (hidden_size,), "bias_gate": (1,)}
        return shapes


class HeadSpec(Table):
    """`[head]`: a linear layer after the stack."""

    size: Size
    bias: StrictBool = True


class OutputSpec(Table):
    """`[output]`: the last function, and a name for each number that comes out."""

    activation: Literal["none", "softmax", "log_softmax", "sigmoid"] = "none"
    labels: Labels | None = None


class LimitsSpec(Table):
    """`[limits]`: where this model is to be held tighter than the server's own limits."""

    chunk_steps_max: Annotated[int, Field(strict=True, ge=1, le=1_000_000)] | None = None
    memory_rows_max: Annotated[int, Field(strict=True, ge=1, le=1_000_000)] | None = None
    """Only with attention."""


class ModelSpec(Table):
    """The whole of model.toml.

    A spec that validates is consistent: labels fit their sizes, tokens have an embedding and
    features have none, and the weights it implies are no more than `WEIGHT_VALUES_MAX`.
    """

    schema_version: Annotated[Literal[1], Field(alias="schema")]
    name: Annotated[str, Field(pattern=_NAME)]
    version: Annotated[int, Field(strict=True, ge=1, le=2**31 - 1)] = 1
    description: Annotated[str, Field(max_length=DESCRIPTION_CHARACTERS_MAX)] = ""
    input: InputSpec
    embedding: EmbeddingSpec | None = None
    attention: AttentionSpec | None = None
    layers: Annotated[tuple[Layer, ...], Field(min_length=1, max_length=LAYERS_MAX)]
    head: HeadSpec | None = None
    output: OutputSpec = OutputSpec()
    limits: LimitsSpec = LimitsSpec()

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.input.kind == "tokens" and self.embedding is None:
            raise ValueError("embedding: missing; an input of tokens needs one")
        if self.input.kind == "features" and self.embedding is not None:
            raise ValueError("embedding: not used with an input of features; remove the table")
        self._check_attention()
        try:
            _check_labels(self.output.labels, self.output_size)
        except ValueError as error:
            raise ValueError(f"output.{error}") from error
        if self.weight_values > WEIGHT_VALUES_MAX:
            raise ValueError(
                f"sizes: they add up to {self.weight_values:,} weights;"
                f" expected at most {WEIGHT_VALUES_MAX:,}"
            )
        return self

    def _check_attention(self) -> None:
        if self.attention is None:
            if self.limits.memory_rows_max is not None:
                raise ValueError(
                    "limits.memory_rows_max: not used without attention; remove the key"
                )
            return
        if self.attention.head and self.head is None:
            raise ValueError("attention.head: true, but there is no [head]")
        if not self.streamable:
            raise ValueError(
                "attention: needs h step by step, so every layer must have the direction forward"
            )

    @property
    def streamable(self) -> bool:
        """Whether steps can be run as they come: every layer runs forward."""
        return all(layer.direction == "forward" for layer in self.layers)

    @property
    def vocabulary_size(self) -> int | None:
        """How many tokens there are; None for a model that reads features."""
        return self.input.size if self.input.kind == "tokens" else None

    @property
    def input_size(self) -> int:
        """Numbers in one input row: 1 for tokens (the index), else the number of features."""
        return 1 if self.input.kind == "tokens" else self.input.size

    @property
    def output_size(self) -> int:
        """Numbers in one output row."""
        return self.layers[-1].output_size if self.head is None else self.head.size

    @property
    def layer_input_sizes(self) -> tuple[int, ...]:
        """What each layer reads per step: the embedding or the features, then the layer below.

        With attention the first layer reads what was found in the memory as well.
        """
        first = self.input.size if self.embedding is None else self.embedding.size
        if self.attention is not None:
            first += self.attention.memory_size
        return (first, *(layer.output_size for layer in self.layers[:-1]))

    @property
    def head_input_size(self) -> int:
        """What the head reads, or would read."""
        top = self.layers[-1].output_size
        if self.attention is not None and self.attention.head:
            return top + self.attention.memory_size
        return top

    @property
    def carry_shapes(self) -> tuple[dict[str, Shape], ...]:
        """For each layer, the shape of each part of the carry of one session."""
        return tuple(layer.carry_shapes for layer in self.layers)

    @property
    def carry_values(self) -> int:
        """Numbers in the carry of one session, all layers together."""
        return sum(math.prod(shape) for parts in self.carry_shapes for shape in parts.values())

    @property
    def weight_shapes(self) -> dict[str, Shape]:
        """Name and shape of every tensor that weights.safetensors has to hold, and no other."""
        shapes: dict[str, Shape] = {}
        if self.embedding is not None:
            shapes["embedding.weight"] = (self.input.size, self.embedding.size)
        for index, (layer, size) in enumerate(
            zip(self.layers, self.layer_input_sizes, strict=True)
        ):
            for name, shape in layer.weight_shapes(size).items():
                shapes[f"layers.{index}.{name}"] = shape
        if self.attention is not None:
            of_attention = self.attention.weight_shapes(self.layers[-1].output_size)
            shapes |= {f"attention.{name}": shape for name, shape in of_attention.items()}
        if self.head is not None:
            shapes["head.weight"] = (self.head.size, self.head_input_size)
            if self.head.bias:
                shapes["head.bias"] = (self.head.size,)
        return shapes

    @property
    def weight_values(self) -> int:
        """Numbers in all weights together."""
        return sum(math.prod(shape) for shape in self.weight_shapes.values())

    @property
    def step_multiply_adds(self) -> int:
        """Multiply-adds of one step of one session: each matrix entry once; a lookup costs none."""
        return sum(
            math.prod(shape)
            for name, shape in self.weight_shapes.items()
            if len(shape) == 2 and name != "embedding.weight"
        )

    def structure(self) -> dict[str, Any]:
        """What decides the outputs besides the weights: no names, labels, limits or description.

        Keys at their default are left out, so that an option added later leaves the digests of the
        bundles that do not use it as they were. It follows that a default may never change.
        """
        return self.model_dump(
            exclude_defaults=True,
            include={
                "input": {"kind", "size"},
                "embedding": True,
                "attention": True,
                "layers": True,
                "head": True,
                "output": {"activation"},
            },
        )

    def to_toml(self) -> str:
        """This spec as the text of a model.toml; `parse_spec` of it gives an equal spec."""
        tables = self.model_dump(exclude_unset=True, by_alias=True)
        layers = tables.pop("layers")
        lines = [
            _toml_line(key, value) for key, value in tables.items() if not isinstance(value, dict)
        ]
        before = ("input", "embedding", "attention")
        for name in (*before, None, *(name for name in tables if name not in before)):
            if name is None:
                for layer in layers:
                    lines += _toml_table("[[layers]]", {"cell": layer["cell"]} | layer)
            elif isinstance(tables.get(name), dict):
                lines += _toml_table(f"[{name}]", tables[name])
        return "\n".join(lines) + "\n"


def _toml_table(header: str, values: dict[str, Any]) -> list[str]:
    pairs = [_toml_line(key, value) for key, value in values.items() if value is not None]
    return ["", header, *pairs] if pairs else []


def _toml_line(key: str, value: Any) -> str:
    # JSON writes these few types as TOML does, except that TOML wants DEL escaped too.
    text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return f"{key} = {text}"


def parse_spec(text: str, source: Path | None = None) -> ModelSpec:
    """Reads the text of a model.toml.

    Args:
        text: the content of the file.
        source: the file it came from, for messages.

    Raises:
        SpecError: it is not TOML, or not a model; the message lists the keys at fault.
    """
    try:
        values = tomllib.loads(text)
    except RecursionError as error:
        raise SpecError("not valid TOML: nested too deeply", path=source) from error
    except ValueError as error:
        raise SpecError(f"not valid TOML: {error}", path=source) from error
    try:
        return ModelSpec.model_validate(values)
    except ValidationError as error:
        raise spec_error(error, source) from error


def spec_error(error: ValidationError, source: Path | None = None) -> SpecError:
    """What is wrong with a model.toml, by the keys at fault; `source`: the file it came from."""
    details = error.errors(include_url=False)
    # A table whose parts are at fault is reported by pydantic as well; the parts say it better.
    blamed = {detail["loc"][:end] for detail in details for end in range(len(detail["loc"]))}
    problems = [_problem(dict(detail)) for detail in details if detail["loc"] not in blamed]
    listed = "; ".join(text for _, text in problems[:PROBLEMS_SHOWN_MAX])
    if len(problems) > PROBLEMS_SHOWN_MAX:
        listed += f"; and {len(problems) - PROBLEMS_SHOWN_MAX} more"
    return SpecError(listed, path=source, key=problems[0][0])


def _problem(detail: dict[str, Any]) -> tuple[str, str]:
    """The key at fault, as model.toml spells it, and a sentence about it."""
    location = [str(part) for part in detail["loc"]]
    if location[:1] == ["layers"]:
        del location[2:3]  # the kind of layer, by which pydantic tells them apart
    match detail["type"]:
        case "missing":
            said = "missing"
        case "union_tag_not_found":
            location.append("cell")
            said = "missing"
        case "extra_forbidden":
            said = "unknown key"
        case "value_error":
            # Our own validators name the key themselves, relative to the table they look at.
            key, _, said = str(detail["ctx"]["error"]).partition(": ")
            location.append(key)
        case kind:
            said = found_instead(detail["input"], kind, detail.get("ctx", {}), _PATTERNS)
    key = ".".join(location)[:200]
    return key, f"{key}: {said}"
