"""What is fuzzed: each target takes any bytes, and raises only what is a defect."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

from google.protobuf.message import DecodeError
from grpc import aio

from conveyor.v1 import session_pb2
from conveyor_models import BundleError, load_bundle
from conveyor_models.importers import import_model
from conveyor_server.admission.admission import Admission
from conveyor_server.config import Config, LimitsConfig
from conveyor_server.core import OpenMode
from conveyor_server.errors import (
    ConveyorError,
    SnapshotCorrupt,
    SnapshotIncompatible,
)
from conveyor_server.metrics import Metrics
from conveyor_server.rpc.results import ResultsBudget
from conveyor_server.rpc.service import Services
from conveyor_server.rpc.stream import StepStream
from conveyor_server.rpc.streams import Streams
from conveyor_server.scheduler.operations import Operations
from conveyor_server.sessions.tokens import check_token
from conveyor_server.store.checkpoint import check_fits, decode, encode
from tests.attacks import model_files
from tests.fuzz import mutate, seeds
from tests.support.clock import FakeClock
from tests.support.models import FEATURES
from tests.support.rig import Rig


@dataclass(frozen=True)
class Target:
    """One decoder."""

    run: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]
    """What it has to begin with: valid inputs."""
    mutate: Callable[[bytes, int, int, mutate.Mutate], bytes] | None = None
    """How inputs are changed, if not at any byte."""


# --- Records, snapshots and tokens ---------------------------------------------------------------


def record(data: bytes) -> None:
    """A record with whatever checksum; one that is read is written as it was."""
    with suppress(SnapshotCorrupt, SnapshotIncompatible):
        checkpoint = decode(data)
        assert decode(encode(checkpoint)) == checkpoint
        check_fits(checkpoint, FEATURES)


def snapshot(data: bytes) -> None:
    """The inside of a record: its checksum is made right, as anybody can."""
    sealed = data + hashlib.sha256(data).digest()
    record(sealed)
    with suppress(ConveyorError):
        rig = Rig()
        rig.operations.import_("ann", decode(sealed), "copy", 0)


def token(data: bytes) -> None:
    """The token of an OpenSession."""
    text = data.decode("utf-8", "replace")
    with suppress(ConveyorError):
        check_token(text, "s", "life")
    rig = Rig()
    rig.open()
    with suppress(ConveyorError):
        rig.open(mode=OpenMode.EITHER, token=text)


# --- Frames --------------------------------------------------------------------------------------


class _Context:
    """The client: it sends what it is given and reads everything."""

    def __init__(self, frames: list[Any]) -> None:
        self._frames = [*frames, aio.EOF]
        self.written: list[session_pb2.StreamStepsResponse] = []

    async def read(self) -> Any:
        return self._frames.pop(0)

    async def write(self, frame: session_pb2.StreamStepsResponse) -> None:
        frame.SerializeToString()
        self.written.append(frame)


class _Driver:
    """Carries everything out at once."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig

    def submit(self, chunk: Any) -> None:
        self._rig.scheduler.inbox.put(chunk)

    def post(self, operation: Callable[[Operations], None]) -> None:
        operation(self._rig.operations)

    def tick_at_once(self) -> None:
        self._rig.run()


def frame(data: bytes) -> None:
    """The frames of a StreamSteps call, each behind its length; a session is open, handle 1."""
    frames = [session_pb2.StreamStepsRequest(open=seeds.open_frame())]
    while len(data) >= 2 and len(frames) < 16:
        (size,) = struct.unpack_from("<H", data)
        with suppress(DecodeError):
            frames.append(session_pb2.StreamStepsRequest.FromString(data[2 : 2 + size]))
        data = data[2 + size :]
    asyncio.run(_serve(frames))


async def _serve(frames: list[Any]) -> None:
    rig, limits = Rig(), LimitsConfig()
    services = Services(
        Config(),
        Admission(limits),
        cast(Any, _Driver(rig)),
        cast(Any, None),
        Metrics(),
        FakeClock(),
        "cpu",
        ResultsBudget(limits),
    )
    context = _Context(frames)
    stream = StepStream(services, "ann", cast(Any, context), Streams(4))
    serving = asyncio.create_task(stream.serve())
    for _ in range(200):
        rig.run()
        await asyncio.sleep(0)
        if serving.done():
            break
    async with asyncio.timeout(10):
        await serving
    for said in context.written:
        assert said.failure.status.code != 13, said  # INTERNAL


# --- Bundles and files of other frameworks -------------------------------------------------------


def _folder() -> Path:
    """In memory where that is possible."""
    shared = Path("/dev/shm")
    return Path(tempfile.mkdtemp(dir=shared if os.access(shared, os.W_OK) else None))


def bundle(data: bytes) -> None:
    """model.toml behind its length, then weights.safetensors."""
    folder = _folder()
    try:
        size = int.from_bytes(data[:2], "little")
        (folder / "model.toml").write_bytes(data[2 : 2 + size])
        (folder / "weights.safetensors").write_bytes(data[2 + size :])
        with suppress(BundleError):
            load_bundle(folder)
    finally:
        shutil.rmtree(folder)


def _inside(pack: Callable[[Path, bytes], object], suffix: str) -> Callable[[bytes], None]:
    """Bytes of a part of an archive, packed with what is right around them."""

    def run(data: bytes) -> None:
        folder = _folder()
        try:
            file = folder / f"model{suffix}"
            pack(file, data)
            with suppress(BundleError):
                import_model(file).spec("fuzzed")
        finally:
            shutil.rmtree(folder)

    return run


def _pickle(file: Path, data: bytes) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("model/data.pkl", data)
        archive.writestr("model/byteorder", "little")
        for number, values in enumerate((12 * 2, 12 * 3, 12, 12)):  # of nn.LSTM(2, 3)
            archive.writestr(f"model/data/{number}", bytes(4 * values))
        archive.writestr("model/version", "3\n")


def _structure(file: Path, data: bytes) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("metadata.json", '{"keras_version": "3.9.0"}')
        archive.writestr("config.json", data)
        archive.writestr("model.weights.h5", model_files.weights_hdf5(lambda _: None))


def _weights(file: Path, data: bytes) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("metadata.json", '{"keras_version": "3.9.0"}')
        archive.writestr("config.json", model_files.structure())
        archive.writestr("model.weights.h5", data)


TARGETS: Final[dict[str, Target]] = {
    "frame": Target(frame, seeds.frames),
    "record": Target(record, seeds.records),
    "snapshot": Target(snapshot, seeds.snapshots),
    "token": Target(token, seeds.tokens),
    "bundle": Target(bundle, seeds.bundles),
    "onnx": Target(_inside(Path.write_bytes, ".onnx"), seeds.onnx_files, mutate.onnx_graph),
    "pt": Target(_inside(Path.write_bytes, ".pt"), seeds.torch_files),
    "safetensors": Target(_inside(Path.write_bytes, ".safetensors"), seeds.safetensors_files),
    "keras": Target(_inside(Path.write_bytes, ".keras"), seeds.keras_files),
    "pickle": Target(_inside(_pickle, ".pt"), seeds.pickles),
    "keras-structure": Target(
        _inside(_structure, ".keras"), seeds.keras_structures, mutate.json_tree
    ),
    "keras-weights": Target(_inside(_weights, ".keras"), seeds.keras_weights),
    "h5": Target(_inside(Path.write_bytes, ".h5"), seeds.hdf5_files),
}
