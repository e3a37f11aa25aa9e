"""The checks of single fields: names, ids, labels, sizes of lists, words of an enum."""

from collections.abc import Mapping
from typing import Final, TypeVar

from conveyor_server.core import SESSION_ID, Durability, OpenMode
from conveyor_server.errors import InvalidField, ModelNotFound, limit_text

MODEL_NAME_CHARACTERS_MAX: Final = 128
LABEL_KEY_CHARACTERS_MAX: Final = 64
LABEL_VALUE_CHARACTERS_MAX: Final = 256
SHOWN_CHARACTERS_MAX: Final = 40
PAGE_SIZE_DEFAULT: Final = 100
PAGE_SIZE_MAX: Final = 1000

E = TypeVar("E", OpenMode, Durability)


def check_session_id(session_id: str, field: str = "session_id") -> None:
    """Raises `InvalidField` unless it is a well-formed session id."""
    if not SESSION_ID.fullmatch(session_id):
        found = (
            "is empty" if not session_id else f"{session_id[:SHOWN_CHARACTERS_MAX]!r} is not an id"
        )
        raise InvalidField(field, f"{found}; expected 1 to 128 characters of A-Z a-z 0-9 . _ : -")


def check_model_name(name: str) -> None:
    """Raises `ModelNotFound` for what is too long to be one, without repeating it."""
    if len(name) > MODEL_NAME_CHARACTERS_MAX:
        raise ModelNotFound(
            f"there is no model with a name of {len(name):,} characters; names have at most"
            f" {MODEL_NAME_CHARACTERS_MAX}"
        )


def sorted_labels(labels: Mapping[str, str], labels_max: int) -> tuple[tuple[str, str], ...]:
    """The labels of a session, in the order of their keys.

    Raises:
        InvalidField: There are too many, a key is empty, or a key or a value is too long.
    """
    if len(labels) > labels_max:
        bound = limit_text("limits.labels_max", labels_max)
        raise InvalidField("labels", f"has {len(labels):,} labels, more than the limit ({bound})")
    for key, value in labels.items():
        if not 1 <= len(key) <= LABEL_KEY_CHARACTERS_MAX:
            raise InvalidField(
                "labels",
                f"a key has {len(key):,} characters; expected 1 to {LABEL_KEY_CHARACTERS_MAX}",
            )
        if len(value) > LABEL_VALUE_CHARACTERS_MAX:
            raise InvalidField(
                "labels",
                f"the value of {key!r} has {len(value):,} characters; expected at most"
                f" {LABEL_VALUE_CHARACTERS_MAX}",
            )
    return tuple(sorted(labels.items()))


def page_size(wanted: int) -> int:
    """The size of a list's page.

    Raises:
        InvalidField: Below 0.
    """
    if wanted < 0:
        raise InvalidField("page_size", f"is {wanted}; expected 0 or more")
    return min(wanted or PAGE_SIZE_DEFAULT, PAGE_SIZE_MAX)


def member(kind: type[E], value: int, field: str) -> E:
    """The member of an enum that a number from the wire stands for.

    Raises:
        InvalidField: There is none.
    """
    try:
        return kind(value)
    except ValueError as error:
        raise InvalidField(field, f"{value} is not one of its values") from error
