"""Scripts and cards of the shipped bundles, for their tests."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ZOO = Path(__file__).parents[2] / "models" / "zoo"


def script(model: str, name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A script of the zoo, which is no package: its siblings are importable while it loads."""
    path = ZOO / model / f"{name}.py"
    monkeypatch.syspath_prepend(path.parent)
    for sibling in path.parent.glob("*.py"):
        monkeypatch.delitem(sys.modules, sibling.stem, raising=False)
    spec = importlib.util.spec_from_file_location(f"zoo_{model}_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def card(model: str) -> list[list[str]]:
    """The cells of every row of every table of a card."""
    lines = (ZOO / model / "CARD.md").read_text().splitlines()
    rows = [line.strip("|").split("|") for line in lines if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows]
