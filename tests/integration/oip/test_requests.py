"""Requests by hand: the ways to write one, and the ways to get one wrong, which change nothing."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator
from itertools import count
from typing import Any

import numpy as np
import pytest

from tests.integration.oip.protocol import Protocol, output, request
from tests.integration.process import ServerProcess
from tests.integration.wire import Refusal, Wire, refused

IDS = count(1_000_000)
ROW = np.array([[0.5, -1.0, 2.0]], dtype=np.float32)
WORD = np.array([[3]], dtype=np.int32)
INVALID_FIELD = Refusal("INVALID_ARGUMENT", "INVALID_FIELD")
INVALID_SHAPE = Refusal("INVALID_ARGUMENT", "INVALID_SHAPE")
OUT_OF_RANGE = Refusal("INVALID_ARGUMENT", "TOKEN_OUT_OF_RANGE")
NOT_SUPPORTED = Refusal("UNIMPLEMENTED", "NOT_SUPPORTED")


async def first_output(protocol: Protocol, model: str, rows: Any, **parts: Any) -> bytes:
    """What a fresh sequence answers."""
    answer = await protocol.infer(model, rows, next(IDS), start=True, end=True, **parts)
    return output(answer).tobytes()


@pytest.mark.parametrize("dtype", ["<i1", "<i2", "<i4", "<i8", "<f2", "<f4", "<f8"])
async def test_features_of_any_numeric_type_are_taken(protocol: Protocol, dtype: str) -> None:
    values = np.array([[1, -2, 3]])
    expected = await first_output(protocol, "tiny", values.astype(np.float32))
    names = {"i": "INT", "f": "FP"}
    given = values.astype(dtype)
    datatype = f"{names[given.dtype.kind]}{8 * given.dtype.itemsize}"
    raw = {"raw": given.tobytes(), "datatype": datatype, "shape": (1, 1, 3)}
    assert await first_output(protocol, "tiny", given, **raw) == expected


@pytest.mark.parametrize("dtype", ["?", "<u1", "<u2", "<u4", "<u8"])
async def test_so_are_those_without_a_sign(protocol: Protocol, dtype: str) -> None:
    values = np.array([[1, 0, 1]])
    expected = await first_output(protocol, "tiny", values.astype(np.float32))
    given = values.astype(dtype)
    datatype = "BOOL" if dtype == "?" else f"UINT{8 * given.dtype.itemsize}"
    raw = {"raw": given.tobytes(), "datatype": datatype, "shape": (1, 1, 3)}
    assert await first_output(protocol, "tiny", given, **raw) == expected


async def test_bfloat16_is_taken(protocol: Protocol) -> None:
    expected = await first_output(protocol, "tiny", ROW)  # all its values are exact in it
    raw = (ROW.view("<u4") >> 16).astype("<u2").tobytes()
    assert await first_output(protocol, "tiny", ROW, datatype="BF16", raw=raw) == expected


@pytest.mark.parametrize(
    ("datatype", "contents"),
    [
        ("FP32", {"fp32_contents": [1, 0, 1]}),
        ("FP64", {"fp64_contents": [1, 0, 1]}),
        ("INT8", {"int_contents": [1, 0, 1]}),
        ("INT16", {"int_contents": [1, 0, 1]}),
        ("INT32", {"int_contents": [1, 0, 1]}),
        ("INT64", {"int64_contents": [1, 0, 1]}),
        ("UINT8", {"uint_contents": [1, 0, 1]}),
        ("UINT32", {"uint_contents": [1, 0, 1]}),
        ("UINT64", {"uint64_contents": [1, 0, 1]}),
        ("BOOL", {"bool_contents": [True, False, True]}),
    ],
)
async def test_typed_contents_are_taken(
    protocol: Protocol, datatype: str, contents: dict[str, Any]
) -> None:
    row = np.array([[1, 0, 1]], dtype=np.float32)
    expected = await first_output(protocol, "tiny", row)
    typed = {"datatype": datatype, "contents": contents}
    assert await first_output(protocol, "tiny", row, **typed) == expected


async def test_tokens_are_taken_by_number_and_by_label(protocol: Protocol) -> None:
    expected = await first_output(protocol, "words", WORD)
    for dtype, datatype in (("<i8", "INT64"), ("<u1", "UINT8")):
        raw = WORD.astype(dtype).tobytes()
        parts = {"datatype": datatype, "raw": raw}
        assert await first_output(protocol, "words", WORD, **parts) == expected
    typed = {"datatype": "INT32", "contents": {"int_contents": [3]}}
    assert await first_output(protocol, "words", WORD, **typed) == expected

    spoken = {"datatype": "BYTES", "raw": struct.pack("<I", 4) + b"drei"}
    assert await first_output(protocol, "spoken", WORD, **spoken) == expected
    typed = {"datatype": "BYTES", "contents": {"bytes_contents": [b"drei"]}}
    assert await first_output(protocol, "spoken", WORD, **typed) == expected


async def test_a_tensor_without_a_dimension_for_steps_is_one_step(protocol: Protocol) -> None:
    sequence = next(IDS)
    flat = await protocol.infer("tiny", ROW, sequence, start=True, shape=(1, 3))
    assert list(flat.outputs[0].shape) == [1, 2]
    stacked = await protocol.infer("tiny", ROW, sequence, start=True)
    assert list(stacked.outputs[0].shape) == [1, 1, 2]
    assert flat.raw_output_contents == stacked.raw_output_contents


@pytest.fixture
async def live(protocol: Protocol) -> AsyncIterator[tuple[Protocol, int]]:
    """A sequence after one step; after the test its second step has to be what it would be."""
    sequence, other = next(IDS), next(IDS)
    await protocol.infer("tiny", ROW, sequence, start=True)
    yield protocol, sequence
    after = await protocol.infer("tiny", ROW, sequence)
    await protocol.infer("tiny", ROW, other, start=True)
    untouched = await protocol.infer("tiny", ROW, other)
    assert after.raw_output_contents == untouched.raw_output_contents


WRONG: dict[str, tuple[dict[str, Any], Refusal, str]] = {
    "two in the batch": (
        {"shape": (2, 1, 3), "raw": ROW.tobytes() * 2},
        INVALID_SHAPE,
        "must be 1",
    ),
    "none in the batch": ({"shape": (0, 1, 3), "raw": b""}, INVALID_SHAPE, "must be 1"),
    "a wrong size": ({"shape": (1, 1, 2)}, INVALID_SHAPE, "unexpected shape"),
    "too few dimensions": ({"shape": (3,)}, INVALID_SHAPE, "unexpected shape"),
    "too many dimensions": ({"shape": (1, 1, 1, 3)}, INVALID_SHAPE, "unexpected shape"),
    "a negative dimension": ({"shape": (1, -1, 3)}, INVALID_SHAPE, "unexpected shape"),
    "half an element of FP64": (
        {"datatype": "FP64", "raw": bytes(8 * 3 + 4)},
        INVALID_SHAPE,
        "has 28 bytes, not a multiple",
    ),
    "half an element of BF16": (
        {"datatype": "BF16", "raw": bytes(2 * 3 + 1)},
        INVALID_SHAPE,
        "has 7 bytes, not a multiple",
    ),
    "too few bytes": ({"raw": ROW.tobytes()[:-1]}, INVALID_SHAPE, "takes 12 "),
    "too many bytes": ({"raw": ROW.tobytes() * 2}, INVALID_SHAPE, "got 24 bytes"),
    "half an element": ({"datatype": "INT64", "raw": b"12345"}, INVALID_SHAPE, "not a multiple"),
    "too few elements": ({"datatype": "INT8", "raw": b"12"}, INVALID_SHAPE, "count 2, expected 3"),
    "too few typed": (
        {"contents": {"fp32_contents": [1.0]}},
        INVALID_SHAPE,
        "count 1, expected 3",
    ),
    "nothing": ({"contents": {}}, INVALID_SHAPE, "count 0, expected 3"),
    "no step": (
        {"shape": (1, 0, 3), "raw": b""},
        Refusal("INVALID_ARGUMENT", "EMPTY_CHUNK"),
        "has 0 steps",
    ),
    "NaN": (
        {"raw": np.full(3, np.nan, np.float32).tobytes()},
        Refusal("INVALID_ARGUMENT", "NON_FINITE_INPUT"),
        "NaN",
    ),
    "beyond FP32": (
        {"datatype": "FP64", "raw": np.full(3, 1e300).tobytes()},
        Refusal("INVALID_ARGUMENT", "NON_FINITE_INPUT"),
        "input[0, 0] is infinite",
    ),
    "beyond INT8": (
        {"datatype": "INT8", "contents": {"int_contents": [1, 2, 300]}},
        INVALID_FIELD,
        "does not fit its datatype INT8",
    ),
    "both contents": (
        {"contents": {"fp32_contents": [1, 2, 3]}, "raw": ROW.tobytes()},
        INVALID_FIELD,
        "either contents or",
    ),
    "an unknown type": ({"datatype": "FP7"}, INVALID_FIELD, "data-type is 'FP7', but model 'tiny'"),
    "no type": (
        {"datatype": "FP16", "contents": {"fp32_contents": [1, 2, 3]}},
        INVALID_FIELD,
        "expects 'FP32'",
    ),
    "texts": ({"datatype": "BYTES", "raw": b"\0" * 12}, INVALID_FIELD, "expects 'FP32'"),
    "an unknown input": ({"name": "X"}, INVALID_FIELD, "unexpected inference input 'X'"),
    "an unknown output": ({"outputs": ("OUTPUT", "X")}, INVALID_FIELD, "inference output 'X'"),
    "version x": ({"version": "x"}, INVALID_FIELD, "version"),
    "version 0": ({"version": "0"}, INVALID_FIELD, "'tiny' version 0 is not found; versions"),
    "version 9": ({"version": "9"}, INVALID_FIELD, "'tiny' version 9 is not found; it has 1"),
    "start of a text": (
        {"parameters": {"sequence_start": {"string_param": "true"}}},
        INVALID_FIELD,
        "'sequence_start' must be a bool",
    ),
    "end of a number": (
        {"parameters": {"sequence_end": {"int64_param": 1}}},
        INVALID_FIELD,
        "'sequence_end' must be a bool",
    ),
    "timeout of a text": (
        {"parameters": {"timeout": {"string_param": "1"}}},
        INVALID_FIELD,
        "'timeout' must be an integer",
    ),
    "a negative timeout": (
        {"parameters": {"timeout": {"int64_param": -1}}},
        INVALID_FIELD,
        "'timeout' must be an integer",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
async def test_what_is_wrong_is_refused_and_changes_nothing(
    live: tuple[Protocol, int], wrong: str
) -> None:
    protocol, sequence = live
    parts, expected, words = WRONG[wrong]
    for flags in ({}, {"start": True}, {"end": True}):
        found = await refused(protocol.infer("tiny", ROW, sequence, **flags, **parts))
        assert found == expected
        assert words in found.message


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"bool_param": True}, "'sequence_id' must be an integer or a string"),
        ({"double_param": 5.0}, "'sequence_id' must be an integer or a string"),
        ({}, "'sequence_id' must be an integer or a string"),
        ({"string_param": 129 * "s"}, "more than 128"),
        ({"string_param": ""}, "must specify a non-zero or non-empty correlation ID"),
        ({"int64_param": 0}, "must specify a non-zero or non-empty correlation ID"),
        ({"uint64_param": 0}, "must specify a non-zero or non-empty correlation ID"),
    ],
)
async def test_a_sequence_id_has_a_type_and_a_value(
    protocol: Protocol, value: dict[str, Any], words: str
) -> None:
    parameters = {"sequence_id": value}
    found = await refused(protocol.infer("tiny", ROW, start=True, parameters=parameters))
    assert found == INVALID_FIELD
    assert words in found.message


async def test_number_and_shape_of_tensors_are_checked(protocol: Protocol) -> None:
    for change in ("no inputs", "two inputs", "two contents"):
        message = request("tiny", ROW, next(IDS), start=True)
        if change == "no inputs":
            del message.inputs[:]
        elif change == "two inputs":
            message.inputs.add(name="INPUT", datatype="FP32", shape=(1, 1, 3))
        else:
            message.raw_input_contents.append(b"")
        assert await refused(protocol.stub.ModelInfer(message)) == INVALID_FIELD, change


async def test_shared_memory_and_classes_are_refused(protocol: Protocol) -> None:
    message = request("tiny", ROW, next(IDS), start=True)
    message.inputs[0].parameters["shared_memory_region"].string_param = "region"
    del message.raw_input_contents[:]
    assert await refused(protocol.stub.ModelInfer(message)) == NOT_SUPPORTED
    for parameter in ("shared_memory_region", "classification"):
        message = request("tiny", ROW, next(IDS), start=True, outputs=("OUTPUT",))
        message.outputs[0].parameters[parameter].int64_param = 1
        assert await refused(protocol.stub.ModelInfer(message)) == NOT_SUPPORTED


async def test_tokens_outside_the_vocabulary_are_refused(protocol: Protocol) -> None:
    for datatype, raw, expected in (
        ("INT32", np.int32(7).tobytes(), OUT_OF_RANGE),
        ("INT32", np.int32(-1).tobytes(), OUT_OF_RANGE),
        ("INT64", np.int64(2**32 + 3).tobytes(), OUT_OF_RANGE),
        ("FP32", np.float32(3).tobytes(), INVALID_FIELD),
        ("BYTES", struct.pack("<I", 1) + b"d", INVALID_FIELD),  # it has no labels
    ):
        parts = {"datatype": datatype, "raw": raw}
        assert await refused(first_output(protocol, "words", WORD, **parts)) == expected, datatype


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (struct.pack("<I", 4) + b"zehn", OUT_OF_RANGE),
        (struct.pack("<I", 5) + b"drei", INVALID_SHAPE),
        (b"\1\0\0", INVALID_SHAPE),
        (b"", INVALID_SHAPE),
        ((struct.pack("<I", 4) + b"drei") * 2, INVALID_SHAPE),
    ],
)
async def test_labels_are_checked(protocol: Protocol, raw: bytes, expected: Refusal) -> None:
    parts = {"datatype": "BYTES", "raw": raw}
    assert await refused(first_output(protocol, "spoken", WORD, **parts)) == expected


async def test_the_longest_chunk_is_taken_and_one_step_more_is_not(protocol: Protocol) -> None:
    rows = np.zeros((9, 3), dtype=np.float32)
    await first_output(protocol, "short", rows[:8])
    assert await refused(first_output(protocol, "short", rows)) == Refusal(
        "INVALID_ARGUMENT", "CHUNK_TOO_LONG"
    )


async def test_ids_of_different_kinds_are_different_sequences(
    server: ServerProcess, protocol: Protocol
) -> None:
    """And a number sent as it is, or cast to a signed one, is the same."""
    big = 2**64 - 5
    await protocol.infer("tiny", ROW, -5, start=True)
    cast = {"sequence_id": {"uint64_param": big}}
    await protocol.infer("tiny", ROW, parameters=cast)
    for sequence in (str(big), "-5", big - 2**64 + 1):
        found = await refused(protocol.infer("tiny", ROW, sequence))
        assert "START" in found.message, sequence
    assert f"sequence {big + 1} " in found.message
    found = await refused(protocol.infer("short", ROW, -5))  # each model has its own
    assert "START" in found.message
    async with Wire(server.address) as wire:
        view = await wire.get(f"oip.i:tiny:{big}")
        assert (view.applied_step, view.model) == (2, "tiny")


async def test_any_text_is_an_id(server: ServerProcess, protocol: Protocol) -> None:
    ids = ["plain-1", "with space", "ä/ß", 128 * "x", 127 * "x" + "y", "\n"]
    for sequence in ids:
        await protocol.infer("tiny", ROW, sequence, start=True)
    for sequence in ids:
        await protocol.infer("tiny", ROW, sequence)
    async with Wire(server.address) as wire:
        assert (await wire.get("oip.s:tiny:plain-1")).applied_step == 2
