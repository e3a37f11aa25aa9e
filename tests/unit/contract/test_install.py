"""What is advised where an extra is missing: it has to work where the installation came from."""

from __future__ import annotations

import json
import re
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import pytest

from conveyor.install import install_command

ROOT: Final = Path(__file__).parents[3]


class _Installed:
    """A distribution that pip has written down."""

    def __init__(self, origin: dict[str, Any] | None) -> None:
        self._origin = origin

    def read_text(self, name: str) -> str | None:
        assert name == "direct_url.json"
        return None if self._origin is None else json.dumps(self._origin)


@pytest.fixture
def advice(monkeypatch: pytest.MonkeyPatch) -> Any:
    def advise(origin: dict[str, Any] | None) -> str:
        monkeypatch.setattr(metadata, "distribution", lambda name: _Installed(origin))
        return install_command("plot")

    return advise


def test_from_a_checkout(advice: Any, tmp_path: Path) -> None:
    folder = tmp_path / "a checkout"
    folder.mkdir()
    (folder / "pyproject.toml").touch()
    origin = {"url": folder.as_uri(), "dir_info": {"editable": True}}
    assert advice(origin) == (f"cd '{folder}' && pip install -c constraints.txt -e '.[plot]'")


def test_from_a_checkout_that_is_gone(advice: Any, tmp_path: Path) -> None:
    origin = {"url": (tmp_path / "gone").as_uri(), "dir_info": {}}
    assert advice(origin) == "pip install -c constraints.txt -e '.[plot]' in a checkout"


def test_from_a_wheel(advice: Any, tmp_path: Path) -> None:
    wheel = tmp_path / "conveyor-0.1.0-py3-none-any.whl"
    origin = {"url": wheel.as_uri(), "archive_info": {}}
    assert advice(origin) == f"pip install '{wheel.name}[plot]'"
    wheel.touch()
    assert advice(origin) == f"pip install '{wheel}[plot]'"


def test_from_elsewhere(advice: Any) -> None:
    far = {"url": "https://example.com/conveyor-0.1.0-py3-none-any.whl", "archive_info": {}}
    assert advice(far) == f"pip install 'conveyor[plot] @ {far['url']}'"
    cloned = {"url": "https://example.com/conveyor.git", "vcs_info": {"vcs": "git"}}
    assert advice(cloned) == "pip install 'conveyor[plot] @ git+https://example.com/conveyor.git'"
    assert advice(None) == "pip install 'conveyor[plot]'"


def test_without_an_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> metadata.Distribution:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", absent)
    assert install_command("plot") == ("pip install -c constraints.txt -e '.[plot]' in a checkout")


def test_nothing_else_gives_the_advice_of_an_index_that_has_no_such_distribution() -> None:
    """One place says where packages come from; the guides name a checkout or a wheel."""
    wrong = re.compile(r"pip install (?:--?\S+ )*['\"]?conveyor\b(?!-0)")
    sources = [
        path
        for folder in (
            "client",
            "server",
            "models",
            "proto",
            "docs",
            "examples",
            "bench",
            "scripts",
        )
        for path in ROOT.joinpath(folder).rglob("*")
        if path.suffix in {".py", ".md", ".yml", ".toml"}
    ]
    sources += [*ROOT.glob("*.md"), *ROOT.glob("*.toml")]
    found = {
        path.relative_to(ROOT).as_posix() for path in sources if wrong.search(path.read_text())
    }
    assert found == {"proto/conveyor/install.py"}
