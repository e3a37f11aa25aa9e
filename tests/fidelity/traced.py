"""Traces, unpacked."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from conveyor_server.core import Trace

Parts = dict[str, npt.NDArray[np.float32]]
"""By "LAYER.GATE" or "attention": a row for each step."""


def parts_of(trace: Trace | None) -> Parts:
    """Everything in a trace; nothing if there is none."""
    if trace is None:
        return {}
    found = {
        f"{layer.layer}.{gate.name}": _rows(gate.values, trace.steps)
        for layer in trace.layers
        for gate in layer.gates
    }
    if trace.attention:
        found["attention"] = _rows(trace.attention, trace.steps)
        assert found["attention"].shape[1] == trace.attention_columns
    return found


def _rows(values: bytes, steps: int) -> npt.NDArray[np.float32]:
    return np.frombuffer(values, dtype=np.float32).reshape(steps, -1)


def cut(parts: Parts, begin: int, end: int) -> dict[str, bytes]:
    """The bits of some of the steps."""
    return {name: rows[begin:end].tobytes() for name, rows in parts.items()}
