"""The text that `letters` learns from: documentation that every Python installation carries.

Two sources: the language reference in `pydoc_data.topics`, and the docstrings of the standard
library, taken from its source files without importing them. Which text that is depends on the
Python version; the split between training and held-out does not, as it goes by the name of the
topic or module.
"""

from __future__ import annotations

import ast
import inspect
import sysconfig
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

UNKNOWN = "\ufffd"
"""Stands for every character that has no label of its own."""
_RARE_BELOW = 15
_PARAGRAPH_CHARACTERS_MIN = 40
_PLAIN_SHARE_MIN = 0.9
_FOLDERS_LEFT_OUT = frozenset(
    {"test", "tests", "idlelib", "lib2to3", "turtledemo", "site-packages", "dist-packages"}
)


def corpus() -> tuple[str, str]:
    """Training and held-out text, about nine to one, with no paragraph in both nor twice in one."""
    seen: set[str] = set()
    parts: tuple[list[str], list[str]] = ([], [])
    for name, document in sorted([*_topics(), *_docstrings()]):
        kept: list[str] = []
        for paragraph in document.split("\n\n"):
            words = " ".join(paragraph.split())
            if words not in seen and _is_prose(paragraph.rstrip()):
                seen.add(words)
                kept.append(paragraph.rstrip())
        if kept:
            held_out = zlib.crc32(name.encode()) % 10 == 0
            parts[held_out].append("\n\n".join(kept))
    return "\n\n".join(parts[0]), "\n\n".join(parts[1])


def alphabet(text: str) -> tuple[str, ...]:
    """The characters that are not rare in a text, in code order, and `UNKNOWN`."""
    common = (character for character, count in Counter(text).items() if count >= _RARE_BELOW)
    return tuple(sorted({*common, UNKNOWN}))


def encode(text: str, labels: tuple[str, ...]) -> list[int]:
    """The token of each character."""
    tokens = {label: token for token, label in enumerate(labels)}
    return [tokens.get(character, tokens[UNKNOWN]) for character in text]


def _is_prose(paragraph: str) -> bool:
    """Whether a paragraph is sentences, and not code, a grammar, a table or a list of names."""
    indented = any(line.startswith(" ") for line in paragraph.splitlines())
    plain = sum(character.isalpha() or character.isspace() for character in paragraph)
    long_enough = len(paragraph) >= _PARAGRAPH_CHARACTERS_MIN
    return long_enough and not indented and plain >= _PLAIN_SHARE_MIN * len(paragraph)


def _topics() -> Iterator[tuple[str, str]]:
    for name, text in topics.items():
        yield f"topic {name}", text


def _docstrings() -> Iterator[tuple[str, str]]:
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        module = path.relative_to(library)
        if _FOLDERS_LEFT_OUT.isdisjoint(module.parts) and module.parts[0] != "pydoc_data":
            found = "\n\n".join(_docstrings_of(path))
            if found:
                yield f"module {module.as_posix()}", found


def _docstrings_of(path: Path) -> Iterator[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about somebody else's escape sequences
        tree = ast.parse(path.read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, kinds):
            text = ast.get_docstring(node, clean=False)
            if text is not None:
                yield inspect.cleandoc(text).expandtabs()
