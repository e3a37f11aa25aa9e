"""Inputs with names are matched by the model's labels; a wrong order cannot pass unseen."""

from collections import namedtuple
from dataclasses import replace
from typing import Any

import narwhals
import numpy as np
import pandas as pd
import pytest

import conveyor_client
from conveyor_client import InvalidMemory, InvalidShape, NonFiniteInput, aio
from conveyor_client._nouns import model_from_proto
from conveyor_client._rows import RowCodec, pack_memory
from tests.unit.client.conftest import QUICK
from tests.unit.client.fake.models import COUNTER, TOKENS
from tests.unit.client.fake.server import FakeServer

MODEL = model_from_proto(COUNTER)
FLOATS = RowCodec(MODEL)
INTS = RowCodec(model_from_proto(TOKENS))
UNLABELLED = RowCodec(replace(MODEL, input=replace(MODEL.input, labels=())))

FRAME = pd.DataFrame({"right": [2, 4], "left": [1.0, 3.0]})
"""The columns of `counter` in another order than its own, left before right."""
RECORDS = FRAME.to_records(index=False)
Swapped = namedtuple("Swapped", ["right", "left"])


class Arrow:
    """A table as Arrow has it: `columns` are values, and the names lie elsewhere."""

    column_names = ("right", "left")
    columns = (np.array([2, 4]), np.array([1.0, 3.0]))

    def __getitem__(self, name: str) -> Any:
        return self.columns[self.column_names.index(name)]


class Compound:
    """An array that only NumPy's protocol shows to be structured."""

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return np.array(RECORDS)


CHUNKS: dict[str, Any] = {
    "pandas": FRAME,
    "pandas with nullable types": FRAME.convert_dtypes(),
    "pandas without names, in order": pd.DataFrame([[1, 2], [3, 4]]),
    "another library of tables": narwhals.from_native(FRAME),
    "Arrow": Arrow(),
    "structured array": np.array(RECORDS),
    "record array": RECORDS,
    "structured by protocol": Compound(),
    "columns": FRAME.to_dict("list"),
    "list of dicts": FRAME.to_dict("records"),
    "list of series": [row for _, row in FRAME.iterrows()],
    "list of records": list(RECORDS),
    "list of named tuples": list(FRAME.itertuples(index=False)),
    "list of both kinds": [[1, 2], {"right": 4, "left": 3}],
    "plain": [[1, 2], [3, 4]],
}
STEPS: dict[str, Any] = {
    "series": FRAME.iloc[0],
    "series without names": pd.Series([1, 2]),
    "record": RECORDS[0],
    "dict": {"right": 2, "left": 1},
    "dict of arrays without dimensions": {"right": np.float32(2), "left": np.array(1)},
    "named tuple": Swapped(2, 1),
    "plain": (1, 2),
}


@pytest.mark.parametrize("inputs", CHUNKS.values(), ids=CHUNKS.keys())
def test_a_chunk_has_its_columns_in_the_models_order(inputs: Any) -> None:
    rows, length, single = FLOATS.encode(inputs)
    assert (np.frombuffer(rows, "<f4").tolist(), length, single) == ([1, 2, 3, 4], 2, False)


@pytest.mark.parametrize("inputs", STEPS.values(), ids=STEPS.keys())
def test_a_step_has_its_values_in_the_models_order(inputs: Any) -> None:
    rows, length, single = FLOATS.encode(inputs)
    assert (np.frombuffer(rows, "<f4").tolist(), length, single) == ([1, 2], 1, True)


TAKES = "counter takes left, right, in any order"
REFUSED: dict[str, tuple[Any, str]] = {
    "unknown": (FRAME.assign(up=1), f"unknown column: up; {TAKES}"),
    "missing": (FRAME[["left"]], f"missing column: right; {TAKES}"),
    "both": (
        FRAME.rename(columns={"left": "Left"}),
        f"unknown column: Left; missing column: left; {TAKES}",
    ),
    "duplicate": (pd.concat([FRAME, FRAME[["left"]]], axis=1), f"duplicate column: left; {TAKES}"),
    "numbers in another order": (
        pd.DataFrame([[1, 2]])[[1, 0]],
        f"unknown column: 1, 0; missing column: left, right; {TAKES}",
    ),
    "an index of the records": (FRAME.to_records(), f"unknown field: index; {TAKES}"),
    "an index of the tuples": (list(FRAME.itertuples()), f"unknown field: Index; {TAKES}"),
    "times": (
        pd.Series([1, 2], index=pd.date_range("2020-01-01", periods=2)),
        "unknown index entry: 2020-01-01 00:00:00, 2020-01-02 00:00:00;"
        f" missing index entry: left, right; {TAKES}",
    ),
    "empty mapping": ({}, f"missing key: left, right; {TAKES}"),
    "in a list": ([{"left": 1}], f"missing key: right; {TAKES}"),
    "one column too many of a thousand": (
        dict.fromkeys(("left", "right", *(f"f{n}" for n in range(1000))), 1),
        f"unknown key: f0, f1, f2, f3, f4, f5, f6, f7 and 992 more; {TAKES}",
    ),
    "text": (FRAME.astype({"left": str}), "column 'left' does not hold numbers, one for each step"),
    "matrices": (
        np.zeros(2, [("right", "f4"), ("left", "f4", (3,))]),
        "field 'left' does not hold numbers, one for each step",
    ),
    "ragged column": (
        {"left": [[1], [1, 2]], "right": [1, 2]},
        "key 'left' is not an array of numbers",
    ),
    "lengths": ({"left": [1], "right": [1, 2]}, "keys of different lengths: (1,), (2,)"),
    "rows of different lengths": ([[1, 2], [3]], "rows of one length each"),
}


