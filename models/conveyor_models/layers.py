"""`[[layers]]` of model.toml: the kinds of recurrent layer.

Each kind knows its own sizes, carry and weights, so that `ModelSpec` adds them up without asking
which kind it has. `conveyor_models.cells` has the equations.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, ClassVar, Final, Literal, Self, TypeAlias, cast

from pydantic import BeforeValidator, Field, StrictBool, field_validator, model_validator

from conveyor_models.problems import shown
from conveyor_models.tables import Shape, Size, Table

Direction: TypeAlias = Literal["forward", "reverse", "bidirectional"]
Peephole: TypeAlias = Literal["input", "forget", "output"]
PEEPHOLES: Final[tuple[Peephole, ...]] = ("input", "forget", "output")

REVERSE: Final = "reverse."
"""What precedes the names of a bidirectional layer's weights that run from the end."""
HARD_SIGMOID_SLOPE: Final = 0.2
"""ONNX's default, and Keras's before version 3; Keras 3 has 1/6."""

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class RecurrentLayer(Table):
    """What all kinds of layer have in common."""

    size: Size
    """Length of the state: of c where there is one, else of h."""
    direction: Direction = "forward"
    """`reverse` and `bidirectional` layers run from the end of a sequence, so a model with one can
    predict and not be streamed. A bidirectional one puts out [h forward; h reverse]."""
    initial_state: StrictBool = False
    """Whether the weights hold the carry that a session begins with; else it is zero."""
    clip: Positive | None = None
    """What goes into the gates' functions is held between -clip and clip, as ONNX has it."""

    carry_names: ClassVar[tuple[str, ...]] = ("h",)
    """The parts of the carry."""

    @property
    def hidden_size(self) -> int:
        """Length of h, for one direction."""
        return self.size

    @property
    def output_size(self) -> int:
        """What the next layer reads: h, or both directions' h."""
        return self.hidden_size * len(self.directions)

    @property
    def directions(self) -> tuple[str, ...]:
        """Prefix of the weights of each direction that the layer runs in."""
        return ("", REVERSE) if self.direction == "bidirectional" else ("",)

    @property
    @abstractmethod
    def gates(self) -> tuple[str, ...]:
        """The blocks of `size` rows that the weights consist of, in order."""

    @property
    @abstractmethod
    def traced(self) -> tuple[str, ...]:
        """What a trace shows of the layer."""

    @property
    def carry_shapes(self) -> dict[str, Shape]:
        """Shape of each part of this layer's carry, for one session and one direction."""
        sizes = {"h": self.hidden_size, "c": self.size}
        return {name: (sizes[name],) for name in self.carry_names}

    @property
    def projection_size(self) -> int:
        """Length of a projected h; 0 where h is not projected."""
        return 0

    @property
    def options(self) -> dict[str, str]:
        """What model.toml says beside cell, size and projection, as text, defaults left out."""
        found = self.model_dump(exclude_defaults=True, exclude={"cell", "size", "projection"})
        return {key: _text(value) for key, value in found.items()}

    def weight_shapes(self, input_size: int) -> dict[str, Shape]:
        """Name (within the layer) and shape of each weight."""
        one = self._one_direction(input_size)
        if self.initial_state:
            one |= {f"initial_{name}": shape for name, shape in self.carry_shapes.items()}
        return {
            f"{prefix}{name}": shape for prefix in self.directions for name, shape in one.items()
        }

    def _one_direction(self, input_size: int) -> dict[str, Shape]:
        rows = len(self.gates) * self.size
        return {
            "weight_input": (rows, input_size),
            "weight_recurrent": (rows, self.hidden_size),
            "bias": (rows,),
        }


class RnnLayer(RecurrentLayer):
    """`cell = "rnn"`: Elman 1990."""

    cell: Literal["rnn"]
    nonlinearity: Literal["tanh", "relu"] = "tanh"

    @property
    def gates(self) -> tuple[str, ...]:
        """One block: what becomes h."""
        return ("h",)

    @property
    def traced(self) -> tuple[str, ...]:
        """See `RecurrentLayer.traced`."""
        return ("h",)


class GatedLayer(RecurrentLayer):
    """What `lstm` and `gru` have in common."""

    gate_activation: Literal["sigmoid", "hard_sigmoid"] = "sigmoid"
    """The gates' function: the logistic one, or clamp(slope * x + 0.5, 0, 1)."""
    hard_sigmoid_slope: Positive = HARD_SIGMOID_SLOPE

    @model_validator(mode="after")
    def _slope_has_a_use(self) -> Self:
        if "hard_sigmoid_slope" in self.model_fields_set and self.gate_activation == "sigmoid":
            raise ValueError(
                'hard_sigmoid_slope: only used with gate_activation = "hard_sigmoid"; remove it'
            )
        return self


