"""Writes the page of the client's public names; mkdocstrings fills in their docstrings."""

import inspect
from collections.abc import Sequence
from typing import Final

import conveyor_client
from conveyor_client import aio

NAME: Final = "client.md"
BLOCKING: Final = ("Client", "Session", "Generation")
CHOICES: Final = ("Options", "Reconnect", "Tls")


def page() -> str:
    """The whole page, with every name that `conveyor_client` exports."""
    names = [name for name in conveyor_client.__all__ if name not in (*BLOCKING, *CHOICES, "aio")]
    errors = [name for name in names if _is_error(name)]
    errors.sort(key=lambda name: len(inspect.getmro(getattr(conveyor_client, name))))
    nouns = [name for name in names if name not in errors]
    return "\n\n".join(
        [
            "# The client",
            "Everything here is imported from `conveyor_client`. `conveyor_client.aio` has the"
            " asynchronous client, `conveyor_client` itself its blocking twin with the same"
            " methods. [Using the client](../guides/client.md) is the guide.",
            *_section("Asynchronous", "conveyor_client.aio", aio.__all__, whole=True),
            "## Blocking",
            *(part for name in BLOCKING for part in _twin(name)),
            *_section("Choices", "conveyor_client", CHOICES, whole=True),
            *_section("What comes back", "conveyor_client", nouns),
            *_section("Errors", "conveyor_client", errors[:1], whole=True),
            *(_directive("conveyor_client", name) for name in errors[1:]),
        ]
    )


def _section(title: str, module: str, names: Sequence[str], *, whole: bool = False) -> list[str]:
    return [f"## {title}", *(_directive(module, name, whole=whole) for name in names)]


def _directive(module: str, name: str, *, whole: bool = False) -> str:
    """``whole``: with its members, which of a dataclass are in the docstring of the class."""
    hidden = ("members", "inherited_members", "merge_init_into_class")
    options = "".join(f"\n      {option}: false" for option in hidden)
    return f"::: {module}.{name}" + ("" if whole else f"\n    options:{options}")


def _twin(name: str) -> list[str]:
    """A blocking class, and links to what its methods do."""
    asynchronous = getattr(aio, name)
    links = [
        f"[`{member}`][conveyor_client.aio.{name}.{member}]"
        for member in dir(getattr(conveyor_client, name))
        if not member.startswith("_") and hasattr(asynchronous, member)
    ]
    return [_directive("conveyor_client", name), f"It has: {', '.join(links)}."]


def _is_error(name: str) -> bool:
    value = getattr(conveyor_client, name)
    return inspect.isclass(value) and issubclass(value, Exception)
