"""Generates and checks the Python code of the contract.

    python scripts/proto.py generate       rewrite the code beside every .proto file
    python scripts/proto.py check          fail where that code is not what its source generates
    python scripts/proto.py lint           run buf's lint rules over the contract
    python scripts/proto.py breaking REF   fail where the contract breaks clients of git REF's

Nothing here needs a network: the google.rpc definitions come from googleapis-common-protos, and buf
reads an image that protoc builds, so it has no module to fetch.
"""

import argparse
import filecmp
import importlib.util
import io
import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

# grpcio-tools lies apart, because it requires an older protobuf than the environment has:
# constraints.txt says why it is that version.
TOOLS = Path(sys.prefix, "contract-tools")
if not TOOLS.is_dir():
    sys.exit(f"grpcio-tools is not in {TOOLS}: run `make check` once, then .venv/bin/python")
sys.path.insert(0, str(TOOLS))
from grpc_tools import protoc  # noqa: E402

REPOSITORY = Path(__file__).resolve().parent.parent
PROTO_ROOT = REPOSITORY / "proto"
BUF_CONFIG = PROTO_ROOT / "buf.yaml"
SCRIPTS = Path(sysconfig.get_path("scripts"))
GENERATED = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py", "*_pb2_grpc.pyi")


def sources(root: Path) -> list[str]:
    """Returns the contract's .proto files as sorted paths relative to ``root``."""
    found = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.proto"))
    if not found:
        sys.exit(f"no .proto file below {root}")
    return found


def include_flags(root: Path) -> list[str]:
    """Returns protoc's search path: the contract, google.rpc, google.protobuf."""
    google_rpc = importlib.util.find_spec("google.rpc")
    assert google_rpc is not None, "googleapis-common-protos is a dependency of the distribution"
    assert google_rpc.submodule_search_locations is not None
    site = Path(next(iter(google_rpc.submodule_search_locations))).parent.parent
    well_known = resources.files("grpc_tools") / "_proto"
    return [f"-I{root}", f"-I{site}", f"-I{well_known}"]


def run_protoc(root: Path, flags: list[str]) -> None:
    """Runs protoc over the contract below ``root``; exits with its status where it fails."""
    status = protoc.main(["protoc", *include_flags(root), *flags, *sources(root)])
    if status != 0:
        sys.exit(status)


def generate(target: Path) -> None:
    """Writes messages, services and the typed stubs of both below ``target``."""
    plugins = ("protoc-gen-mypy", "protoc-gen-mypy_grpc")
    run_protoc(
        PROTO_ROOT,
        [
            *(f"--plugin={name}={SCRIPTS / name}" for name in plugins),
            *(f"--{kind}_out={target}" for kind in ("python", "grpc_python")),
            *(f"--{kind}_out=quiet:{target}" for kind in ("mypy", "mypy_grpc")),
        ],
    )
    remove_empty_services(target)


def remove_empty_services(target: Path) -> None:
    """Removes the service modules of files that define no service: nothing would import them."""
    for module in list(target.rglob("*_pb2_grpc.py")):
        if "_to_server" not in module.read_text(encoding="utf-8"):
            module.unlink()
            module.with_suffix(".pyi").unlink()


def generated(root: Path) -> Iterator[Path]:
    """Yields the generated files below ``root`` as relative paths."""
    for pattern in GENERATED:
        for path in root.rglob(pattern):
            yield path.relative_to(root)


def check() -> None:
    """Exits with the list of generated files that are stale, missing or without a source."""
    with tempfile.TemporaryDirectory() as scratch:
        fresh = Path(scratch)
        generate(fresh)
        names = sorted({*generated(fresh), *generated(PROTO_ROOT)})
        _, differing, absent = filecmp.cmpfiles(
            fresh, PROTO_ROOT, [str(name) for name in names], shallow=False
        )
    if differing or absent:
        sys.exit("\n".join(["run `make proto`, these differ:", *sorted(differing + absent)]))


def write_image(root: Path, image: Path) -> None:
    """Compiles the contract below ``root`` into one self-contained image for buf."""
    run_protoc(root, [f"-o{image}", "--include_imports", "--include_source_info"])


def run_buf(*arguments: str, image: Path) -> None:
    """Runs buf on the conveyor part of ``image``; exits with its status where it objects."""
    # buf insists on a cache folder, and HOME may be absent where checks run.
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [
                SCRIPTS / "buf",
                arguments[0],
                image,
                "--config",
                BUF_CONFIG,
                "--path",
                "conveyor",
                *arguments[1:],
            ],
            env={**os.environ, "BUF_CACHE_DIR": cache},
            check=False,
        )
    if done.returncode != 0:
        sys.exit(done.returncode)


def lint() -> None:
    """Runs buf's lint rules over the contract."""
    with tempfile.TemporaryDirectory() as scratch:
        image = Path(scratch, "image.binpb")
        write_image(PROTO_ROOT, image)
        run_buf("lint", image=image)


def breaking(reference: str) -> None:
    """Compares the contract with the one at a git reference by buf's rules of compatibility."""
    done = subprocess.run(
        # A reference that begins with a dash must not be read as an option.
        ["git", "archive", "--format=tar", "--end-of-options", reference, "proto"],  # noqa: S607
        cwd=REPOSITORY,
        check=False,
        capture_output=True,
    )
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        sys.exit(f"{reference}: {said[-1] if said else 'git archive failed'}")
    with tempfile.TemporaryDirectory() as scratch:
        with tarfile.open(fileobj=io.BytesIO(done.stdout)) as files:
            files.extractall(scratch, filter="data")
        now, before = Path(scratch, "now.binpb"), Path(scratch, "before.binpb")
        write_image(PROTO_ROOT, now)
        write_image(Path(scratch, "proto"), before)
        run_buf("breaking", "--against", str(before), image=now)


def main() -> None:
    """Parses the command line and runs one command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("generate", "check", "lint"):
        commands.add_parser(name)
    commands.add_parser("breaking").add_argument("reference", metavar="REF")
    chosen = parser.parse_args()
    match chosen.command:
        case "generate":
            generate(PROTO_ROOT)
        case "check":
            check()
        case "lint":
            lint()
        case "breaking":
            breaking(chosen.reference)


if __name__ == "__main__":
    main()
