"""What every table of model.toml shares."""

from __future__ import annotations

from typing import Annotated, Final, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

SIZE_MAX: Final = 65_536

Shape: TypeAlias = tuple[int, ...]

Size = Annotated[int, Field(strict=True, ge=1, le=SIZE_MAX)]


class Table(BaseModel):
    """A table of model.toml: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")
