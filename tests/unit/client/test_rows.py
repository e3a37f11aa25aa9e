"""Packing: whatever array goes in, its bytes are the rows."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from conveyor_client import InvalidMemory, NonFiniteInput, TokenOutOfRange
from conveyor_client._nouns import ModelInfo, model_from_proto
from conveyor_client._policy import Reconnect
from conveyor_client._rows import RowCodec, pack_memory
from tests.unit.client.fake.models import COUNTER, TOKENS

FLOATS = RowCodec(model_from_proto(COUNTER))
INTS = RowCodec(model_from_proto(TOKENS))


@given(
    hnp.arrays(
        st.sampled_from(["<f4", ">f4", "<f8", "<i8", "u1", "?", "<f2"]),
        st.tuples(st.integers(1, 20), st.just(2)),
        elements={"allow_nan": False, "allow_infinity": False},
    )
)
def test_features_are_packed_as_float32(array: npt.NDArray[np.generic]) -> None:
    with np.errstate(over="ignore"):
        wanted = array.astype("<f4")
    for layout in (array, np.asfortranarray(array), array[::-1][::-1]):
        rows, length, single = FLOATS.encode(layout)
        assert (rows, length, single) == (wanted.tobytes(), len(array), False)
    rows, length, single = FLOATS.encode(array[0])
    assert (rows, length, single) == (wanted[0].tobytes(), 1, True)


@given(hnp.arrays(st.sampled_from(["<i4", "<i8", "u1", "<u4", ">i2"]), st.integers(1, 30)))
def test_tokens_are_packed_or_refused(array: npt.NDArray[np.generic]) -> None:
    fits = all(-(2**31) <= int(value) < 2**31 for value in array)
    if fits:
        assert INTS.encode(array) == (array.astype("<i4").tobytes(), len(array), False)
    else:
        with pytest.raises(TokenOutOfRange):
            INTS.encode(array)


def test_outputs_are_unpacked_into_their_own_memory() -> None:
    rows = np.arange(6, dtype="<f4").tobytes()
    many = INTS.decode(rows, single=False)
    assert many.tolist() == [[0, 1, 2], [3, 4, 5]]
    many[0, 0] = 9
    assert INTS.decode(rows[:12], single=True).tolist() == [0, 1, 2]
    assert INTS.decode(b"", single=False).shape == (0, 3)


def test_memory_is_packed_row_after_row() -> None:
    memory = pack_memory([[1, 2, 3], [4, 5, 6]])
    assert memory.length == 2
    assert np.frombuffer(memory.rows, "<f4").tolist() == [1, 2, 3, 4, 5, 6]
    columns = np.arange(6.0).reshape(3, 2).T  # not contiguous, and float64
    assert np.frombuffer(pack_memory(columns).rows, "<f4").tolist() == [0, 2, 4, 1, 3, 5]


@pytest.mark.parametrize(
    ("memory", "error", "message"),
    [
        ([1, 2, 3], InvalidMemory, r"integers of shape \(3,\)"),
        (np.ones((1, 2, 3)), InvalidMemory, r"floats of shape \(1, 2, 3\)"),
        (np.ones((0, 3)), InvalidMemory, r"floats of shape \(0, 3\)"),
        (np.ones((3, 0)), InvalidMemory, r"floats of shape \(3, 0\)"),
        ([["a"]], InvalidMemory, r"text of shape \(1, 1\)"),
        ([[1j]], InvalidMemory, "complex numbers"),
        ([[1], [1, 2]], InvalidMemory, "different lengths"),
        ([[1, 2], [3, float("nan")]], NonFiniteInput, "row 1"),
        ([[1e39, 2]], NonFiniteInput, "row 0"),
    ],
)
def test_what_is_no_memory_is_refused_here(
    memory: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        pack_memory(memory)  # type: ignore[arg-type]


def test_text_maps_to_tokens_by_the_labels() -> None:
    model: ModelInfo = model_from_proto(TOKENS)
    assert model.input.decode(model.input.encode("dabc")) == "dabc"
    assert model.input.encode("").shape == (0,)
    with pytest.raises(TokenOutOfRange, match="'z'"):
        model.input.encode("abz")
    with_other = type(model.input)("int32", 1, 4, 2, ("a", "\ufffd"))
    assert with_other.encode("azé").tolist() == [0, 1, 1]


@given(st.integers(1, 10_000))
def test_waits_grow_and_stay_bounded(attempt: int) -> None:
    reconnect = Reconnect(backoff_seconds_min=0.1, backoff_seconds_max=2.0)
    waits = [reconnect.wait_seconds(attempt) for _ in range(20)]
    assert min(waits) >= 0
    assert max(waits) <= min(0.1 * 2 ** min(attempt - 1, 10), 2.0)
