"""The client from the built wheel, in an environment that has nothing else."""

import os
import shlex
import subprocess
import sys
import textwrap
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.client.fake.server import FakeServer, ServerThread

ROOT = Path(__file__).resolve().parents[2]
# typer brings pydantic along, so that one may be there, but the library must not load it.
NOT_INSTALLED = [
    "torch",
    "matplotlib",
    "pydantic_settings",
    "prometheus_client",
    "safetensors",
    "grpc_health",
]
NOT_LOADED = ["conveyor_server", "conveyor_models", "pydantic", "typer", "rich"]
OTHER_VERSIONS = {
    "lowest": ("protobuf==6.31.1", "grpcio==1.84.0", "grpcio-status==1.80.0"),
    "tritonclient": ("tritonclient[grpc]==2.73.0",),  # it requires a protobuf below 7
}
"""Requirements beside the wheel that make pip choose a protobuf 6."""
TALK = """
    import asyncio
    import conveyor_client
    from conveyor_client import aio

    with conveyor_client.Client("TARGET") as client:
        with client.session("counter") as session:
            print(session.step([[1, 2], [3, 4]]).tolist())
        try:
            client.model("nobody")
        except conveyor_client.ModelNotFound as error:
            print(error.reason)

    async def main():
        async with aio.Client("TARGET") as client:
            async with client.session("tokens") as session:
                print([row.tolist() async for row in session.stream([1, 2])])

    asyncio.run(main())
"""
"""Both clients talk to the server at TARGET."""
TALKED = ["[[1.0, 2.0], [4.0, 6.0]]", "MODEL_NOT_FOUND", "[[1.0, 1.0, 1.0], [3.0, 3.0, 3.0]]"]

pytestmark = pytest.mark.timeout(300)


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Runs a program without the paths and settings of this one."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**kept, **environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(
        sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT,
        cwd=folder,
    )  # fmt: skip
    (built,) = folder.glob("conveyor-*.whl")
    return built


@pytest.fixture(scope="module")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of programs of a fresh environment with the wheel and what it requires."""
    home = tmp_path_factory.mktemp("bare") / "venv"
    venv.create(home, with_pip=True)
    run(
        home / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
        "--constraint", ROOT / "constraints.txt", wheel,
        cwd=home,
    )  # fmt: skip
    return home / "bin"


@pytest.fixture(scope="module")
def server() -> Iterator[FakeServer]:
    with ServerThread() as server:
        yield server


def test_nothing_of_the_server_is_installed_or_imported(bare: Path, tmp_path: Path) -> None:
    script = f"""
        import importlib.util, sys
        import conveyor_client, conveyor_client.aio
        for name in {NOT_INSTALLED}:
            assert importlib.util.find_spec(name) is None, name + " is installed"
        for name in {NOT_LOADED}:
            loaded = [m for m in sys.modules if m == name or m.startswith(name + ".")]
            assert not loaded, loaded
        import conveyor_client.cli
        assert "conveyor_server" not in sys.modules
        try:
            import conveyor_server.app
        except ImportError:
            print("bare")
    """
    out = run(bare / "python", "-c", textwrap.dedent(script), cwd=tmp_path)
    assert out == "bare\n"


def test_both_clients_talk_to_a_server(bare: Path, tmp_path: Path, server: FakeServer) -> None:
    script = "import google.protobuf; print(google.protobuf.__version__)" + textwrap.dedent(TALK)
    out = run(bare / "python", "-c", script.replace("TARGET", server.target), cwd=tmp_path)
    version, *talked = out.splitlines()
    assert version.startswith("7.")
    assert talked == TALKED


@pytest.mark.parametrize("choice", sorted(OTHER_VERSIONS))
def test_both_clients_and_the_command_work_with_protobuf_6(
    choice: str, wheel: Path, bare: Path, tmp_path: Path, server: FakeServer
) -> None:
    """pip itself finds versions that fit, with no constraints and nothing left out."""
    packages = tmp_path / "packages"
    run(
        bare / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
        "--target", packages, wheel, *OTHER_VERSIONS[choice],
        cwd=tmp_path,
    )  # fmt: skip
    script = "import google.protobuf; print(google.protobuf.__version__)" + textwrap.dedent(TALK)
    if choice == "tritonclient":
        script = f"import tritonclient.grpc\n{script}"
    out = run(
        bare / "python", "-c", script.replace("TARGET", server.target), cwd=tmp_path,
        PYTHONPATH=str(packages),
    )  # fmt: skip
    version, *talked = out.splitlines()
    assert version == "6.31.1" if choice == "lowest" else version.startswith("6.")
    assert talked == TALKED
    listed = run(
        bare / "conveyor", "models", "list", "--json", cwd=tmp_path,
        PYTHONPATH=str(packages), CONVEYOR_TARGET=server.target,
    )  # fmt: skip
    assert '"counter"' in listed


def test_the_command_works(bare: Path, tmp_path: Path, server: FakeServer) -> None:
    assert "bench" in run(bare / "conveyor", "--help", cwd=tmp_path)
    rows = tmp_path / "rows.csv"
    rows.write_text("left,right\n1,2\n3,4\n")
    out = run(
        bare / "conveyor", "run", "counter", rows, cwd=tmp_path, CONVEYOR_TARGET=server.target
    )
    assert out == "left,right\n1,2\n4,6\n"


def test_gates_are_watched_and_pictures_say_what_to_install(
    bare: Path, wheel: Path, tmp_path: Path, server: FakeServer
) -> None:
    watch = (bare / "conveyor", "watch", "tokens", "--text", "ab")
    lines = run(*watch, cwd=tmp_path, CONVEYOR_TARGET=server.target).splitlines()
    assert lines[2].startswith("step 1  in a  out ")
    assert lines[3].startswith("step 2  in b  out ")
    refused = subprocess.run(
        [*watch, "--png", "gates.png"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert refused.returncode == 1
    said, _, advice = refused.stderr.rstrip().rpartition(": ")
    assert said == "error: pictures need matplotlib"
    assert advice == f"pip install '{wheel}[plot]'"
    arguments = shlex.split(advice)[1:]
    installed = run(bare / "pip", *arguments, "--dry-run", cwd=tmp_path)
    assert "matplotlib-" in installed.splitlines()[-1]


def test_the_wheel_is_typed_and_carries_no_build_leftovers(bare: Path, tmp_path: Path) -> None:
    script = """
        import importlib.util, pathlib
        for name in ("conveyor", "conveyor_client"):
            folder = pathlib.Path(importlib.util.find_spec(name).origin).parent
            assert (folder / "py.typed").exists(), name
        root = folder.parent
        print(sorted(p.name for p in root.iterdir() if p.name.startswith(("tests", "bench"))))
    """
    assert run(bare / "python", "-c", textwrap.dedent(script), cwd=tmp_path) == "[]\n"
