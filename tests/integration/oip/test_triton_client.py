"""The real client, in a process of its own, against a real server."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pytest
import torch

from conveyor_models import Bundle
from tests.integration.conftest import ZOO, StartServer
from tests.integration.oip.conftest import RunProgram
from tests.integration.process import ServerProcess

GUIDE: Final = Path(__file__).parents[3] / "docs" / "guides" / "triton.md"
UNKNOWN = "Request for unknown model: '{}' is not found; this server has broad, deep, explosive,"
INVALID = "StatusCode.INVALID_ARGUMENT"
UNIMPLEMENTED = "StatusCode.UNIMPLEMENTED"


def reference(bundle: Bundle, rows: Any) -> npt.NDArray[np.float64]:
    x = torch.from_numpy(np.asarray(rows, dtype=np.float32))
    _, out = bundle.network(torch.float64).run(x[:, None])
    return out[:, 0].numpy()


def close(actual: Any, expected: Any) -> bool:
    return np.allclose(np.asarray(actual), np.asarray(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "ids", [(1000, 1001), ("one", "two"), (7, "7"), (2**63 - 1, "x y/" + 124 * "z")]
)
def test_the_example_of_the_protocol_runs_unchanged(
    server: ServerProcess, run_program: RunProgram, ids: tuple[int | str, int | str]
) -> None:
    values = [11, 7, 5, 3, 2, 0, 1]
    sequences = [[ids[0], [0, *values]], [ids[1], [100, *(-value for value in values)]]]
    found = run_program("example", server.address, model="plus-one", sequences=sequences)
    expected = [[1, *values], [101, *(-value for value in values)]]
    assert found == {"calls": expected, "stream": expected}


def test_a_client_can_ask_what_there_is(server: ServerProcess, run_program: RunProgram) -> None:
    seen = run_program("describe", server.address, model="tiny")
    assert seen["live"]
    assert seen["ready"]
    assert seen["model_ready"] == {"newest": True, "1": True, "7": False, "unknown": False}
    assert seen["server"]["name"] == "conveyor"
    assert {"sequence", "sequence(string_id)", "statistics"} <= set(seen["server"]["extensions"])
    metadata, config = seen["metadata"], seen["config"]
    assert (metadata["name"], metadata["versions"]) == ("tiny", ["1"])
    assert metadata["inputs"] == [{"name": "INPUT", "datatype": "FP32", "shape": ["-1", "-1", "3"]}]
    assert metadata["outputs"] == [
        {"name": "OUTPUT", "datatype": "FP32", "shape": ["-1", "-1", "2"]}
    ]
    assert config["max_batch_size"] == 1
    assert config["input"] == [{"name": "INPUT", "data_type": "TYPE_FP32", "dims": ["-1", "3"]}]
    assert config["output"] == [{"name": "OUTPUT", "data_type": "TYPE_FP32", "dims": ["-1", "2"]}]
    assert config["sequence_batching"]["max_sequence_idle_microseconds"] == "600000000"
    assert {"name": "words", "version": "1", "state": "READY"} in seen["index"]
    assert {each["name"] for each in seen["statistics"]} == {each["name"] for each in seen["index"]}


def test_what_is_not_served_is_refused_in_the_words_of_the_protocol(
    server: ServerProcess, run_program: RunProgram
) -> None:
    refused = run_program("describe", server.address, model="tiny")["refused"]
    for call in ("metadata of unknown", "statistics of unknown"):
        answer = refused.pop(call)
        assert answer["status"] == INVALID
        assert answer["message"].startswith(UNKNOWN.format("unknown"))
    assert refused.pop("config of version 7") == {
        "status": INVALID,
        "message": "Request for unknown model: 'tiny' version 7 is not found; it has 1",
    }
    assert refused.pop("config of version x")["status"] == INVALID
    assert len(refused) == 10
    for call, answer in refused.items():
        assert answer["status"] == UNIMPLEMENTED, call
        assert "this server" in answer["message"], call


def test_calls_step_a_sequence_and_say_why_not(
    server: ServerProcess, run_program: RunProgram, bundles: dict[str, Bundle]
) -> None:
    rows = np.random.default_rng(5).standard_normal((4, 3)).astype(np.float32).tolist()

    def call(values: Any, sequence: Any = 0, **options: Any) -> dict[str, Any]:
        return {
            "model": "tiny",
            "values": [values],
            "dtype": "float32",
            "sequence_id": sequence,
            **options,
        }

    seen = run_program(
        "calls",
        server.address,
        calls=[
            call(rows[:2], 5, sequence_start=True, request_id="first"),
            call(rows[2:3], 5, model_version="1", timeout=60_000_000, priority=3),
            call(rows[3:], 5, sequence_end=True, parameters={"colour": "red"}),
            call(rows[3:], 5),
            call(rows[3:]),
            call(rows[3:], ""),
            {**call(rows[3:], 5), "model": "unknown"},
            {**call(rows, 5, sequence_start=True), "values": [rows, rows]},
        ],
    )
    out = np.concatenate([each["output"][0] for each in seen[:3]])
    assert close(out, reference(bundles["tiny"], rows))
    assert [(each["id"], each["model"], each["version"]) for each in seen[:2]] == [
        ("first", "tiny", "1"),
        ("", "tiny", "1"),
    ]
    start = (
        "inference request for sequence 5 to model 'tiny' must specify the START flag on the first"
        " request of the sequence"
    )
    no_id = "inference request to model 'tiny' must specify a non-zero or non-empty correlation ID"
    assert [each["message"] for each in seen[3:6]] == [start, no_id, no_id]
    assert seen[6]["message"].startswith(UNKNOWN.format("unknown"))
    assert "batch-size" in seen[7]["message"]
    assert {each["status"] for each in seen[3:]} == {INVALID}


def test_sequences_on_one_stream_are_answered_in_the_order_of_their_requests(
    server: ServerProcess, run_program: RunProgram, bundles: dict[str, Bundle]
) -> None:
    random = np.random.default_rng(6)
    ids: list[int | str] = [1, 2, "1", "b"]
    rows = {repr(each): random.standard_normal((6, 3)).astype(np.float32) for each in ids}
    requests = [
        {
            "model": "tiny",
            "values": [[rows[repr(each)][step].tolist()]],
            "sequence_id": each,
            "sequence_start": step == 0,
            "sequence_end": step == 5,
            "request_id": f"{each!r} {step}",
        }
        for step in range(6)
        for each in ids
    ]
    lost = {"model": "tiny", "values": [[[0.0] * 3]], "sequence_id": 99, "request_id": "lost"}
    requests.insert(10, lost)
    answers = run_program("streams", server.address, requests=requests)
    failed = answers.pop(10)
    assert failed["message"].startswith("inference request for sequence 99 to model 'tiny' must")
    del requests[10]
    assert [each["id"] for each in answers] == [each["request_id"] for each in requests]
    assert all(each["final"] and each["version"] == "1" for each in answers)
    for each in ids:
        out = [a["output"][0][0] for a in answers if a["id"].startswith(f"{each!r} ")]
        assert close(out, reference(bundles["tiny"], rows[repr(each)]))


def test_a_sequence_may_begin_again_on_its_stream_at_once(
    server: ServerProcess, run_program: RunProgram, bundles: dict[str, Bundle]
) -> None:
    """After its END, and in its middle, nothing answered yet."""
    rows = np.random.default_rng(7).standard_normal((3, 3)).astype(np.float32)
    requests = [
        {
            "model": "tiny",
            "values": [[row.tolist()]],
            "sequence_id": 31,
            "sequence_start": step == 0,
            "sequence_end": step == 2 and life == 0,
        }
        for life in range(3)
        for step, row in enumerate(rows)
    ]
    answers = run_program("streams", server.address, requests=requests)
    expected = reference(bundles["tiny"], rows)
    assert close([each["output"][0][0] for each in answers], [*expected] * 3)


def test_an_error_ends_the_stream_where_the_client_asks_for_that(
    server: ServerProcess, run_program: RunProgram
) -> None:
    row = {"model": "tiny", "values": [[[0.0] * 3]]}
    requests = [
        {**row, "sequence_id": 41, "sequence_start": True, "request_id": "good"},
        {**row, "sequence_id": 42, "request_id": "bad"},
        {**row, "sequence_id": 41, "request_id": "late"},
    ]
    answers = run_program(
        "streams", server.address, requests=requests, headers={"triton_grpc_error": "true"}
    )
    assert answers[0]["id"] == "good"
    assert len(answers) == 2
    assert answers[1]["status"] == INVALID
    assert "sequence 42" in answers[1]["message"]


def test_the_asynchronous_client_works(
    server: ServerProcess, run_program: RunProgram, bundles: dict[str, Bundle]
) -> None:
    rows = np.random.default_rng(8).standard_normal((4, 3)).astype(np.float32)
    seen = run_program(
        "asynchronous", server.address, model="tiny", ids=[51, "fifty-two"], rows=rows.tolist()
    )
    expected = reference(bundles["tiny"], rows)
    assert close(seen["calls"], [expected, expected])
    for sequence in ("51", "fifty-two"):
        out = [each["output"][0][0] for each in seen["stream"] if each["id"] == sequence]
        assert close(out, expected)


def test_the_guides_program_runs(start_server: StartServer, tmp_path: Path) -> None:
    server = start_server({"shutdown.grace_seconds": 2}, models=ZOO)
    text = GUIDE.read_text(encoding="utf-8")
    program = tmp_path / "guide.py"
    source = text.partition("```python\n")[2].partition("```")[0]
    assert "127.0.0.1:50051" in source
    program.write_text(source.replace("127.0.0.1:50051", server.address), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, program], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 24


def test_perf_analyzers_calls_work_and_its_statistics_rise(
    server: ServerProcess, run_program: RunProgram
) -> None:
    for found in run_program("perf", server.address, model="single"):
        requests = found["requests"]
        assert requests > 4
        assert found["inferences"] == requests
        assert 0 < found["executions"] <= requests
        for part in ("success", "queue", "compute_input", "compute_infer", "compute_output"):
            count, nanoseconds = found[part]
            assert count == requests, part
            assert nanoseconds > 0, part
