"""The engine on a CUDA device beside cuDNN, in this process.

The comparators are torch's own module, called as usual, and captured once in a CUDA graph that is
replayed. Both are given tensors that lie on the device already and leave their outputs there; the
engine is given and gives back bytes. TF32 is off for all, all compute the same numbers, which is
checked first, and every call is timed until the device is done with it.
"""

from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor, nn

from bench.contenders import CALLS_WARM, Contender, Rows, conveyor, measure, random_input
from bench.result import Line
from conveyor_models import Bundle, ModelSpec, digest_of, weights_from_torch
from conveyor_server.engine.devices import find_device

SHAPES: Final = (
    ("lstm", 256, 1, 1),
    ("lstm", 256, 16, 1),
    ("lstm", 256, 64, 1),
    ("lstm", 256, 256, 1),
    ("lstm", 256, 4096, 1),
    ("lstm", 256, 64, 16),
    ("lstm", 1024, 1, 1),
    ("lstm", 1024, 256, 1),
    ("lstm", 1024, 4096, 1),
    ("gru", 256, 64, 1),
)
"""Cell, units (as many as features), sessions and steps of each in a call."""
_MODULES: Final[dict[str, type[nn.LSTM] | type[nn.GRU]]] = {"lstm": nn.LSTM, "gru": nn.GRU}


class NoDevice(Exception):
    """There is no CUDA device that can be used."""


def run(*, rounds: int, seconds: float, say: Callable[[str], None]) -> list[Line]:
    """Measures every shape; each round of each contender takes a tenth of ``seconds``.

    Raises:
        NoDevice: Before anything else.
    """
    choice = find_device("auto")
    if choice.device.type != "cuda":
        raise NoDevice(choice.passed_over or "torch.cuda.is_available() is False")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    lines: list[Line] = []
    with torch.no_grad():
        for cell, size, sessions, steps in SHAPES:
            name = _name(cell, size, sessions, steps)
            say(name)
            lines += measure(
                name,
                contenders(cell, size, random_input(steps, sessions, size), choice.device),
                sessions * steps,
                rounds=rounds,
                seconds=seconds / 10,
                by_clock=True,
            )
    return lines


def _name(cell: str, size: int, sessions: int, steps: int) -> str:
    return f"{cell.upper()} of {size} on CUDA, {sessions} x {steps} step{'s' if steps > 1 else ''}"


def contenders(cell: str, size: int, x: Rows, device: torch.device) -> list[Contender]:
    """All that run a layer on this device; on a CPU there are no graphs."""
    module = _module(cell, size)
    ours = conveyor(_bundle(cell, module), x, device)
    module.to(device)
    found = [ours, eager(module, x, device)]
    return [*found, captured(module, x, device)] if device.type == "cuda" else found


def _module(cell: str, size: int) -> nn.LSTM | nn.GRU:
    """Random weights of a fixed seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(20250101)
        return _MODULES[cell](size, size)


def _bundle(cell: str, module: nn.LSTM | nn.GRU) -> Bundle:
    """The same layer for the engine. Call it while the module is still on the host."""
    tables: dict[str, Any] = {
        "schema": 1,
        "name": "cuda",
        "input": {"kind": "features", "size": module.input_size},
        "layers": [{"cell": cell, "size": module.hidden_size}],
    }
    spec = ModelSpec.model_validate(tables)
    weights = weights_from_torch(module)
    return Bundle(spec, MappingProxyType(weights), digest_of(spec, weights), Path())


def _zero_carry(module: nn.LSTM | nn.GRU, x: Tensor) -> Any:
    h = x.new_zeros(1, x.shape[1], module.hidden_size)
    return (h, h.clone()) if isinstance(module, nn.LSTM) else h


def eager(module: nn.LSTM | nn.GRU, x: Rows, device: torch.device) -> Contender:
    """The module, called."""
    rows = torch.from_numpy(x).to(device)
    carry = _zero_carry(module, rows)

    def call() -> Tensor:
        nonlocal carry
        y, carry = module(rows, carry)
        _wait(device)
        return y

    return Contender(f"nn.{type(module).__name__}", call, _output)


def captured(module: nn.LSTM | nn.GRU, x: Rows, device: torch.device) -> Contender:
    """The module in a graph that carries its state from replay to replay."""
    rows = torch.from_numpy(x).to(device)
    carry = _zero_carry(module, rows)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(CALLS_WARM):  # cuDNN plans and allocates, which no graph may hold
            module(rows, carry)
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, after = module(rows, carry)
        for old, new in zip(_parts(carry), _parts(after), strict=True):
            old.copy_(new)

    def replay() -> Tensor:
        graph.replay()
        _wait(device)
        return y

    return Contender(f"nn.{type(module).__name__} in a graph", replay, _output)


def _parts(carry: Any) -> tuple[Tensor, ...]:
    return carry if isinstance(carry, tuple) else (carry,)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def _output(y: Tensor) -> Rows:
    return y.cpu().numpy()
