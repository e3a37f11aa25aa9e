"""Environment variables: which of them are the server's, and which only look like it.

A variable that nobody reads is silent, and a server without its tokens is open to everybody. So
whatever begins with CONVEYOR_, in any case, is a setting or is refused; only the variables that the
commands read themselves and those that Kubernetes makes of a Service are passed over.
"""

import difflib
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Final, cast

PREFIX: Final = "CONVEYOR_"
DELIMITER: Final = "__"
"""Between section and key."""
RESERVED: Final = frozenset(
    {
        "CONVEYOR_CA",
        "CONVEYOR_CERT",
        "CONVEYOR_CONFIG",
        "CONVEYOR_KEY",
        "CONVEYOR_METRICS",
        "CONVEYOR_TARGET",
        "CONVEYOR_TIMEOUT",
        "CONVEYOR_TLS",
        "CONVEYOR_TOKEN",
    }
)
"""Read by the commands themselves; a test holds this against their options."""
TOKENS: Final = "CONVEYOR_AUTH__TOKENS"
TOKENS_FORM: Final = '{"TOKEN": "PRINCIPAL"}'

_SERVICE: Final = r"CONVEYOR(?:_[A-Z0-9]+)*"
"""The name of a Service, `conveyor` or `conveyor-anything`, as Kubernetes writes it."""
_PORT: Final = rf"{_SERVICE}_PORT_\d+_(?:TCP|UDP|SCTP)"
_HOST: Final = r"[0-9A-Fa-f.:]+"
_NUMBER: Final = r"\d{1,5}"
_URL: Final = r"(?:tcp|udp|sctp)://\S+:\d{1,5}"
_KUBERNETES: Final = tuple(
    (re.compile(name), re.compile(value))
    for name, value in (
        (rf"{_SERVICE}_SERVICE_HOST", _HOST),
        (rf"{_SERVICE}_SERVICE_PORT(?:_[A-Z0-9]+)*", _NUMBER),
        (rf"{_SERVICE}_PORT", _URL),
        (_PORT, _URL),
        (rf"{_PORT}_ADDR", _HOST),
        (rf"{_PORT}_PORT", _NUMBER),
        (rf"{_PORT}_PROTO", "tcp|udp|sctp"),
    )
)
"""Names with their values: CONVEYOR_LISTEN_PORT=50051 is a mistake, and no Service."""

_BRAND: Final = PREFIX.rstrip("_")
_BRAND_LIKENESS: Final = 0.8
_NAME_LIKENESS: Final = 0.9
"""Ratios of difflib from which on another spelling can mean nothing else."""
_MAY_HOLD_TOKEN: Final = re.compile(r"(.*?(?:AUTH|TOKENS?)_+(?:TOKENS?_+)?)(.+)", re.IGNORECASE)


def environment_problems(
    variables: Mapping[str, str], settings: Mapping[str, Collection[str]]
) -> Iterator[str]:
    """Yields a line for each variable that is meant for the server and cannot be used.

    No line shows a value, nor a part of a name that may be a token.

    Args:
        variables: Names and values.
        settings: The keys of each section.
    """
    sections = {f"{PREFIX}{section}".upper(): section for section in settings}
    keys = {
        f"{PREFIX}{section}{DELIMITER}{key}".upper(): key
        for section, names in settings.items()
        for key in names
    }
    for name, value in sorted(variables.items()):
        if name == TOKENS:
            if _object(value) is None:
                yield f"{name}: not a JSON object; expected {TOKENS_FORM}"
        elif name in sections:
            given = _object(value)
            if given is None:
                yield (
                    f"{name}: not a JSON object; expected the keys of section {sections[name]},"
                    f" or a variable for each key: {name}{DELIMITER}KEY"
                )
            for key in other_case(given or (), settings[sections[name]]):
                yield f"{name}: unknown key {key}; did you mean {key.lower()}?"
        elif name not in keys.keys() | RESERVED and _is_meant(name, value, keys):
            yield _unknown(name, keys, sections)


def other_case(names: Iterable[str], known: Collection[str]) -> list[str]:
    """The names that are known in lower case only.

    pydantic-settings would take them, and drop one of two that differ in case.
    """
    return [name for name in names if name not in known and name.lower() in known]


def _object(value: str) -> dict[str, object] | None:
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return None
    return cast(dict[str, object], found) if isinstance(found, dict) else None


def _is_meant(name: str, value: str, keys: Iterable[str]) -> bool:
    """Whether a variable that is no setting looks as if it should be one."""
    upper = name.upper()
    if upper.startswith(PREFIX):
        return not any(
            names.fullmatch(name) and values.fullmatch(value) for names, values in _KUBERNETES
        )
    # With another prefix it may be another program's, or another server's (CONVEYOR2_): so the
    # prefix has to be close to ours, in letters, and the whole, with the delimiter between section
    # and key, close to the name of a setting.
    brand = re.split(r"[^A-Z0-9]", upper, maxsplit=1)[0]
    alike = brand.startswith(_BRAND) or _likeness(brand, _BRAND) >= _BRAND_LIKENESS
    if not (alike and brand.isalpha()):
        return False
    parts = upper.split(DELIMITER)
    names = [DELIMITER.join(parts[:length]) for length in range(2, len(parts) + 1)]
    return any(_likeness(each, key) >= _NAME_LIKENESS for each in names for key in keys)


def _likeness(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()


def _unknown(name: str, keys: Mapping[str, str], sections: Iterable[str]) -> str:
    held = _MAY_HOLD_TOKEN.fullmatch(name)
    if held is not None and not difflib.get_close_matches(held[2].upper(), ["TOKENS"]):
        return (
            f"{held[1]}...: unknown environment variable, cut off here as the rest may be a token;"
            f" tokens are given as a JSON object: {TOKENS}='{TOKENS_FORM}'"
        )
    brand = name[: len(name) - len(name.partition("_")[2].lstrip("_"))]
    # Nothing is nested deeper than a key; what stands below one is the user's own.
    parts = name.removeprefix(brand).split(DELIMITER)
    shown = DELIMITER.join(parts[:2])
    # Compared without the prefix, which would make all of them alike.
    stem = shown.upper()
    close = [variable for variable, key in keys.items() if key.upper() == stem]
    if not close:
        stems = {each.removeprefix(PREFIX): each for each in (*keys, *sections, *sorted(RESERVED))}
        close = [stems[each] for each in difflib.get_close_matches(stem, stems, n=1)]
    guess = f"; did you mean {close[0]}?" if close else ""
    cut = f"{DELIMITER}..." if len(parts) > 2 else ""
    return f"{brand}{shown}{cut}: unknown environment variable{guess}"
