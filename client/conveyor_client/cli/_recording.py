"""The last steps that were watched, and how people read their inputs and outputs."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from conveyor_client._nouns import FloatArray, ModelInfo
from conveyor_client._trace import Trace

Row = npt.NDArray[np.float32 | np.int32]

STEPS_KEPT_MAX = 4096
BYTES_KEPT_MAX = 256 * 1024 * 1024
_OVERHEAD_BYTES = 1024  # of the objects around one gate of one step

_SEEN = {" ": "␣", "\n": "⏎", "\r": "␍", "\t": "⇥"}


def symbol(label: str) -> str:
    """A label as it can be printed anywhere: no space, no line end, no control character."""
    return "".join(_SEEN.get(c, c if c.isprintable() else "·") for c in label) or "·"


@dataclass(frozen=True, slots=True)
class Seen:
    """One step.

    Attributes:
        input: The row: int32 of shape () for a token, else float32 of shape (D,).
        output: The row, (O,).
        trace: Of this step alone.
    """

    input: Row
    output: FloatArray
    trace: Trace

    @property
    def step(self) -> int:
        """Its number."""
        return self.trace.first_step


class Recording:
    """The newest steps of a session, bounded in steps and in bytes."""

    def __init__(
        self, model: ModelInfo, *, steps_max: int = STEPS_KEPT_MAX, bytes_max: int = BYTES_KEPT_MAX
    ) -> None:
        self.model = model
        self.names = Names(model)
        self.seen = 0
        self._steps_max = steps_max
        self._bytes_max = bytes_max
        self._kept: deque[Seen] = deque()
        self._kept_bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, seen: Seen) -> None:
        """Takes one step more, and drops the oldest ones beyond the bounds."""
        self.seen += 1
        self._kept.append(seen)
        self._kept_bytes += _size_bytes(seen)
        while len(self._kept) > self._steps_max or (
            self._kept_bytes > self._bytes_max and len(self._kept) > 1
        ):
            self._kept_bytes -= _size_bytes(self._kept.popleft())

    def last(self, steps: int) -> "Span":
        """The newest steps, put together.

        Args:
            steps: At most so many, at least 1; there must be one.
        """
        newest = [self._kept[-n] for n in range(min(steps, len(self._kept)), 0, -1)]
        return Span(self.model, self.names, newest)

    def whole(self) -> "Span":
        """All steps that are kept."""
        return self.last(len(self._kept))


class Span:
    """Consecutive steps as arrays.

    Attributes:
        trace: Of all of them.
        inputs: (K,) tokens or (K, D).
        outputs: (K, O).
    """

    def __init__(self, model: ModelInfo, names: "Names", steps: Sequence[Seen]) -> None:
        self.model = model
        self.names = names
        self.trace = Trace.joined([seen.trace for seen in steps])
        self.inputs: Row = np.stack([seen.input for seen in steps])
        self.outputs: FloatArray = np.stack([seen.output for seen in steps])

    def __len__(self) -> int:
        return len(self.trace)

    @property
    def first_step(self) -> int:
        """The number of its first step."""
        return self.trace.first_step

    @property
    def last_step(self) -> int:
        """The number of its last step."""
        return self.trace.first_step + len(self) - 1

    @property
    def letters(self) -> list[str] | None:
        """What was read, one symbol for each step; None where features were."""
        if not self.model.input.is_tokens:
            return None
        return [self.names.token(int(token)) for token in self.inputs]

    @property
    def probabilities(self) -> FloatArray | None:
        """The outputs as probabilities, (K, O); None where they are none."""
        return probabilities(self.model, self.outputs)


class Names:
    """What the inputs and outputs of a model are called."""

    def __init__(self, model: ModelInfo) -> None:
        same = model.input.is_tokens and model.output.row_elements == model.input.vocabulary_size
        outputs = model.output.labels or (model.input.labels if same else ())
        self.inputs = [symbol(label) for label in model.input.labels]
        self.outputs = [symbol(label) for label in outputs]
        self.feeds_back = same
        """Whether an output says which token comes next."""

    def token(self, token: int) -> str:
        """A token's symbol, or its number where it has none."""
        return self.inputs[token] if token < len(self.inputs) else str(token)

    def output(self, index: int) -> str:
        """An output's symbol, or its number where it has none."""
        return self.outputs[index] if index < len(self.outputs) else str(index)

    def features(self, row: FloatArray) -> list[str]:
        """A row of features, each with its name."""
        return [
            f"{self.inputs[n]} {value:.4g}" if n < len(self.inputs) else f"{value:.4g}"
            for n, value in enumerate(row.tolist())
        ]

    def values(self, row: FloatArray) -> list[str]:
        """A row of outputs, each with its name."""
        return [
            f"{self.outputs[n]} {value:.4g}" if n < len(self.outputs) else f"{value:.4g}"
            for n, value in enumerate(row.tolist())
        ]


def probabilities(model: ModelInfo, outputs: FloatArray) -> FloatArray | None:
    """Outputs as probabilities; None where the model makes none."""
    if model.output_activation == "log_softmax":
        return np.exp(outputs)
    return outputs if model.output_activation == "softmax" else None


def _size_bytes(seen: Seen) -> int:
    gates = [gate for layer in seen.trace.layers for gate in layer]
    values = sum(gate.values.nbytes for gate in gates if gate.values is not None)
    attention = 0 if seen.trace.attention is None else seen.trace.attention.nbytes
    rows = seen.input.nbytes + seen.output.nbytes
    return values + attention + rows + (len(gates) + 1) * _OVERHEAD_BYTES
