"""The record of a session's state: one format for paging, for stores and for snapshots.

    offset  bytes
    0       4      "CVYR"
    4       2      format version, little-endian
    6       4      header length, little-endian
    10      ...    header, JSON in UTF-8
    ...     ...    carry, float32 little-endian
    last    32     SHA-256 of everything before it

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


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A session's state after `header.step` steps."""

    header: Header
    carry: bytes


def encode(checkpoint: Checkpoint) -> bytes:
    """Writes a record."""
    assert len(checkpoint.carry) == checkpoint.header.carry_bytes
    header = json.dumps(asdict(checkpoint.header), separators=(",", ":")).encode()
    prefix = _PREFIX.pack(MAGIC, FORMAT_VERSION, len(header))
    body = b"".join((prefix, header, checkpoint.carry))
    return body + hashlib.sha256(body).digest()


def decode(record: bytes) -> Checkpoint:
    """Reads a record.

    Raises:
        SnapshotCorrupt: Truncated, altered, or not a record at all.
        SnapshotIncompatible: Of a format this server does not read.
    """
    if len(record) < _PREFIX.size + _DIGEST_BYTES or not record.startswith(MAGIC):
        raise SnapshotCorrupt("not a snapshot")
    _, version, header_length = _PREFIX.unpack_from(record)
    if version != FORMAT_VERSION:
        raise SnapshotIncompatible(
            f"the snapshot has format {version}, this server reads {FORMAT_VERSION}"
        )
    body = record[:-_DIGEST_BYTES]
    if hashlib.sha256(body).digest() != record[-_DIGEST_BYTES:]:
        raise SnapshotCorrupt("the snapshot's checksum does not match")
    carry_start = _PREFIX.size + header_length
    if header_length > HEADER_BYTES_MAX or carry_start > len(body):
        raise SnapshotCorrupt("the snapshot's header is longer than the snapshot")
    header = _read_header(body[_PREFIX.size : carry_start])
    carry = body[carry_start:]
    if len(carry) != header.carry_bytes:
        raise SnapshotCorrupt(
            f"the snapshot holds {len(carry)} bytes of carry, its header says {header.carry_bytes}"
        )
    return Checkpoint(header, carry)


def check_fits(checkpoint: Checkpoint, model: ModelInfo) -> None:
    """Checks that the carry can be used with the model.

    Raises:
        SnapshotIncompatible: It is another model's, or laid out otherwise.
        SnapshotCorrupt: It has a NaN or an infinity.
    """
    header = checkpoint.header
    if header.model_digest != model.digest:
        raise SnapshotIncompatible(
            f"the snapshot is of model digest {header.model_digest}, the model's is {model.digest}"
        )
    if header.dtype != "float32" or header.carry_bytes != model.carry_bytes:
        raise SnapshotIncompatible("the snapshot's carry has another layout than the model's")
    if not np.isfinite(np.frombuffer(checkpoint.carry, dtype="<f4")).all():
        raise SnapshotCorrupt("the snapshot's carry has a NaN or an infinity")


def _read_header(data: bytes) -> Header:
    try:
        fields = json.loads(data)
        header = Header(**fields)
    except (ValueError, TypeError, RecursionError) as error:
        raise SnapshotCorrupt("the snapshot's header is not readable") from error
    if not _well_formed(header):
        raise SnapshotCorrupt("the snapshot's header has a field that no header can have")
    return header


def _well_formed(header: Header) -> bool:
    """Whether a session here could have written it; a right checksum says nothing of that."""
    names = (header.model, header.model_digest, header.dtype)
    numbers = (header.version, header.epoch, header.step, header.carry_bytes)
    return (
        all(type(text) is str for text in (header.session_id, header.principal, *names))
        and SESSION_ID.fullmatch(header.session_id) is not None
        and all(text.isprintable() for text in (header.principal, *names))
        and all(len(text) <= NAME_CHARACTERS_MAX for text in names)
        and all(type(number) is int and 0 <= number <= STEP_MAX for number in numbers)
    )
