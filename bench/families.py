"""Every cell family beside the plain LSTM, both on the engine alone, in this process.

One layer of 256 on 256 features, 32 sessions, one step of each a call. What is compared is
processor time, see `bench.contenders`.
"""

from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import torch

from bench.contenders import measured_round
from bench.model import SIZE
from bench.result import Line, Measured, Target
from conveyor_models import Bundle, ModelSpec, digest_of
from conveyor_server.core import ModelKey
from conveyor_server.engine.engine import TorchEngine
from conveyor_server.engine.port import Work

SESSIONS: Final = 32
MEMORY_ROWS: Final = 64
MEMORY_SIZE: Final = 64

_SAME_CLASS: Final = (Target("steps/s", "at least", 0.8),)
"""At most 1.25 times the plain LSTM's time."""
_NOT_SLOWER: Final = (Target("steps/s", "at least", 1.0),)
_PLAIN: Final = {"cell": "lstm"}
_FAMILIES: Final[tuple[tuple[str, dict[str, Any], tuple[Target, ...]], ...]] = (
    ("LSTM, 3 peepholes", {"peepholes": ["input", "forget", "output"]}, _SAME_CLASS),
    ("LSTM, coupled", {"coupled": True}, _NOT_SLOWER),
    ("GRU, reset after", {"cell": "gru", "reset": "after"}, _NOT_SLOWER),
    ("GRU, reset before", {"cell": "gru", "reset": "before"}, _NOT_SLOWER),
    ("RNN, tanh", {"cell": "rnn"}, _SAME_CLASS),
    ("RNN, relu", {"cell": "rnn", "nonlinearity": "relu"}, _SAME_CLASS),
)


def run(*, rounds: int, seconds: float, say: Callable[[str], None]) -> list[Line]:
    """Measures every family; each round of each takes a tenth of ``seconds``."""
    lines: list[Line] = []
    attention = {"memory_size": MEMORY_SIZE, "size": MEMORY_SIZE}
    for name, options, targets in _FAMILIES:
        say(name)
        lines.append(_measure(name, _runner(_PLAIN | options), rounds, seconds / 10, targets))
    say("attention")
    name = f"LSTM, attention over {MEMORY_ROWS} rows"
    lines.append(_measure(name, _runner(_PLAIN, attention), rounds, seconds / 10, ()))
    return lines


def _measure(
    name: str,
    call: Callable[[], object],
    rounds: int,
    seconds: float,
    targets: tuple[Target, ...],
) -> Line:
    plain = _runner(_PLAIN)
    found: tuple[list[Measured], list[Measured]] = ([], [])
    for _ in range(rounds):
        for each, kept in zip((call, plain), found, strict=True):
            kept.append(measured_round(each, SESSIONS, seconds))
    title = f"{name}, {SESSIONS} x 1 step"
    return Line(title, "conveyor", "plain LSTM", *found, targets)


def _runner(layer: dict[str, Any], attention: dict[str, Any] | None = None) -> Callable[[], object]:
    """One engine call for all sessions, again and again."""
    tables: dict[str, Any] = {
        "schema": 1,
        "name": "family",
        "input": {"kind": "features", "size": SIZE},
        "layers": [{"size": SIZE} | layer],
    }
    if attention is not None:
        tables["attention"] = attention
    spec = ModelSpec.model_validate(tables)
    generator = torch.Generator().manual_seed(1)
    weights = {
        name: torch.randn(shape, generator=generator) * SIZE**-0.5
        for name, shape in spec.weight_shapes.items()
    }
    bundle = Bundle(spec, MappingProxyType(weights), digest_of(spec, weights), Path())
    engine = TorchEngine(torch.device("cpu"), cpu_threads=1, slots=SESSIONS)
    key = ModelKey(spec.name, spec.version)
    engine.add(key, engine.prepare(bundle))
    random = np.random.default_rng(2)
    works: list[Work] = []
    for _ in range(SESSIONS):
        slot, memory = engine.acquire(key), 0
        assert slot is not None
        if attention is not None:
            rows = random.standard_normal((MEMORY_ROWS, MEMORY_SIZE), dtype=np.float32)
            memory = engine.add_memory(key, rows.tobytes())
        row = random.standard_normal(SIZE, dtype=np.float32).tobytes()
        works.append(Work(slot, 1, row, 1, memory))
    return lambda: engine.run(key, works)
