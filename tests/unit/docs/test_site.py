"""The documentation builds as a site without a warning, whole and without anything from outside."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

import conveyor_client
from conveyor.v1 import errors_pb2, model_pb2, session_pb2
from conveyor_client import aio
from conveyor_server.config import Config
from tests.unit.docs.markdown import DOCS, REPOSITORY, pages

RESOURCE: Final = re.compile(
    r"""<(?:script|img|iframe|link|source)\b[^>]*?\b(?:src|href)=["']?((?:https?:)?//[^"'\s>]+)"""
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=REPOSITORY,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder


def test_every_page_is_on_the_site(site: Path) -> None:
    front = (site / "index.html").read_text()
    for page in pages():
        built = page.relative_to(DOCS).with_suffix(".html").as_posix()
        assert (site / built).exists()
        assert f'href="{built}"' in front, f"{built} is not in the navigation"


def test_the_site_fetches_nothing(site: Path) -> None:
    for page in site.rglob("*.html"):
        assert RESOURCE.findall(page.read_text()) == []


def test_what_pages_link_to_in_the_repository_comes_along(site: Path) -> None:
    assert "sessions_max" in (site / "repository/server/conveyor_server/config.py.html").read_text()
    cited = site / "repository/bench/results/2026-11-22-main.json"
    assert cited.read_bytes() == (REPOSITORY / "bench/results/2026-11-22-main.json").read_bytes()


def test_the_contract_is_described_in_full(site: Path) -> None:
    for module in (errors_pb2, model_pb2, session_pb2):
        file = module.DESCRIPTOR
        name = file.name.removesuffix(".proto").replace("/", ".")
        text = (site / f"reference/{name}.html").read_text()
        for service in file.services_by_name.values():
            for method in service.methods:
                assert f'id="{service.name}.{method.name}"' in text
        for message in file.message_types_by_name.values():
            assert f'id="{message.name}"' in text
            for field in message.fields:
                assert f"<code>{field.name}</code>" in text
        for enum in file.enum_types_by_name.values():
            for value in enum.values:
                assert f"<code>{value.name}</code>" in text
        assert "<td></td>" not in text, "a field or a value without its comment"
    session = (site / "reference/conveyor.v1.session.html").read_text()
    assert "the same number with another payload is ERROR_REASON_STEP_CONFLICT" in session
    assert 'href="#OpenSessionRequest"' in session


def test_every_setting_is_described(site: Path) -> None:
    text = (site / "reference/settings.html").read_text()
    for section, values in Config().model_dump().items():
        for key in values:
            assert f"<code>{section}.{key}</code>" in text
            assert f"<code>CONVEYOR_{section}__{key}</code>".upper() in text.upper()
    assert "Sessions of one model version with their carry on the device at once." in text
    assert "<td></td>\n</tr>" not in text, "a setting without a meaning"


def test_every_public_name_of_the_client_is_described(site: Path) -> None:
    text = (site / "reference/client.html").read_text()
    for module, names in ((conveyor_client, conveyor_client.__all__), (aio, aio.__all__)):
        for name in names:
            if name != "aio":
                assert f'id="{module.__name__}.{name}"' in text
    for method in ("step", "stream", "fork", "generate", "predict", "sessions"):
        assert re.search(rf'id="conveyor_client\.aio\.\w+\.{method}"', text), method
