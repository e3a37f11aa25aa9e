"""Drawing the next token, reproducibly.

The random number of a step is a function of (seed, step) alone, from a counter-based generator
(Philox, Salmon et al. 2011): a run can be taken up at any step, on any server, and draws the same.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: 0 takes the most probable token; 1 the model's own distribution.
        top_k: Draw among the k most probable; 0: among all.
        seed: Of the random numbers; 64 bits.
    """

    temperature: float = 0.0
    top_k: int = 0
    seed: int = 0

    def draw(self, row: bytes, activation: str, step: int) -> int:
        """Draws a token from one output row, float32 [vocabulary], after that activation."""
        values = np.frombuffer(row, dtype="<f4")
        if self.temperature == 0:
            return int(values.argmax())
        logits = _logits(values, activation) / self.temperature
        if 0 < self.top_k < len(logits):
            # Ties at the edge go to the lower token, so that the choice is the same everywhere.
            kept = np.lexsort((np.arange(len(logits)), -logits))[: self.top_k]
            masked = np.full_like(logits, -np.inf)
            masked[kept] = logits[kept]
            logits = masked
        weights = np.exp(logits - logits.max())
        cumulative: npt.NDArray[np.float64] = np.cumsum(weights)
        point = uniform(self.seed, step) * float(cumulative[-1])
        return int(min(np.searchsorted(cumulative, point, side="right"), len(weights) - 1))


def uniform(seed: int, step: int) -> float:
    """The random number of a step, in [0, 1)."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=step)).random())


def _logits(values: npt.NDArray[np.float32], activation: str) -> npt.NDArray[np.float64]:
    wide = values.astype(np.float64)
    if activation == "softmax":
        with np.errstate(divide="ignore"):
            return np.log(wide)
    return wide
