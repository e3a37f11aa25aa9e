"""Writes the page of the server's settings from the docstrings of its configuration."""

from collections.abc import Iterator
from typing import Final

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from conveyor_server.config import Config
from conveyor_server.environment import DELIMITER, PREFIX

NAME: Final = "settings.md"


def page() -> str:
    """The whole page, with every setting of every section."""
    parts = [
        "# Settings",
        "Flags stand above environment variables, those above a TOML file with a table for each"
        " section. [Running a server](../guides/operations.md) says which ones to think of.",
    ]
    for section, field in Config.model_fields.items():
        kind = field.annotation
        assert isinstance(kind, type)
        assert issubclass(kind, BaseModel)
        first = (kind.__doc__ or "").strip()
        parts += [f"## {section} {{ #{section} }}", first, "\n".join(_table(section, kind))]
    return "\n\n".join(parts) + "\n"


def _table(section: str, kind: type[BaseModel]) -> Iterator[str]:
    yield "| setting | default | environment | meaning |"
    yield "|---|---|---|---|"
    for key, field in kind.model_fields.items():
        name = f"{section}.{key}"
        variable = f"{PREFIX}{section}{DELIMITER}{key}".upper()
        meaning = " ".join((field.description or "").split()).replace("|", "\\|")
        yield f"| `{name}` | {_default(field)} | `{variable}` | {meaning} |"


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is None or value in ("", {}):
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return f"{value:,}" if isinstance(value, int | float) else f"`{value}`"
