"""`scripts/gpu_check.sh` on a machine with torch and little else, and its verdict."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Final

import pytest
import torch

ROOT: Final = Path(__file__).parents[3]
SCRIPT: Final = ROOT / "scripts" / "gpu_check.sh"
NEEDED: Final = re.findall(r"^  \w+=([\w-]+)$", SCRIPT.read_text(encoding="utf-8"), re.MULTILINE)
SECONDS_MAX: Final = 110


def _check(*arguments: str, python: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    return subprocess.run(
        [SCRIPT, *arguments],
        capture_output=True,
        text=True,
        timeout=SECONDS_MAX,
        check=False,
        env=kept
        | {"PYTHON": str(python), "PIP_NO_INDEX": "1", "OMP_NUM_THREADS": "1"}
        | environment,
    )


# --- a bare machine ---


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment of torch, numpy, pytest, pip and what they require."""
    folder = tmp_path_factory.mktemp("machine") / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for name in _required(["torch", "numpy", "pytest", "pip"]):
        for path in _top_level(metadata.distribution(name)):
            link = site / path.name
            if not link.exists():
                link.symlink_to(path)
    return folder / "bin" / "python"


def _required(names: Iterable[str]) -> set[str]:
    """The distributions that these require, themselves included, as far as they are here."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        try:
            requires = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        if name not in found:
            found.add(name)
            waiting += [
                re.split(r"[^\w.-]", each, maxsplit=1)[0]
                for each in requires
                if "extra ==" not in each
            ]
    return found


def _top_level(distribution: metadata.Distribution) -> set[Path]:
    tops = {file.parts[0] for file in distribution.files or () if ".." not in file.parts}
    return {Path(str(distribution.locate_file(top))) for top in tops - {"__pycache__"}}


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is to be brought along, packed again from what is installed here."""
    folder = tmp_path_factory.mktemp("wheels")
    for name in NEEDED:
        distribution = metadata.distribution(name)
        tag = re.findall(r"^Tag: (.+)$", distribution.read_text("WHEEL") or "", re.MULTILINE)[-1]
        file = f"{name.replace('-', '_')}-{distribution.version}-{tag}.whl"
        with zipfile.ZipFile(folder / file, "w") as packed:
            for part in distribution.files or ():
                path = Path(str(distribution.locate_file(part)))
                if ".." not in part.parts and path.is_file() and path.suffix != ".pyc":
                    packed.write(path, str(part))
    return folder


def test_the_machine_is_bare(bare_python: Path) -> None:
    script = (
        "import importlib.util as u, sys;"
        "print(*[n for n in sys.argv[1:] if u.find_spec(n) is None])"
    )
    absent = ["grpc", "pydantic", "hypothesis", "safetensors", "rich", "numba", "onnx", "google"]
    command = [bare_python, "-c", script, "torch", "numpy", "pytest", *absent]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == absent


def test_a_dry_run_collects_and_imports_all(bare_python: Path, wheels: Path) -> None:
    done = _check("--dry-run", str(wheels), python=bare_python)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.findall(r"^(\d+) tests collected", done.stdout, re.MULTILINE)[0]) > 250
    assert "the bench can be imported" in done.stdout
    assert "not on this machine: pydantic pydantic-core" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so_and_fails(
    bare_python: Path, wheels: Path, tmp_path: Path
) -> None:
    done = _check(str(wheels), python=bare_python, OUT=str(tmp_path))
    assert done.returncode == 2, done.stdout + done.stderr
    assert "tests collected" in done.stdout
    assert "there is no CUDA device that can be used" in done.stderr
    assert not list(tmp_path.iterdir())


def test_without_wheels_and_without_a_network_it_says_what_to_bring(
    bare_python: Path, tmp_path: Path
) -> None:
    done = _check(str(tmp_path / "none"), python=bare_python)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "still missing: pydantic" in done.stderr
    assert "gpu_check.sh fetch" in done.stderr


def test_an_unknown_option_is_refused(tmp_path: Path) -> None:
    done = _check("--quick", python=Path(sys.executable))
    assert (done.returncode, done.stdout) == (2, "")
    assert "--quick" in done.stderr


# --- the verdict ---

# Stands in for an interpreter on a machine with a device; what it runs ends as it is told.
INTERPRETER: Final = """#!/usr/bin/env bash
case "$*" in
  *--collect-only*) echo "7 tests collected"; exit "$COLLECT" ;;
  *"-m bench"*) echo "lines of the bench"; echo '{"lines": 7}' >"${@: -1}"; exit "$BENCH" ;;
  *tests/gpu*) echo "output of tests/gpu"; exit "$TESTS" ;;
  -) grep -q get_device_name && echo "NVIDIA X100 80GB" ;;
esac
exit 0
"""


@pytest.mark.parametrize(
    ("collect", "tests", "bench", "status"),
    [(0, 0, 0, 0), (0, 1, 0, 1), (0, 0, 3, 1), (0, 124, 124, 1), (0, 5, 0, 1), (2, 0, 0, 1)],
)
def test_it_passes_only_if_every_stage_does(
    collect: int, tests: int, bench: int, status: int, tmp_path: Path
) -> None:
    python, out = tmp_path / "python", tmp_path / "out"
    python.write_text(INTERPRETER, encoding="utf-8")
    python.chmod(0o755)
    ends = {"COLLECT": str(collect), "TESTS": str(tests), "BENCH": str(bench)}
    done = _check(str(tmp_path), python=python, OUT=str(out), **ends)
    assert done.returncode == status, done.stdout + done.stderr
    if collect:
        assert not out.exists()
        return
    (file,) = out.iterdir()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d-nvidia-x100-80gb\.txt", file.name)
    text = file.read_text(encoding="utf-8")
    assert "output of tests/gpu" in text
    assert "lines of the bench" in text
    assert '{"lines": 7}' in text
    assert ("=== tests/gpu: passed" in text) == (tests == 0)
    assert ("=== the bench: passed" in text) == (bench == 0)
    assert text.splitlines()[-1].startswith("=== all passed" if status == 0 else "=== FAILED")
