"""What this protocol says where the native one would say something else.

Client code in the wild matches on these words. The reasons in the details are the native ones.
"""

from typing import Final

from conveyor_server.errors import (
    ConveyorError,
    InvalidField,
    ModelNotFound,
    NotSupported,
    SessionEnded,
    SessionNotFound,
)

CHARACTERS_SHOWN_MAX: Final = 128


class Refusal(InvalidField):
    """A request that is wrong in itself, in the words of this protocol."""

    def __init__(self, field: str, message: str) -> None:
        """`field` is the name in the protocol."""
        super().__init__(field, message)
        self.args = (message,)
        self.message = message


def shown(name: str) -> str:
    """What a client called something, for a message: cut where no name is that long."""
    return name[:CHARACTERS_SHOWN_MAX]


def unknown_model(name: str, version: int | None = None, hint: str = "") -> Refusal:
    """No such model, or no such version of it, takes requests; `hint`: what there is instead."""
    of_version = f" version {version}" if version is not None else ""
    instead = f"; {hint}" if hint else ""
    return Refusal(
        "model_name",
        f"Request for unknown model: '{shown(name)}'{of_version} is not found{instead}",
    )


def no_sequence_id(model: str) -> Refusal:
    """A model that keeps state was asked without saying of which sequence."""
    return Refusal(
        "sequence_id",
        f"inference request to model '{model}' must specify a non-zero or non-empty correlation ID",
    )


def not_started(model: str, sequence: int | str) -> Refusal:
    """The sequence was never begun, or it ended."""
    return Refusal(
        "sequence_start",
        f"inference request for sequence {sequence} to model '{model}' must specify the START flag"
        " on the first request of the sequence",
    )


def no_shared_memory(tensor: str) -> NotSupported:
    """A tensor was to be read from, or written to, shared memory."""
    return NotSupported(
        f"tensor '{tensor}': this server does not support shared memory; send tensors in messages"
    )


def translated(error: ConveyorError, model: str, sequence: int | str) -> ConveyorError:
    """What became of a request, in the words of this protocol."""
    if isinstance(error, SessionNotFound | SessionEnded):
        return not_started(model, sequence)
    if isinstance(error, ModelNotFound):
        return unknown_model(model, hint=error.hint)
    return error
