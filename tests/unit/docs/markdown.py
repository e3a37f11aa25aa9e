"""Reads the pages of the documentation: code blocks and tables, with the lines they begin at."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

REPOSITORY: Final = Path(__file__).parents[3]
DOCS: Final = REPOSITORY / "docs"
CODE: Final = re.compile(r"`([^`]+)`")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block of code."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(REPOSITORY)}:{self.line}"


@dataclass(frozen=True, slots=True)
class Rows:
    """A table: the cells of its rows, the header first."""

    line: int
    rows: list[list[str]]

    @property
    def header(self) -> list[str]:
        return self.rows[0]

    @property
    def body(self) -> list[list[str]]:
        return self.rows[1:]


def pages() -> list[Path]:
    """Every page that is written by hand."""
    return sorted(DOCS.rglob("*.md"))


def blocks(page: Path, language: str) -> list[Block]:
    """The page's fenced blocks in that language."""
    found: list[Block] = []
    begun: tuple[int, str] | None = None
    inside: list[str] = []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        fence = line.strip()
        if begun is None and fence.startswith("```"):
            begun, inside = (number, fence[3:].strip()), []
        elif begun is not None and fence == "```":
            found.append(Block(page, *begun, "\n".join(inside) + "\n"))
            begun = None
        elif begun is not None:
            inside.append(line)
    assert begun is None, f"{page}: a block of code never ends"
    return [block for block in found if block.language == language]


def tables(page: Path) -> Iterator[Rows]:
    """The page's tables."""
    rows: list[list[str]] = []
    begun = 0
    for number, line in enumerate([*page.read_text(encoding="utf-8").splitlines(), ""], start=1):
        if line.startswith("|"):
            begun = begun or number
            rows.append([cell.strip() for cell in line.strip().strip("|").split("|")])
        elif rows:
            yield Rows(begun, [rows[0], *rows[2:]])
            rows, begun = [], 0


def code(cell: str) -> str:
    """The first thing in a cell that is set as code."""
    found = CODE.search(cell)
    assert found is not None, f"nothing in {cell!r} is set as code"
    return found[1]
