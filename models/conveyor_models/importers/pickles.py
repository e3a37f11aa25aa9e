"""What the pickle in a file of torch.save would do, found out without doing it.

torch's unpickler for weights calls nothing that harms, but some of what it calls makes an object of
any size out of a few bytes. Here the pickle is followed step by step on a stack of placeholders.
"""

from __future__ import annotations

import pickletools
from pathlib import Path
from typing import Any, Final

from conveyor_models.errors import ImportFileError
from conveyor_models.importers.foreign import class_in_pickle, pickle_advice

STEPS_MAX: Final = 2_000_000
"""A state dict takes about fifty for each tensor. Copying a container counts as all steps before,
for it holds no more than they made."""
_MAKES_ANY_SIZE: Final = frozenset(
    {
        "__builtin__.bytearray",
        "_codecs.encode",
        "builtins.bytearray",
        "torch.storage.TypedStorage",
        "torch.storage.UntypedStorage",
    }
)
_COPIES: Final = frozenset(
    {"builtins.set", "collections.Counter", "collections.OrderedDict", "torch.Size"}
)
_REBUILDS: Final = tuple(
    f"torch._utils._rebuild_{what}"
    for what in (
        "meta_tensor_no_storage",
        "parameter",
        "parameter_with_state",
        "qtensor",
        "sparse_tensor",
        "tensor",
        "tensor_v2",
        "tensor_v3",
    )
)
_EMPTY: Final = "()"
_OTHER: Final = ""


def check_pickle(path: Path, entry: str, pickled: bytes) -> None:
    """Refuses a pickle that makes more than tensors in the file, or takes too long.

    Args:
        path: of the file, for messages.
        entry: of the zip.
        pickled: its content.

    Raises:
        ImportFileError: it does, or it is damaged.
    """
    cost = 0
    followed = _Stack()
    try:
        for step, (opcode, argument, _) in enumerate(pickletools.genops(pickled), 1):
            cost += 1
            called = followed.take(opcode, argument)
            if opcode.name == "GLOBAL" and _needless(followed.top):
                raise ImportFileError(_advice(path, entry, pickled, followed.top), path=path)
            if called in _COPIES:
                cost += step
            if cost > STEPS_MAX:
                raise ImportFileError(
                    f"{entry}: takes more than {STEPS_MAX} steps, expected about 50 for each"
                    " tensor; save module.state_dict() alone",
                    path=path,
                )
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        said = str(error)[:200]
        raise ImportFileError(
            f"cannot be read as a state dict: {entry} is damaged: {said}", path=path
        ) from error


def _advice(path: Path, entry: str, pickled: bytes, name: str) -> str:
    """What is said of a name that weights never need."""
    if class_in_pickle(pickled) is not None:
        return pickle_advice(path, pickled)
    return (
        f"{entry}: names {name[:200]}, which makes tensors or bytes that are not in the file and"
        " which no state dict needs; save module.state_dict() alone"
    )


def _needless(name: str) -> bool:
    """Whether torch's unpickler takes it and weights never need it.

    What that unpickler does not take is left to it, for its refusal is told with advice.
    """
    if name.startswith(("torch._utils._rebuild_", "torch._tensor._rebuild_")):
        return name not in _REBUILDS
    return name in _MAKES_ANY_SIZE or (name.startswith("torch.") and name.endswith("Tensor"))


class _Stack:
    """The unpickler's stack and memo: names of what is called, and placeholders."""

    def __init__(self) -> None:
        self._values: list[Any] = []
        self._memo: dict[int, Any] = {}

    @property
    def top(self) -> str:
        return self._values[-1]

    def take(self, opcode: pickletools.OpcodeInfo, argument: Any) -> str:
        """Follows one step; what it calls, unless it calls nothing or without arguments."""
        name = opcode.name
        if name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self._memo[argument] = self._values[-1]
            return _OTHER
        called = _OTHER
        if name == "REDUCE" and self._values[-1] != _EMPTY:
            called = self._values[-2]
        self._pop(opcode)
        for made in opcode.stack_after:
            self._values.append(pickletools.markobject if made is pickletools.markobject else "")
        if name == "GLOBAL":
            self._values[-1] = str(argument).replace(" ", ".", 1)
        elif name == "EMPTY_TUPLE":
            self._values[-1] = _EMPTY
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            self._values[-1] = self._memo[argument]
        return called

    def _pop(self, opcode: pickletools.OpcodeInfo) -> None:
        before = opcode.stack_before
        if pickletools.markobject in before:
            while self._values.pop() is not pickletools.markobject:
                pass
            before = before[: before.index(pickletools.markobject)]
        for _ in before:
            self._values.pop()
