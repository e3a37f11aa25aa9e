"""What model.toml may say: the structure of a model, its labels and its limits.

The classes mirror the tables of the file. Each kind of layer knows its own sizes, carry and
weights, so that `ModelSpec` adds them up without asking which kind it has; a new kind is one more
class in `Layer`.
"""

from __future__ import annotations

import json
import math
import tomllib
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self, TypeAlias, cast

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    ValidationError,
    model_validator,
)

from conveyor_models.errors import SpecError

SIZE_MAX: Final = 65_536
LAYERS_MAX: Final = 64
LABEL_CHARACTERS_MAX: Final = 256
DESCRIPTION_CHARACTERS_MAX: Final = 4_096
WEIGHT_VALUES_MAX: Final = 2**30
"""Most numbers the weights of one model may hold: 4 GiB of float32."""
PROBLEMS_SHOWN_MAX: Final = 8

Shape: TypeAlias = tuple[int, ...]

Size = Annotated[int, Field(strict=True, ge=1, le=SIZE_MAX)]
Label = Annotated[str, Field(min_length=1, max_length=LABEL_CHARACTERS_MAX)]
Labels = Annotated[tuple[Label, ...], Field(max_length=SIZE_MAX)]


class _Table(BaseModel):
    """A table of model.toml: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def _check_labels(labels: tuple[str, ...] | None, size: int) -> None:
    if labels is None:
        return
    if len(labels) != size:
        raise ValueError(f"labels: {len(labels)} of them, expected exactly {size}")
    seen: set[str] = set()
    for label in labels:
        if label in seen:
            raise ValueError(f"labels: {label!r} stands there more than once")
        seen.add(label)


class InputSpec(_Table):
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


class EmbeddingSpec(_Table):
    """`[embedding]`: the row of numbers that stands for each token."""

    size: Size


class LstmLayer(_Table):
    """`cell = "lstm"`: Hochreiter & Schmidhuber 1997 with the forget gate of Gers et al. 2000."""

    cell: Literal["lstm"]
    size: Size
    """Length of c."""
    projection: Size | None = None
    """Length of h where it is projected down (LSTMP, Sak et al. 2014); else it is as long as c."""

    @model_validator(mode="after")
    def _projection_narrows(self) -> Self:
        if self.projection is not None and self.projection >= self.size:
            raise ValueError(
                f"projection: {self.projection} is not below the layer's size {self.size}"
            )
        return self

    @property
    def output_size(self) -> int:
        """Length of h, which is what the next layer reads."""
        return self.size if self.projection is None else self.projection

    @property
    def carry_shapes(self) -> dict[str, Shape]:
        """Shape of each part of this layer's carry, for one session."""
        return {"h": (self.output_size,), "c": (self.size,)}

    def weight_shapes(self, input_size: int) -> dict[str, Shape]:
        """Name (within the layer) and shape of each weight."""
        shapes: dict[str, Shape] = {
            "weight_input": (4 * self.size, input_size),
            "weight_recurrent": (4 * self.size, self.output_size),
            "bias": (4 * self.size,),
        }
        if self.projection is not None:
            shapes["weight_projection"] = (self.projection, self.size)
        return shapes


def _refuse_unknown_cell(value: object) -> object:
    if isinstance(value, dict) and "cell" in value:
        cell = cast("dict[str, object]", value)["cell"]
        if cell not in KNOWN_CELLS:
            raise ValueError(
                f"cell: {cell!r} is not one of the known ones: {', '.join(KNOWN_CELLS)}"
            )
    return cast("object", value)


Layer = Annotated[LstmLayer, BeforeValidator(_refuse_unknown_cell)]
"""Any kind of layer, told apart by `cell`. With a second kind this becomes
`Annotated[LstmLayer | ..., Field(discriminator="cell"), BeforeValidator(_refuse_unknown_cell)]`."""

KNOWN_CELLS: Final = ("lstm",)


class HeadSpec(_Table):
    """`[head]`: a linear layer after the stack."""

    size: Size
    bias: StrictBool = True


