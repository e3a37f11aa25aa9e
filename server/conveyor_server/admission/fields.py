"""The checks of single fields: names, ids, labels, sizes of lists, words of an enum."""

from collections.abc import Mapping
from typing import Final, TypeVar

from conveyor_server.core import SESSION_ID, Durability, OpenMode
from conveyor_server.errors import InvalidField, ModelNotFound

MODEL_NAME_CHARACTERS_MAX: Final = 128
LABEL_KEY_CHARACTERS_MAX: Final = 64
LABEL_VALUE_CHARACTERS_MAX: Final = 256
PAGE_SIZE_DEFAULT: Final = 100
PAGE_SIZE_MAX: Final = 1000

E = TypeVar("E", OpenMode, Durability)


def check_session_id(session_id: str, field: str = "session_id") -> None:
    """Raises `InvalidField` unless it is a well-formed session id."""
    if not SESSION_ID.fullmatch(session_id):
        raise InvalidField(field, "not 1 to 128 characters of A-Z a-z 0-9 . _ : -")


def check_model_name(name: str) -> None:
    """Raises `ModelNotFound` for what is too long to be one, without repeating it."""
    if len(name) > MODEL_NAME_CHARACTERS_MAX:
        raise ModelNotFound("there is no model of that name")


def sorted_labels(labels: Mapping[str, str], labels_max: int) -> tuple[tuple[str, str], ...]:
    """The labels of a session, in the order of their keys.

    Raises:
        InvalidField: There are too many, a key is empty, or a key or a value is too long.
    """
    if len(labels) > labels_max:
        raise InvalidField("labels", f"more than {labels_max} of them")
    for key, value in labels.items():
        if not 1 <= len(key) <= LABEL_KEY_CHARACTERS_MAX:
            raise InvalidField("labels", "a key is empty or too long")
        if len(value) > LABEL_VALUE_CHARACTERS_MAX:
            raise InvalidField("labels", "a value is too long")
    return tuple(sorted(labels.items()))


def page_size(wanted: int) -> int:
    """The size of a list's page.

    Raises:
        InvalidField: Below 0.
    """
    if wanted < 0:
        raise InvalidField("page_size", "below 0")
    return min(wanted or PAGE_SIZE_DEFAULT, PAGE_SIZE_MAX)


def member(kind: type[E], value: int, field: str) -> E:
    """The member of an enum that a number from the wire stands for.

    Raises:
        InvalidField: There is none.
    """
    try:
        return kind(value)
    except ValueError as error:
        raise InvalidField(field, "not a known value") from error
