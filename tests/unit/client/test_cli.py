"""The `conveyor` command, in process, against the small server."""

import json
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from conveyor_client.cli._app import app
from conveyor_client.cli._common import remaining_text
from tests.unit.client.fake.models import LOOKER, TOKENS
from tests.unit.client.fake.server import FakeServer

runner = CliRunner()


@pytest.fixture
def conveyor(threaded_server: FakeServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CONVEYOR_TARGET", threaded_server.target)
    monkeypatch.setenv("CONVEYOR_TOKEN", "secret")

    def invoke(*arguments: str, stdin: str | None = None, status: int = 0) -> Result:
        result = runner.invoke(app, arguments, input=stdin)
        assert result.exit_code == status, (result.output, result.exception)
        return result

    return invoke


@pytest.fixture
def invoke_json(conveyor):
    return lambda *arguments: json.loads(conveyor(*arguments, "--json").stdout)


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("CONVEYOR_TARGT", "CONVEYOR_TARGET"),
        ("conveyor_tls", "CONVEYOR_TLS"),
        ("CONVEYOR_TIMOUT", "CONVEYOR_TIMEOUT"),
        ("CONVEYOR_CERTS", "CONVEYOR_CERT"),
    ],
)
def test_a_misspelt_variable_is_refused(
    variable: str, meant: str, conveyor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "1")
    said = conveyor("models", "list", status=1).output
    assert f"{variable}: unknown environment variable; did you mean {meant}?" in said