class OutputSpec(_Table):
    """`[output]`: the last function, and a name for each number that comes out."""

    activation: Literal["none", "softmax", "log_softmax", "sigmoid"] = "none"
    labels: Labels | None = None


class LimitsSpec(_Table):
    """`[limits]`: where this model is to be held tighter than the server's own limits."""

    chunk_steps_max: Annotated[int, Field(strict=True, ge=1, le=1_000_000)] | None = None


class ModelSpec(_Table):
    """The whole of model.toml.

    A spec that validates is consistent: labels fit their sizes, tokens have an embedding and
    features have none, and the weights it implies are no more than `WEIGHT_VALUES_MAX`.
    """

    schema_version: Annotated[Literal[1], Field(alias="schema")]
    name: Annotated[str, Field(pattern=r"\A[a-z0-9][a-z0-9_-]{0,62}\z")]
    version: Annotated[int, Field(strict=True, ge=1, le=2**31 - 1)] = 1
    description: Annotated[str, Field(max_length=DESCRIPTION_CHARACTERS_MAX)] = ""
    input: InputSpec
    embedding: EmbeddingSpec | None = None
    layers: Annotated[tuple[Layer, ...], Field(min_length=1, max_length=LAYERS_MAX)]
    head: HeadSpec | None = None
    output: OutputSpec = OutputSpec()
    limits: LimitsSpec = LimitsSpec()

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.input.kind == "tokens" and self.embedding is None:
            raise ValueError("embedding: missing, and an input of tokens needs one")
        if self.input.kind == "features" and self.embedding is not None:
            raise ValueError("embedding: there is one, but an input of features has no use for it")
        try:
            _check_labels(self.output.labels, self.output_size)
        except ValueError as error:
            raise ValueError(f"output.{error}") from error
        if self.weight_values > WEIGHT_VALUES_MAX:
            raise ValueError(
                f"sizes: they add up to {self.weight_values} weights,"
                f" expected at most {WEIGHT_VALUES_MAX}"
            )
        return self

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
        """What each layer reads per step: the embedding or the features, then the layer below."""
        first = self.input.size if self.embedding is None else self.embedding.size
        return (first, *(layer.output_size for layer in self.layers[:-1]))

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
        if self.head is not None:
            shapes["head.weight"] = (self.head.size, self.layers[-1].output_size)
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
        for name, value in tables.items():
            if isinstance(value, dict):
                lines += _toml_table(f"[{name}]", cast("dict[str, Any]", value))
            if name == ("embedding" if self.embedding is not None else "input"):
                for layer in layers:
                    lines += _toml_table("[[layers]]", layer)
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
        details = error.errors(include_url=False)
        # A table whose parts are at fault is reported by pydantic as well; the parts say it better.
        blamed = {detail["loc"][:end] for detail in details for end in range(len(detail["loc"]))}
        problems = [_problem(dict(detail)) for detail in details if detail["loc"] not in blamed]
        shown = "; ".join(text for _, text in problems[:PROBLEMS_SHOWN_MAX])
        if len(problems) > PROBLEMS_SHOWN_MAX:
            shown += f"; and {len(problems) - PROBLEMS_SHOWN_MAX} more"
        raise SpecError(shown, path=source, key=problems[0][0]) from error


def _problem(detail: dict[str, Any]) -> tuple[str, str]:
    """The key at fault, as model.toml spells it, and a sentence about it."""
    location = [str(part) for part in detail["loc"]]
    match detail["type"]:
        case "missing":
            said = "missing"
        case "extra_forbidden":
            said = "unknown key"
        case "value_error":
            # Our own validators name the key themselves, relative to the table they look at.
            key, _, said = str(detail["ctx"]["error"]).partition(": ")
            location.append(key)
        case _:
            found = repr(detail["input"])
            found = found if len(found) <= 80 else found[:77] + "..."
            expected = detail["msg"]
            said = f"found {found}; {expected[0].lower()}{expected[1:]}"
    key = ".".join(location)[:200]
    return key, f"{key}: {said}"
