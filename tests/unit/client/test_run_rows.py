"""What `conveyor run` takes as rows, how it says what it does not take, and how it ends."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from conveyor.v1 import model_pb2
from conveyor_client.cli._app import app
from tests.unit.client.fake.models import COUNTER
from tests.unit.client.fake.refusals import Refusal
from tests.unit.client.fake.server import FakeServer
from tests.unit.client.fake.sessions import State

OUTPUT = "left,right\n"


@pytest.fixture
def run_rows(threaded_server: FakeServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CONVEYOR_TARGET", threaded_server.target)

    def invoke(*arguments: str, stdin: str | bytes | None = None, status: int = 0) -> Result:
        result = CliRunner().invoke(app, ["run", *arguments], input=stdin)
        assert result.exit_code == status, (result.output, result.exception)
        return result

    return invoke


@pytest.mark.parametrize(
    ("model", "stdin", "message"),
    [
        ("counter", "1\n", "line 1: 1 field, expected 2"),
        ("counter", "1,2,3\n", "line 1: 3 fields, expected 2"),
        ("counter", "1,2\n\n1,2,3\n", "line 3: 3 fields, expected 2"),
        ("counter", "x,left,right\n1,2\n", "line 2: 2 fields, expected 3"),
        ("counter", "1,2\n1,x\n", "line 2: 'x' is not a number"),
        ("counter", "1,x\n", "line 1: 'x' is not a number"),
        ("counter", "1,\n", "line 1: '' is not a number"),
        ("counter", "1,nan\n", "line 1: 'nan' is not a finite float32"),
        ("counter", "1,2\n3,4\n5e39,1\n", "line 3: '5e39' is not a finite float32"),
        ("counter", "left,up\n", "the header has no column right; counter takes left, right"),
        ("counter", "left,left,right\n", "the header has column left more than once"),
        ("tokens", "1,2\n", "line 1: 2 fields, expected 1"),
        ("tokens", "token\n1\n1.5\n", "line 3: '1.5' is not an integer"),
        ("tokens", "1\n4\n", "line 2: 4 is not a token from 0 to 3"),
        ("tokens", f"{2**40}\n", f"line 1: {2**40} is not a token from 0 to 3"),
        ("counter", b"1,2\n3,\xe9\n", "line 2: not text in UTF-8"),
        pytest.param(
            "counter",
            f"1,{'2' * 200_000}\n",
            "line 1: field larger than field limit (131072)",
            id="endless",
        ),
    ],
)
def test_the_first_line_that_is_no_row_is_named(
    run_rows, threaded_server: FakeServer, model: str, stdin: str | bytes, message: str
) -> None:
    assert run_rows(model, stdin=stdin, status=1).stderr == f"error: {message}\n"
    assert not threaded_server.world.sessions


def test_columns_without_labels_to_match_are_told(run_rows, threaded_server: FakeServer) -> None:
    model = model_pb2.Model()
    model.CopyFrom(COUNTER)
    model.name = "plain"
    del model.signature.input.labels[:]
    threaded_server.models.append(model)
    result = run_rows("plain", stdin="right,left\n1,2\n")
    assert result.stdout == OUTPUT + "1,2\n"
    assert result.stderr == (
        "plain has no labels for its inputs: columns are taken in their order, right, left\n"
    )
    assert run_rows("plain", stdin="1,2\n").stderr == ""


def test_the_one_column_of_a_model_of_one_feature_has_its_name(
    run_rows, threaded_server: FakeServer
) -> None:
    model = model_pb2.Model()
    model.CopyFrom(COUNTER)
    model.name = "single"
    del model.signature.input.labels[1:]
    model.signature.input.row_elements, model.signature.input.row_bytes = 1, 4
    threaded_server.models.append(model)
    said = run_rows("single", stdin="right\n1\n", status=1).stderr
    assert said == "error: the header has no column left; single takes left\n"


@pytest.mark.parametrize("suffix", [b"", b"\r"])
def test_a_byte_order_mark_is_no_part_of_a_name(run_rows, tmp_path: Path, suffix: bytes) -> None:
    text = b"\xef\xbb\xbf" + b"".join(
        line + suffix + b"\n" for line in (b"right,left", b"2,1", b"4,3")
    )
    assert run_rows("counter", stdin=text).stdout == OUTPUT + "1,2\n4,6\n"
    source = tmp_path / "rows.csv"
    source.write_bytes(text)
    assert run_rows("counter", str(source)).stdout == OUTPUT + "1,2\n4,6\n"


def test_a_file_that_is_not_utf_8_is_refused(run_rows, tmp_path: Path) -> None:
    source = tmp_path / "rows.csv"
    source.write_bytes("left,right,größe\n1,2,3\n".encode("latin-1"))
    assert run_rows("counter", str(source), status=1).stderr == "error: line 1: not text in UTF-8\n"


def test_rows_before_the_wrong_one_are_run(run_rows) -> None:
    result = run_rows("counter", stdin="1,2\n3,4\n5\n", status=1)
    assert result.stdout == OUTPUT + "1,2\n4,6\n"


@pytest.mark.parametrize("stdin", ["left,right\n", ""])
def test_no_rows_give_the_header_alone(run_rows, stdin: str) -> None:
    assert run_rows("counter", stdin=stdin).stdout == OUTPUT


def test_more_lines_than_are_read_ahead(run_rows, threaded_server: FakeServer) -> None:
    result = run_rows("counter", "--chunk", "500", stdin="1,0\n" * 5000)
    assert result.stdout.splitlines()[-1] == "5000,0"
    bad = run_rows("counter", stdin="1,0\n1\n" + "1,0\n" * 5000, status=1)
    assert bad.stderr == "error: line 2: 1 field, expected 2\n"


def test_a_session_that_is_lost_at_the_end_is_told(run_rows, threaded_server: FakeServer) -> None:
    def vanish(state: State, first_step: int) -> None:
        del threaded_server.world.sessions[state.session_id]

    threaded_server.faults.step_hook = vanish
    result = run_rows("counter", "--session", "walk", stdin="1,1\n", status=1)
    assert "SESSION_NOT_FOUND" in result.stderr
    assert "is at step" not in result.stderr


def test_a_refused_step_is_one_line(run_rows, threaded_server: FakeServer) -> None:
    def refuse(state: State, first_step: int) -> None:
        raise Refusal("STEP_RESULT_NOT_HELD")

    threaded_server.faults.step_hook = refuse
    result = run_rows("counter", stdin="1,1\n", status=1)
    assert result.stderr == "error: STEP_RESULT_NOT_HELD: refused: STEP_RESULT_NOT_HELD\n"


@pytest.mark.parametrize("options", [(), ("--session", "walk")])
def test_an_interrupt_ends_it_while_it_waits(
    threaded_server: FakeServer, options: tuple[str, ...]
) -> None:
    environment = os.environ | {"CONVEYOR_TARGET": threaded_server.target}
    program = "from conveyor_client.cli import main; main()"
    with subprocess.Popen(
        [sys.executable, "-c", program, "run", "counter", *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write(b"1,2\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"left,right\n"
        assert process.stdout.readline() == b"1,2\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 130
        assert process.stderr.read() == b""
    assert list(threaded_server.world.sessions) == (["walk"] if options else [])