class LstmLayer(GatedLayer):
    """`cell = "lstm"`: Hochreiter & Schmidhuber 1997 with the forget gate of Gers et al. 2000."""

    cell: Literal["lstm"]
    projection: Size | None = None
    """Length of h where it is projected down (LSTMP, Sak et al. 2014); else it is as long as c."""
    peepholes: tuple[Peephole, ...] = ()
    """Gates that see the cell state (Gers & Schmidhuber 2000)."""
    coupled: StrictBool = False
    """Whether the input gate is 1 - f (CIFG, Greff et al. 2015)."""

    carry_names: ClassVar[tuple[str, ...]] = ("h", "c")

    @field_validator("peepholes")
    @classmethod
    def _in_one_order(cls, peepholes: tuple[Peephole, ...]) -> tuple[Peephole, ...]:
        # So that the digest does not depend on the file's order.
        return tuple(sorted(peepholes, key=PEEPHOLES.index))

    @model_validator(mode="after")
    def _options_fit(self) -> Self:
        if self.projection is not None and self.projection >= self.size:
            raise ValueError(
                f"projection: found {self.projection}; expected less than the layer's size"
                f" {self.size}"
            )
        if len(set(self.peepholes)) != len(self.peepholes):
            twice = next(gate for gate in self.peepholes if self.peepholes.count(gate) > 1)
            raise ValueError(f"peepholes: duplicate {twice!r}")
        if self.coupled and "input" in self.peepholes:
            raise ValueError("peepholes: a coupled layer has no input gate; remove 'input'")
        return self

    @property
    def hidden_size(self) -> int:
        """Length of h, for one direction."""
        return self.size if self.projection is None else self.projection

    @property
    def projection_size(self) -> int:
        """See `RecurrentLayer.projection_size`."""
        return self.projection or 0

    @property
    def gates(self) -> tuple[str, ...]:
        """i, f, g, o; a coupled layer has no i."""
        return ("f", "g", "o") if self.coupled else ("i", "f", "g", "o")

    @property
    def traced(self) -> tuple[str, ...]:
        """See `RecurrentLayer.traced`; the i of a coupled layer is 1 - f."""
        return ("i", "f", "g", "o", "c", "h")

    def _one_direction(self, input_size: int) -> dict[str, Shape]:
        shapes = super()._one_direction(input_size)
        shapes |= {f"peephole_{gate}": (self.size,) for gate in self.peepholes}
        if self.projection is not None:
            shapes["weight_projection"] = (self.projection, self.size)
        return shapes


class GruLayer(GatedLayer):
    """`cell = "gru"`: Cho et al. 2014."""

    cell: Literal["gru"]
    reset: Literal["before", "after"] = "after"
    """Whether r scales h before its product (Cho; ONNX's default) or the product (PyTorch, cuDNN;
    ONNX's `linear_before_reset`)."""

    @property
    def gates(self) -> tuple[str, ...]:
        """r, z, n."""
        return ("r", "z", "n")

    @property
    def traced(self) -> tuple[str, ...]:
        """See `RecurrentLayer.traced`."""
        return ("r", "z", "n", "h")

    def _one_direction(self, input_size: int) -> dict[str, Shape]:
        shapes = super()._one_direction(input_size)
        if self.reset == "after":
            shapes["bias_recurrent"] = (self.size,)  # of n alone; elsewhere two biases are one
        return shapes


def _text(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(cast("tuple[str, ...]", value)) if isinstance(value, tuple) else str(value)


def _refuse_unknown_cell(value: object) -> object:
    if isinstance(value, dict) and "cell" in value:
        cell = cast("dict[str, object]", value)["cell"]
        if cell not in KNOWN_CELLS:
            raise ValueError(f"cell: found {shown(cell)}; expected one of {', '.join(KNOWN_CELLS)}")
    return cast("object", value)


Layer = Annotated[
    RnnLayer | LstmLayer | GruLayer,
    Field(discriminator="cell"),
    BeforeValidator(_refuse_unknown_cell),
]
"""Any kind of layer, told apart by `cell`."""

KNOWN_CELLS: Final = ("rnn", "lstm", "gru")
