"""The engine on tensors of a CUDA device that have no numbers, on a machine without one.

torch's fake tensors have a shape, a type and a device. An operation on tensors of different devices
raises as it would there, and so does one whose result's shape depends on the numbers, for which a
device has to be waited for. What goes from one side to the other is counted as it passes the
dispatcher.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from conveyor_server.engine.runner import ModelRunner

CUDA: Final = torch.device("cuda", 0)
TO_DEVICE, TO_HOST, SCALAR, WAIT = "to the device", "to the host", "a number read", "a wait"
_aten: Final = torch.ops.aten


class Crossings(TorchDispatchMode):
    """Counts what goes between host and device, and answers for the numbers that are not there.

    Attributes:
        seen: How often each kind happened.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[Any],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is _aten._local_scalar_dense.default:
            (source,) = args
            self.seen[SCALAR] += source.device.type == "cuda"
            # Whatever is asked is well: finite sums, all finite.
            return True if source.dtype == torch.bool else 0.0 if source.is_floating_point() else 0
        if func is _aten._to_copy.default:
            self.crossed(args[0].device, torch.device(kwargs.get("device") or args[0].device))
        elif func is _aten.copy_.default:
            self.crossed(args[1].device, args[0].device)
        return func(*args, **kwargs)

    def crossed(self, source: torch.device, target: torch.device) -> None:
        """A copy from one device to another."""
        if source.type != target.type:
            self.seen[TO_HOST if target.type == "cpu" else TO_DEVICE] += 1

    def to_numpy(self, values: Tensor, *, force: bool) -> npt.NDArray[Any]:
        """What `Tensor.numpy` gives: zeros."""
        if values.device.type == "cuda":
            assert force, "numpy() of a tensor on the device"
            self.seen[TO_HOST] += 1
        kind = torch.empty(0, dtype=values.dtype, device="meta")
        return np.zeros(tuple(values.shape), str(kind.dtype).removeprefix("torch."))


@contextmanager
def fake_cuda() -> Iterator[Crossings]:
    """Everything that is made inside is fake; tensors from outside are taken as they come.

    Compute in `torch.no_grad`: in its inference mode torch takes ways that pass fakes by.
    """
    crossings = Crossings()

    def waited(_: ModelRunner) -> None:
        crossings.seen[WAIT] += 1

    with pytest.MonkeyPatch.context() as patch:
        for name, replacement in _replacements(crossings).items():
            patch.setattr(Tensor, name, _for_fakes(getattr(Tensor, name), replacement))
        patch.setattr(ModelRunner, "_await_device", waited)
        with FakeTensorMode(allow_non_fake_inputs=True), crossings:
            yield crossings


def _for_fakes(real: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (fake if isinstance(self, FakeTensor) else real)(self, *args, **kwargs)

    return method


def _replacements(crossings: Crossings) -> dict[str, Callable[..., Any]]:
    """Methods that go by other ways than the dispatcher, or that want a real device on theirs."""

    def scalar(self: Tensor) -> Any:
        return _aten._local_scalar_dense.default(self)

    def set_items(self: Tensor, index: Any, values: Any) -> None:
        part = _select(self, index)
        if isinstance(values, Tensor):
            _aten.copy_.default(part, values)
        else:
            _aten.fill_.Scalar(part, values)

    return {
        "__getitem__": _select,
        "__setitem__": set_items,
        "__bool__": scalar,
        "__float__": scalar,
        "__int__": scalar,
        "item": scalar,
        "numpy": lambda self, *, force=False: crossings.to_numpy(self, force=force),
        "nonzero": _aten.nonzero.default,
        "cpu": lambda self: _aten._to_copy.default(self, device=torch.device("cpu")),
        "contiguous": lambda self: self if self.is_contiguous() else _aten.clone.default(self),
    }


def _select(values: Tensor, index: Any) -> Tensor:
    """Indexing by numbers, slices, None and tensors, as so many calls of the dispatcher."""
    dim = 0
    for each in index if isinstance(index, tuple) else (index,):
        if each is None:
            values = _aten.unsqueeze.default(values, dim)
        elif isinstance(each, slice):
            assert each.step in (None, 1), each
            values = _aten.slice.Tensor(values, dim, each.start, each.stop)
        elif isinstance(each, Tensor):
            values = _aten.index.Tensor(values, [None] * dim + [each])
        else:
            values = _aten.select.int(values, dim, int(each))
            continue
        dim += 1
    return values
