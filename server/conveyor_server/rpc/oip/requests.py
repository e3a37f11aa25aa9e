"""What a ModelInferRequest asks for, apart from its tensors."""

import hashlib
import re
from dataclasses import dataclass
from typing import Any, Final

from conveyor.oip import inference_pb2
from conveyor_server.rpc.oip.refusals import Refusal

SEQUENCE_ID_CHARACTERS_MAX: Final = 128
_PLAIN: Final = re.compile(r"[A-Za-z0-9._:-]{1,48}")
"""What stands in a session's id as it is; model names have at most 63 characters."""
_DIGEST_CHARACTERS: Final = 40
_VERSION: Final = re.compile(r"[0-9]{1,18}")
_UINT64: Final = 2**64


@dataclass(slots=True, eq=False)
class Asked:
    """One request."""

    model: str
    version: int | None
    """None: the newest, or the one that the sequence is on."""
    request_id: str
    session_id: str
    """Of the sequence; empty: none is named."""
    sequence: int | str
    """As the client named it; a number without its sign."""
    start: bool
    end: bool
    timeout_seconds: float | None


def read(message: inference_pb2.ModelInferRequest) -> Asked:
    """Takes a request apart; parameters without a meaning here are passed over.

    Raises:
        Refusal: A version or a parameter is not of its type.
    """
    asked = unread(message)
    if message.model_version:
        asked.version = version_of(message.model_version)
    parameters = message.parameters
    if "sequence_id" in parameters:
        asked.session_id, asked.sequence = _sequence(asked.model, parameters["sequence_id"])
    if "sequence_start" in parameters:
        asked.start = _flag(parameters["sequence_start"], "sequence_start")
    if "sequence_end" in parameters:
        asked.end = _flag(parameters["sequence_end"], "sequence_end")
    if "timeout" in parameters:
        asked.timeout_seconds = _timeout_seconds(parameters["timeout"])
    return asked


def unread(message: inference_pb2.ModelInferRequest) -> Asked:
    """As much of a request as answering it takes, whatever else is wrong with it."""
    return Asked(message.model_name, None, message.id, "", "", False, False, None)


def version_of(text: str) -> int:
    """A version as this protocol writes it.

    Raises:
        Refusal: Not a decimal number.
    """
    if not _VERSION.fullmatch(text):
        raise Refusal(
            "model_version",
            f"failed to get model version from the version string '{text[:20]}': expected a number",
        )
    return int(text)


def session_id_of(model: str, sequence: int | str) -> str:
    """The session that a sequence is.

    Numbers and texts are told apart, and so are the sequences of different models: in this protocol
    each model counts its own. A number is taken modulo 2**64, as C++ clients send theirs cast to
    a signed one. A text that cannot stand in a session's id is replaced by a digest.
    """
    if isinstance(sequence, int):
        return f"oip.i:{model}:{sequence % _UINT64}"
    if _PLAIN.fullmatch(sequence):
        return f"oip.s:{model}:{sequence}"
    digest = hashlib.sha256(sequence.encode()).hexdigest()[:_DIGEST_CHARACTERS]
    return f"oip.h:{model}:{digest}"


def _sequence(model: str, value: inference_pb2.InferParameter) -> tuple[str, int | str]:
    """The session's id and the sequence's own; both empty for the ids that mean none."""
    sequence: int | str
    if (number := value.int64_param) > 0:  # by far the most
        return f"oip.i:{model}:{number}", number
    match value.WhichOneof("parameter_choice"):
        case "int64_param":
            sequence = value.int64_param % _UINT64
        case "string_param":
            sequence = value.string_param
            if len(sequence) > SEQUENCE_ID_CHARACTERS_MAX:
                raise Refusal(
                    "sequence_id",
                    f"parameter 'sequence_id' has more than {SEQUENCE_ID_CHARACTERS_MAX}"
                    " characters",
                )
        case "uint64_param":
            sequence = value.uint64_param
        case _:
            raise Refusal("sequence_id", "parameter 'sequence_id' must be an integer or a string")
    return (session_id_of(model, sequence), sequence) if sequence else ("", "")


def _flag(value: inference_pb2.InferParameter, name: str) -> bool:
    if not value.HasField("bool_param"):
        raise Refusal(name, f"parameter '{name}' must be a bool")
    return value.bool_param


def _timeout_seconds(value: inference_pb2.InferParameter) -> float | None:
    """Microseconds within which a request has to begin; 0: any time will do."""
    choice: Any = value.WhichOneof("parameter_choice")
    if choice not in ("int64_param", "uint64_param") or getattr(value, choice) < 0:
        raise Refusal("timeout", "parameter 'timeout' must be an integer of at least 0")
    return getattr(value, choice) / 1e6 or None
