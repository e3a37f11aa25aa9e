"""The record of a session's state: one format for paging, for stores and for snapshots.

    offset  bytes
    0       4      "CVYR"
    4       2      format version, little-endian
    6       4      header length, little-endian
    10      ...    header, JSON in UTF-8
    ...     ...    carry, float32 little-endian
    ...     ...    format 2: the memory that is attended over, float32 little-endian
    last    32     SHA-256 of everything before it

A record is written in the oldest format that can hold it. One that never leaves the server has no
memory in it: there the memory is kept once for all sessions that share it.

Nothing in it is executed or trusted: the checksum is verified first, then every field.
"""

import hashlib
import json
import struct
from dataclasses import asdict, dataclass
from typing import Final

import numpy as np

from conveyor_server.core import SESSION_ID, STEP_MAX, ModelInfo
from conveyor_server.errors import SnapshotCorrupt, SnapshotIncompatible

MAGIC: Final = b"CVYR"
FORMAT_VERSION: Final = 1
MEMORY_FORMAT_VERSION: Final = 2
"""The first format with a memory; the header of format 1 does not know of one."""
HEADER_BYTES_MAX: Final = 64 * 2**10
NAME_CHARACTERS_MAX: Final = 256
_PREFIX: Final = struct.Struct("<4sHI")
_DIGEST_BYTES: Final = 32


@dataclass(frozen=True, slots=True)
class Header:
    """What a record says beside the carry."""

    session_id: str
    principal: str
    """Empty in snapshots, which may be given to others."""
    model: str
    version: int
    model_digest: str
    epoch: int
    step: int
    carry_bytes: int
    dtype: str = "float32"
    memory_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A session's state after `header.step` steps."""

    header: Header
    carry: bytes
    memory: bytes = b""
    """What the session attends over; empty also where that is kept elsewhere."""


def encode(checkpoint: Checkpoint) -> bytes:
    """Writes a record."""
    assert len(checkpoint.carry) == checkpoint.header.carry_bytes
    assert len(checkpoint.memory) == checkpoint.header.memory_bytes
    body = b"".join((_head(checkpoint.header), checkpoint.carry, checkpoint.memory))
    return body + hashlib.sha256(body).digest()


def record_bytes(header: Header) -> int:
    """The size of the record with this header."""
    return len(_head(header)) + header.carry_bytes + header.memory_bytes + _DIGEST_BYTES


def decode(record: bytes) -> Checkpoint:
    """Reads a record.

    Raises:
        SnapshotCorrupt: Truncated, altered, or not a record at all.
        SnapshotIncompatible: Of a format this server does not read.
    """
    if len(record) < _PREFIX.size + _DIGEST_BYTES or not record.startswith(MAGIC):
        raise SnapshotCorrupt(
            "not a snapshot of this server: its first bytes are of something else"
        )
    _, version, header_length = _PREFIX.unpack_from(record)
    if not FORMAT_VERSION <= version <= MEMORY_FORMAT_VERSION:
        raise SnapshotIncompatible(
            f"the snapshot has format {version}; this server reads formats {FORMAT_VERSION} to"
            f" {MEMORY_FORMAT_VERSION}"
        )
    body = memoryview(record)[:-_DIGEST_BYTES]
    if hashlib.sha256(body).digest() != record[-_DIGEST_BYTES:]:
        raise SnapshotCorrupt("the snapshot is damaged: its checksum does not match")
    carry_start = _PREFIX.size + header_length
    if header_length > HEADER_BYTES_MAX or carry_start > len(body):
        raise SnapshotCorrupt("the snapshot is cut off within its header")
    header = _read_header(bytes(body[_PREFIX.size : carry_start]), version)
    state_bytes = header.carry_bytes + header.memory_bytes
    if len(body) - carry_start != state_bytes:
        raise SnapshotCorrupt(
            f"the snapshot is damaged: it holds {len(body) - carry_start:,} bytes of state, but its"
            f" header says {state_bytes:,}"
        )
    memory_start = carry_start + header.carry_bytes
    return Checkpoint(header, bytes(body[carry_start:memory_start]), bytes(body[memory_start:]))


def _head(header: Header) -> bytes:
    """What stands before the state."""
    fields = asdict(header)
    version = MEMORY_FORMAT_VERSION if header.memory_bytes else FORMAT_VERSION
    if not header.memory_bytes:
        del fields["memory_bytes"]
    data = json.dumps(fields, separators=(",", ":")).encode()
    return _PREFIX.pack(MAGIC, version, len(data)) + data


def check_fits(checkpoint: Checkpoint, model: ModelInfo) -> None:
    """Checks that the carry and the memory can be used with the model.

    Raises:
        SnapshotIncompatible: They are another model's, or laid out otherwise.
    """
    header = checkpoint.header
    if header.model_digest != model.digest:
        raise SnapshotIncompatible(
            f"the snapshot is of digest {header.model_digest}; the model has {model.digest}"
        )
    if header.dtype != "float32" or header.carry_bytes != model.carry_bytes:
        raise SnapshotIncompatible("the snapshot's state does not have the layout of the model's")
    if bool(header.memory_bytes) != bool(model.memory_row_bytes) or (
        header.memory_bytes and header.memory_bytes % model.memory_row_bytes
    ):
        raise SnapshotIncompatible("the snapshot's memory does not fit the model's attention")


def read_snapshot(record: bytes) -> Checkpoint:
    """Reads a record that came from outside, and looks at every value.

    Raises:
        SnapshotCorrupt, SnapshotIncompatible: As `decode`, or a value is NaN or infinite.
    """
    checkpoint = decode(record)
    for what, values in (("carry", checkpoint.carry), ("memory", checkpoint.memory)):
        # What is of another type or layout is refused where the model is known.
        floats = np.frombuffer(values, dtype="<f4", count=len(values) // 4)
        if checkpoint.header.dtype == "float32" and not np.isfinite(floats).all():
            raise SnapshotCorrupt(
                f"the snapshot is damaged: its {what} has a NaN or an infinite value"
            )
    return checkpoint


def _read_header(data: bytes, version: int) -> Header:
    try:
        fields = json.loads(data)
        header = Header(**fields)
        if ("memory_bytes" in fields) != (version >= MEMORY_FORMAT_VERSION):
            raise ValueError("a field of another format")
    except (ValueError, TypeError, RecursionError) as error:
        raise SnapshotCorrupt("the snapshot is damaged: its header cannot be read") from error
    if not _well_formed(header):
        raise SnapshotCorrupt("the snapshot is damaged: its header has an impossible value")
    return header


def _well_formed(header: Header) -> bool:
    """Whether a session here could have written it; a right checksum says nothing of that."""
    names = (header.model, header.model_digest, header.dtype)
    sizes = (header.carry_bytes, header.memory_bytes)
    numbers = (header.version, header.epoch, header.step, *sizes)
    return (
        all(type(text) is str for text in (header.session_id, header.principal, *names))
        and SESSION_ID.fullmatch(header.session_id) is not None
        and all(text.isprintable() for text in (header.principal, *names))
        and all(len(text) <= NAME_CHARACTERS_MAX for text in names)
        and all(type(number) is int and 0 <= number <= STEP_MAX for number in numbers)
    )