def test_the_variables_of_others_are_left_alone(conveyor, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SERVICE_HOST", "PORT", "LISTEN", "CONFIG", "AUTH__TOKENS", "METRICS"):
        monkeypatch.setenv(f"CONVEYOR_{name}", "1")
    assert "counter" in conveyor("models", "list").stdout


def test_models(conveyor, invoke_json) -> None:
    assert [model["name"] for model in invoke_json("models", "list")] == ["counter", "tokens"]
    assert invoke_json("models", "show", "tokens")["input"]["labels"] == ["a", "b", "c", "d"]
    assert "rnn 2" in conveyor("models", "list").stdout
    assert "A running sum of tokens." in conveyor("models", "show", "tokens").stdout


def test_the_token_is_sent(conveyor, threaded_server: FakeServer) -> None:
    conveyor("models", "list")
    assert threaded_server.world.metadata[0]["authorization"] == "Bearer secret"


def test_what_goes_wrong_is_one_line(conveyor) -> None:
    result = conveyor("models", "show", "nobody", status=1)
    assert result.stderr == "error: MODEL_NOT_FOUND: refused: MODEL_NOT_FOUND\n"
    assert result.stdout == ""
    conveyor("models", "show", status=2)
    gone = conveyor("models", "list", "--target", "127.0.0.1:1", status=1)
    unreachable = "cannot reach 127.0.0.1:1: is the server running?"
    assert gone.stderr == f"error: TRANSPORT: {unreachable}\n"


def test_run_from_the_standard_input(conveyor, threaded_server: FakeServer) -> None:
    result = conveyor("run", "counter", stdin="1,2\n3,4\n\n5,6\n")
    assert result.stdout == "left,right\n1,2\n4,6\n9,12\n"
    assert result.stderr == ""  # a bar is for terminals
    assert not threaded_server.world.sessions


def test_run_picks_named_columns_from_a_file(conveyor, tmp_path: Path) -> None:
    source, out = tmp_path / "in.csv", tmp_path / "out.csv"
    rows = "".join(f"{n},x,{n * 10}\n" for n in range(1, 201))
    source.write_text("right,note,left\n" + rows)
    conveyor("run", "counter", str(source), "--output", str(out), "--chunk", "7")
    lines = out.read_text().splitlines()
    assert lines[0] == "left,right"
    assert lines[1:3] == ["10,1", "30,3"]
    assert len(lines) == 201


def test_run_goes_on_with_a_session(conveyor, threaded_server: FakeServer) -> None:
    conveyor("run", "counter", "--session", "walk", stdin="1,1\n")
    result = conveyor("run", "counter", "--session", "walk", stdin="1,1\n")
    assert result.stdout == "left,right\n2,2\n"
    assert "session walk is at step 2" in result.stderr
    assert threaded_server.world.sessions["walk"].applied == 2


def test_run_takes_tokens(conveyor) -> None:
    result = conveyor("run", "tokens", stdin="token\n1\n2\n")
    assert result.stdout == "output_0,output_1,output_2\n1,1,1\n3,3,3\n"


def test_run_needs_its_file(conveyor) -> None:
    assert "no such file" in conveyor("run", "counter", "/nowhere.csv", status=1).stderr


def test_generate_writes_what_comes(conveyor, threaded_server: FakeServer) -> None:
    options = ("--prompt", "bc", "--steps", "3", "--seed", "1")
    assert conveyor("generate", "tokens", *options).stdout == "bcaaa\n"
    assert conveyor("generate", "tokens", *options).stdout == "bcaaa\n"
    stopped = conveyor("generate", "tokens", "--prompt", "bc", "--stop", "c", "--steps", "90")
    assert stopped.stdout == "bcdc\n"
    conveyor("generate", "tokens", "--prompt", "b", "--session", "tale", "--steps", "2")
    assert threaded_server.world.sessions["tale"].applied == 2
    conveyor("generate", "tokens", "--session", "tale", "--steps", "2", "--prompt", "a")
    assert threaded_server.world.sessions["tale"].applied == 4
    unknown = conveyor("generate", "tokens", "--prompt", "xyz", status=1)
    assert "TOKEN_OUT_OF_RANGE" in unknown.stderr


def test_generate_needs_tokens(conveyor) -> None:
    result = conveyor("generate", "counter", status=1)
    message = "counter takes features, not tokens; it cannot generate text"
    assert result.stderr == f"error: {message}\n"


def test_a_memory_comes_from_a_file(conveyor, threaded_server: FakeServer, tmp_path: Path) -> None:
    threaded_server.models.append(LOOKER)
    file = tmp_path / "memory.csv"
    file.write_text("1,2,3\n4,5,6\n")
    options = ("--memory", str(file))
    assert "3 x float32 in a row, at most 8 rows" in conveyor("models", "show", "looker").stdout
    assert conveyor("run", "looker", *options, stdin="1,1\n").stdout == "left,right\n4.5,4.5\n"
    conveyor("run", "looker", *options, "--session", "one", stdin="1,1\n")
    assert "memory rows" in conveyor("sessions", "show", "one").stdout
    again = conveyor("run", "looker", "--session", "one", stdin="1,1\n")
    assert again.stdout == "left,right\n5.5,5.5\n"
    reader = type(TOKENS)()
    reader.CopyFrom(TOKENS)
    reader.name = "reader"
    reader.signature.memory.CopyFrom(LOOKER.signature.memory)
    threaded_server.models.append(reader)
    assert conveyor("generate", "reader", "--prompt", "b", *options).stdout.startswith("b")
    for command in (("run", "looker"), ("generate", "reader", "--prompt", "b")):
        refused = conveyor(*command, stdin="1,1\n", status=1)
        assert "INVALID_MEMORY" in refused.stderr
        missing = conveyor(*command, "--memory", "/nowhere.npy", stdin="1,1\n", status=1)
        assert "no such file" in missing.stderr


def test_bench_makes_a_memory_up(invoke_json, threaded_server: FakeServer) -> None:
    threaded_server.models.append(LOOKER)
    figures = invoke_json(
        "bench", "looker", "--memory-rows", "3", "--duration", "0.1", "--warmup", "0"
    )
    assert figures["chunks"] > 0
    (opened,) = [f.open.session for f in threaded_server.world.frames if f.HasField("open")]
    assert opened.memory.length == 3


def test_close_tries_every_session(conveyor, threaded_server: FakeServer) -> None:
    conveyor("run", "counter", "--session", "a", stdin="1,1\n")
    conveyor("run", "counter", "--session", "c", stdin="1,1\n")
    result = conveyor("sessions", "close", "a", "b", "c", status=1)
    first, second, third = result.stderr.splitlines()
    assert (first, third) == ("closed a at step 1", "closed c at step 1")
    assert second.startswith("error: b: SESSION_NOT_FOUND")
    assert not threaded_server.world.sessions


def test_fork_refuses_a_count_that_is_not_of_the_ids(conveyor, threaded_server: FakeServer) -> None:
    conveyor("run", "counter", "--session", "a", stdin="1,1\n")
    result = conveyor("sessions", "fork", "a", "--count", "3", "--id", "c", status=1)
    assert result.stderr == "error: --count 3 does not fit 1 times --id; leave one of them out\n"
    assert list(threaded_server.world.sessions) == ["a"]
    conveyor("sessions", "fork", "a", "--count", "1", "--id", "c")
    assert list(threaded_server.world.sessions) == ["a", "c"]


def test_ids_are_whole_on_80_columns(conveyor, monkeypatch: pytest.MonkeyPatch) -> None:
    session_id = "".join(f"{n:02x}" for n in range(20, 64)) + "[b]"
    conveyor("run", "counter", "--session", session_id, stdin="1,1\n")
    monkeypatch.setenv("COLUMNS", "80")
    header, _, *rows = conveyor("sessions", "list").stdout.splitlines()
    assert len(header) <= 80
    assert "".join(row[: header.index("model")].strip() for row in rows) == session_id
    assert "counter 1" in rows[0]
    first, *others = conveyor("sessions", "show", session_id).stdout.splitlines()
    start = first.index(session_id[:8])
    shown = [line[start:].strip() for line in (first, others[0])]
    assert "".join(shown) == session_id


def test_nothing_to_list_is_said(conveyor, threaded_server: FakeServer) -> None:
    result = conveyor("sessions", "list")
    assert (result.stdout, result.stderr) == ("", "no sessions\n")
    assert conveyor("sessions", "list", "--json").stdout == "[]\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "now"), (90, "in 90 s"), (540, "in 9 min"), (7201, "in 2 h"), (864_000, "in 10 d")],
)
def test_an_expiry_is_told_from_now(seconds: float, text: str) -> None:
    assert remaining_text(seconds) == text