@pytest.mark.parametrize(("inputs", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_does_not_match_is_refused(inputs: Any, message: str) -> None:
    with pytest.raises(InvalidShape) as caught:
        FLOATS.encode(inputs)
    assert message in str(caught.value)
    assert caught.value.reason == "INVALID_SHAPE"


@pytest.mark.parametrize(
    "inputs",
    [FRAME, RECORDS, {"left": 1, "right": 2}, FRAME.iloc[0], Swapped(1, 2), [Swapped(1, 2)]],
    ids=["pandas", "records", "dict", "series", "named tuple", "list"],
)
def test_names_that_nothing_can_be_held_against_are_refused(inputs: Any) -> None:
    with pytest.raises(InvalidShape, match=r"counter has no labels for its inputs, so .* named"):
        UNLABELLED.encode(inputs)


def test_positions_are_taken_where_there_are_no_labels() -> None:
    for inputs in (FRAME.to_numpy(), pd.DataFrame([[2, 1], [4, 3]])):
        rows, _, _ = UNLABELLED.encode(inputs)
        assert np.frombuffer(rows, "<f4").tolist() == [2, 1, 4, 3]


def test_tokens_are_a_series_or_a_column_called_token() -> None:
    hours = pd.date_range("2020-01-01", periods=2)
    for inputs in (
        pd.Series([3, 1], index=hours),
        pd.Series([3, 1], index=["x", "y"]),
        pd.DataFrame({"token": [3, 1]}),
        {"token": [3, 1]},
    ):
        rows, length, single = INTS.encode(inputs)
        assert (np.frombuffer(rows, "<i4").tolist(), length, single) == ([3, 1], 2, False)
    assert INTS.encode({"token": 3})[1:] == (1, True)
    with pytest.raises(InvalidShape, match="unknown column: letter; missing column: token"):
        INTS.encode(pd.DataFrame({"letter": [3, 1]}))
    with pytest.raises(InvalidShape, match="'token' does not hold integers"):
        INTS.encode({"token": 1.5})


def test_a_memory_takes_no_names() -> None:
    for memory in (FRAME, RECORDS, {"left": [1], "right": [2]}):
        with pytest.raises(InvalidMemory, match="columns of a memory have no names"):
            pack_memory(memory)  # type: ignore[arg-type]
    assert pack_memory(FRAME.to_numpy()).length == 2


def test_masked_values_are_refused() -> None:
    masked = np.ma.masked_array([[1.0, 2.0], [3.0, 4.0]], [[False, True], [False, False]])
    with pytest.raises(NonFiniteInput, match="masked values in the inputs"):
        FLOATS.encode(masked)
    with pytest.raises(NonFiniteInput, match="masked values in the memory"):
        pack_memory(masked)
    assert FLOATS.encode(masked[1:])[1] == 1


SUMS = [[1, 2], [4, 6]]


async def test_every_call_of_the_asynchronous_client(client: aio.Client) -> None:
    assert (await client.predict("counter", FRAME)).tolist() == SUMS
    async with client.session("counter", session_id="one") as session:
        assert (await session.step(FRAME)).tolist() == SUMS
        output, _ = await session.step_with_trace({"right": 0, "left": 0})
        assert output.tolist() == [4, 6]
        await session.detach()
    result = await client.step("one", FRAME.iloc[0], first_step=4)
    assert result.output.tolist() == [5, 8]
    made = await client.generate("counter", FRAME, steps_max=1)
    async with made:
        assert [np.asarray(row).tolist() async for row in made] == [[4, 6]]


@pytest.mark.parametrize(
    "table", [FRAME, RECORDS, FRAME.to_dict("list"), Arrow()], ids=["pandas", "records", "d", "a"]
)
async def test_a_stream_walks_through_the_rows_of_a_table(client: aio.Client, table: Any) -> None:
    async with client.session("counter") as session:
        assert [out.tolist() async for out in session.stream(table)] == SUMS
        one = [out.tolist() async for out in session.stream({"right": 1, "left": 0})]
        assert one == [[4, 7]]
        with pytest.raises(InvalidShape, match="unknown column: up"):
            async for _ in session.stream(FRAME.assign(up=1)):
                pass
        assert session.applied_step == 3


def test_the_blocking_client_does_the_same(threaded_server: FakeServer) -> None:
    with conveyor_client.Client(threaded_server.target, options=QUICK) as client:
        assert client.predict("counter", RECORDS).tolist() == SUMS
        with client.session("counter") as session:
            assert session.step(FRAME).tolist() == SUMS
            assert session.step(FRAME.iloc[0]).tolist() == [5, 8]
            session.reset()
            assert [out.tolist() for out in session.stream(FRAME)] == SUMS
            session.reset()
            assert [out.tolist() for out, _ in session.stream_with_trace(FRAME)] == SUMS
            with pytest.raises(InvalidShape, match="missing column: right"):
                session.step(FRAME[["left"]])
            with pytest.raises(InvalidShape, match="missing column: right"):
                list(session.stream(FRAME[["left"]]))
            assert session.applied_step == 2