def test_the_version_is_printed(conveyor) -> None:
    assert conveyor("--version").stdout == f"conveyor {version('conveyor')}\n"


def test_sessions_from_open_to_close(conveyor, invoke_json, tmp_path: Path) -> None:
    conveyor("run", "counter", "--session", "one", stdin="1,1\n")
    assert [info["session_id"] for info in invoke_json("sessions", "list")] == ["one"]
    assert invoke_json("sessions", "show", "one")["applied_step"] == 1
    assert "one" in conveyor("sessions", "list").stdout
    assert "applied step" in conveyor("sessions", "show", "one").stdout
    forks = invoke_json("sessions", "fork", "one", "--id", "two", "--id", "three")
    assert [info["session_id"] for info in forks] == ["two", "three"]
    assert len(invoke_json("sessions", "fork", "one", "--count", "2")) == 2
    snapshot = tmp_path / "one.snapshot"
    conveyor("sessions", "export", "one", str(snapshot))
    imported = invoke_json("sessions", "import", str(snapshot), "--id", "four")
    assert imported[0]["applied_step"] == 1
    conveyor("sessions", "reset", "two")
    assert invoke_json("sessions", "show", "two")["applied_step"] == 0
    conveyor("sessions", "close", "one", "two", "three", "four")
    assert len(invoke_json("sessions", "list", "--model", "counter")) == 2
    assert "SESSION_CLOSED" in conveyor("sessions", "show", "one", status=1).stderr


@pytest.mark.parametrize("rate", ["0", "300"])
def test_bench_measures_in_both_loops(invoke_json, threaded_server: FakeServer, rate: str) -> None:
    figures = invoke_json(
        "bench", "counter", "--streams", "2", "--sessions", "3", "--chunk", "4",
        "--duration", "2", "--warmup", "0.1", "--rate", rate,
    )  # fmt: skip
    assert figures["loop"] == ("open" if rate != "0" else "closed")
    assert figures["chunks"] > 0
    assert figures["steps_per_second"] == pytest.approx(figures["chunks"] * 4 / 2)
    spread = figures["latency_ms"]
    assert 0 < spread["p50"] <= spread["p90"] <= spread["p99"] <= spread["p99.9"] <= spread["max"]
    assert figures["errors"] == {}
    assert threaded_server.streams_seen == 2
    assert not threaded_server.world.sessions


def test_bench_counts_errors_by_reason(conveyor, threaded_server: FakeServer) -> None:
    from tests.unit.client.fake.refusals import Refusal
    from tests.unit.client.fake.sessions import State

    def refuse(state: State, first_step: int) -> None:
        raise Refusal("STEP_RESULT_NOT_HELD")

    threaded_server.faults.step_hook = refuse
    result = conveyor("bench", "counter", "--duration", "0.1", "--warmup", "0", status=1)
    assert "STEP_RESULT_NOT_HELD 1" in result.stdout
    assert "no step was answered in that time" in result.stderr


def test_top_without_metrics_lists_models(conveyor, invoke_json) -> None:
    shown = conveyor("top", "--once").stdout
    assert "counter" in shown
    assert "rates and latencies: --metrics HOST:9464" in shown
    assert [model["name"] for model in invoke_json("top", "--once")] == ["counter", "tokens"]
