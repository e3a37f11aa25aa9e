"""``conveyor watch``, in process, against the small server."""

import asyncio
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from conveyor.install import install_command
from conveyor.v1 import session_pb2
from conveyor_client._nouns import model_from_proto
from conveyor_client.cli._app import app
from conveyor_client.cli._feeding import Pace, Text
from tests.unit.client.fake.models import LOOKER, TOKENS, gate_values
from tests.unit.client.fake.server import FakeServer
from tests.unit.client.fake.sessions import State
from tests.unit.client.recordings import speller

HEAD = 2  # lines before the first step


@pytest.fixture
def watch(threaded_server: FakeServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CONVEYOR_TARGET", threaded_server.target)
    threaded_server.models += [LOOKER]

    def invoke(*arguments: str, stdin: str | None = None, status: int = 0) -> Result:
        result = CliRunner().invoke(app, ["watch", *arguments], input=stdin)
        assert result.exit_code == status, (result.output, result.exception)
        return result

    return invoke


def steps_of(result: Result) -> list[str]:
    return result.stdout.splitlines()[HEAD:]


def entries(server: FakeServer) -> list[session_pb2.StepsEntry]:
    return [entry for frame in server.world.frames for entry in frame.steps.entries]


def test_a_text_is_read_letter_by_letter(watch, threaded_server: FakeServer) -> None:
    result = watch("tokens", "--text", "badc")
    lines = steps_of(result)
    assert [line.split("  ")[:2] for line in lines] == [
        [f"step {n}", f"in {letter}"] for n, letter in enumerate("badc", 1)
    ]
    forget = gate_values(0, "f", 4, 1, 3)
    assert f"f {forget.mean():.2f} (" in lines[3]
    assert result.stdout.startswith("# tokens 2, session ")
    assert [entry.length for entry in entries(threaded_server)] == [1] * 4
    assert {entry.trace for entry in entries(threaded_server)} == {session_pb2.TRACE_MODE_FULL}
    assert not threaded_server.world.sessions  # what was opened for it ends with it


def test_summaries_are_asked_for_when_they_are_enough(watch, threaded_server: FakeServer) -> None:
    full = watch("tokens", "--text", "badc")
    summary = watch("tokens", "--text", "badc", "--summary")
    assert steps_of(summary) == steps_of(full)
    modes = [entry.trace for entry in entries(threaded_server)]
    assert modes == [session_pb2.TRACE_MODE_FULL] * 4 + [session_pb2.TRACE_MODE_SUMMARY] * 4


def test_rows_come_from_a_file_or_the_input(watch, tmp_path: Path) -> None:
    rows = "right,note,left\n1,x,2\n3,y,4\n"
    from_input = steps_of(watch("counter", stdin=rows))
    file = tmp_path / "rows.csv"
    file.write_text(rows)
    assert steps_of(watch("counter", "--csv", str(file))) == from_input
    assert from_input[1].startswith("step 2  in left 4, right 3  out left 6, right 4  layer 0 rnn")
    assert len(steps_of(watch("tokens", stdin="0\n3\n"))) == 2


def test_the_steps_are_bounded(watch, threaded_server: FakeServer) -> None:
    assert len(steps_of(watch("tokens", "--text", "abcd" * 9, "--steps", "5"))) == 5
    assert len(entries(threaded_server)) == 5


def test_a_memory_is_looked_at(watch, threaded_server: FakeServer, tmp_path: Path) -> None:
    memory = np.arange(12.0).reshape(4, 3)
    npy, table = tmp_path / "m.npy", tmp_path / "m.csv"
    np.save(npy, memory)
    table.write_text("red,green,blue\n" + "\n".join(",".join(map(str, row)) for row in memory))
    made = [steps_of(watch("looker", "--memory", str(f), stdin="1,1\n2,2\n")) for f in (npy, table)]
    assert made[0] == made[1]
    assert "out left 6.5, right 6.5  looks at row 1 (0.75)" in made[0][0]
    opened = [f.open.session for f in threaded_server.world.frames if f.HasField("open")]
    assert {request.memory.rows for request in opened} == {memory.astype("<f4").tobytes()}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.npy", b"nonsense", "not a whole .npy file of numbers"),
        ("m.csv", b"1,2,3\n1,2\n", "line 2: 2 numbers; expected 3"),
        ("m.csv", b"1,2,3\n1,x,3\n", "line 2: 'x' is not a number"),
        ("m.csv", b"1,x,3\n", "line 1: 'x' is not a number"),
        ("m.csv", b"\xff\xfe", "not CSV in UTF-8"),
        ("m.csv", b"a,b,c\n", "INVALID_MEMORY"),
        ("m.csv", b"1,2\n", "INVALID_MEMORY"),
        ("m.csv", b"1,2,nan\n", "NON_FINITE_INPUT"),
    ],
)
def test_what_is_no_memory_is_told(
    watch, threaded_server: FakeServer, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    result = watch("looker", "--memory", str(file), stdin="1,1\n", status=1)
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not threaded_server.world.sessions


def test_a_pickled_memory_is_not_loaded(watch, tmp_path: Path) -> None:
    file = tmp_path / "m.npy"
    np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    assert "not a whole .npy file" in watch("looker", "--memory", str(file), status=1).stderr


def test_watching_a_session_drives_it_and_leaves_it(watch, threaded_server: FakeServer) -> None:
    state = State("tale:1", threaded_server._model("tokens"))
    threaded_server.world.sessions["tale:1"] = state
    state.run(1, b"\1\0\0\0")
    result = watch("tale:1", "--text", "cc")
    assert steps_of(result)[0].startswith("step 2  in c  out ")
    assert result.stderr == "session tale:1 is at step 3\n"
    assert threaded_server.world.sessions["tale:1"].applied == 3
    assert state.carry.tolist() == [5, 5, 5]
    assert state.epoch == 1


def test_a_model_goes_before_a_session_of_its_name(watch, threaded_server: FakeServer) -> None:
    state = State("tokens", threaded_server._model("tokens"))
    threaded_server.world.sessions["tokens"] = state
    watch("tokens", "--text", "a")
    assert state.applied == 0
    watch("tokens", "--session", "--text", "a")
    assert state.applied == 1


def test_what_cannot_be_watched_is_one_line(watch, threaded_server: FakeServer) -> None:
    threaded_server.world.sessions["tale"] = State("tale", threaded_server._model("tokens"))
    for arguments, message in {
        ("nobody",): "no model and no session of yours is called nobody: refused: MODEL_NOT_FOUND",
        ("tokens", "--text", "a", "--prompt", "b"): "give only one of --csv, --text and --prompt",
        ("counter", "--text", "a"): "counter takes features, not text; feed it rows with --csv",
        ("counter", "--prompt", "a"): "counter takes features, not text; feed it rows with --csv",
        (
            "tokens",
            "--prompt",
            "a",
        ): "the outputs of tokens are not tokens, so it cannot go on alone",
        ("tokens", "--text", "az"): "TOKEN_OUT_OF_RANGE: 'z' is not in the model's vocabulary",
        ("tokens", "--csv", "/nowhere.csv"): "/nowhere.csv: no such file or directory",
        ("tale", "--memory", "m.npy"): "--memory: session tale has its memory since it was opened;"
        " leave the flag out",
    }.items():
        result = watch(*arguments, status=1)
        assert result.stderr.splitlines()[-1] == f"error: {message}"
        assert "step" not in result.stdout
    assert list(threaded_server.world.sessions) == ["tale"]


def test_a_server_without_traces_is_told(watch, threaded_server: FakeServer) -> None:
    threaded_server.traces = False
    assert "NOT_SUPPORTED" in watch("tokens", "--text", "a", status=1).stderr


def test_pictures_are_written_of_what_was_watched(watch, tmp_path: Path) -> None:
    html, png = tmp_path / "gates.html", tmp_path / "gates.png"
    result = watch("tokens", "--text", "abba", "--html", str(html), "--png", str(png))
    assert result.stderr == f"wrote {png}\nwrote {html}\n"
    assert png.read_bytes().startswith(b"\x89PNG")
    page = html.read_text(encoding="utf-8")
    assert "<pre>abba</pre>" in page
    assert "steps 1 to 4, 4 with a trace" in page


def test_patches_are_drawn_as_an_image(watch, tmp_path: Path) -> None:
    memory, html = tmp_path / "m.csv", tmp_path / "gates.html"
    memory.write_text("1,2,3\n" * 6)
    options = ("--memory", str(memory), "--html", str(html))
    watch("looker", *options, "--grid", "2x3", stdin="1,1\n2,2\n")
    assert 'alt="Where it looks: patches, attention"' in html.read_text(encoding="utf-8")
    watch("looker", *options, stdin="1,1\n2,2\n")
    assert 'alt="Where it looks: attention"' in html.read_text(encoding="utf-8")
    for grid, message in {
        "2x2": "--grid 2x2 is 4 cells; the memory has 6 rows",
        "six": "--grid six: expected lines and columns, such as 4x4",
        "0x6": "--grid 0x6: expected lines and columns, such as 4x4",
    }.items():
        result = watch("looker", *options, "--grid", grid, stdin="1,1\n", status=1)
        assert result.stderr == f"error: {message}\n"


def test_a_bad_row_ends_the_watching_and_the_picture_shows_the_rows_before(
    watch, tmp_path: Path
) -> None:
    html = tmp_path / "gates.html"
    result = watch("counter", "--html", str(html), stdin="1,2\n3,4\n5,x\n", status=1)
    assert "error: line 3: 'x' is not a number" in result.stderr
    assert "steps 1 to 2" in html.read_text(encoding="utf-8")


def test_a_picture_that_cannot_be_written_is_one_line(watch, tmp_path: Path) -> None:
    result = watch("tokens", "--text", "a", "--png", str(tmp_path), status=1)
    assert result.stderr == f"error: {tmp_path}: is a directory\n"


def test_a_picture_that_has_no_folder_is_refused_before_anything_runs(
    watch, threaded_server: FakeServer
) -> None:
    result = watch("tokens", "--text", "a", "--png", "/nowhere/gates.png", status=1)
    message = "cannot write /nowhere/gates.png: there is no folder /nowhere"
    assert result.stderr == f"error: {message}\n"
    assert not threaded_server.world.calls["StreamSteps"]


def test_without_matplotlib_the_extra_is_named_before_anything_runs(
    watch, threaded_server: FakeServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for module in [name for name in sys.modules if name.startswith("conveyor_client.cli._gates_p")]:
        monkeypatch.delitem(sys.modules, module)
    import conveyor_client.cli

    for name in ("_gates_page", "_gates_panels", "_gates_picture"):
        monkeypatch.delattr(conveyor_client.cli, name, raising=False)
    for module in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = watch("tokens", "--text", "a", "--png", str(tmp_path / "gates.png"), status=1)
    assert result.stderr == f"error: pictures need matplotlib: {install_command('plot')}\n"
    assert not threaded_server.world.calls["StreamSteps"]
    assert len(steps_of(watch("tokens", "--text", "a"))) == 1


def test_the_help_says_that_a_session_is_driven(watch) -> None:
    text = " ".join(watch("--help").stdout.split())
    assert "Watching a session means driving it." in text


def test_in_a_terminal_the_view_is_drawn(threaded_server: FakeServer) -> None:
    """A real pseudo-terminal and a process of its own."""
    ours, theirs = pty.openpty()
    environment = os.environ | {
        "CONVEYOR_TARGET": threaded_server.target, "TERM": "xterm-256color",
        "COLUMNS": "90", "LINES": "24",
    }  # fmt: skip
    code = "from conveyor_client.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "watch", "tokens", "--text", "badcab", "--rate", "0"],
        stdin=theirs, stdout=theirs, stderr=theirs, env=environment,
    )  # fmt: skip
    os.close(theirs)
    seen = b""
    try:
        while part := _read(ours):
            seen += part
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    text = seen.decode()
    assert "layer 0  lstm, 3 units" in text
    assert "badcab" in text
    assert "▀" in text
    assert "\x1b[38;5;" in text or "\x1b[38;2;" in text
    assert "\x1b[?25h" in text  # the cursor is back
    await_end_of_streams(threaded_server)


def test_an_interrupt_leaves_a_picture(threaded_server: FakeServer, tmp_path: Path) -> None:
    html = tmp_path / "gates.html"
    code = "from conveyor_client.cli import main; main()"
    with subprocess.Popen(
        [sys.executable, "-c", code, "watch", "counter", "--html", str(html)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"CONVEYOR_TARGET": threaded_server.target},
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("1,2\n3,4\n")
        process.stdin.flush()
        lines = [process.stdout.readline() for _ in range(HEAD + 2)]
        assert lines[-1].startswith("step 2")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 130
    assert errors == f"wrote {html}\n"
    assert "steps 1 to 2" in html.read_text(encoding="utf-8")
    assert not threaded_server.world.sessions
    await_end_of_streams(threaded_server)


def await_end_of_streams(server: FakeServer) -> None:
    """Waits until the server has seen that the other process is gone."""
    give_up_at = time.monotonic() + 10
    while server.streams:
        assert time.monotonic() < give_up_at
        time.sleep(0.005)


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError:  # the other end is closed
        return b""


# --- what it is fed with -------------------------------------------------------------------------


async def fed(text: Text, outputs: list[np.ndarray]) -> list[int]:
    tokens: list[int] = []
    output = None
    for made in outputs:
        row = await text.next(output)
        if row is None:
            break
        assert row.dtype == np.int32
        assert row.shape == ()
        tokens.append(int(row))
        output = made
    return tokens


def one_hot(*tokens: int) -> list[np.ndarray]:
    return [np.log(np.where(np.arange(6) == t, 0.95, 0.01)).astype(np.float32) for t in tokens]


async def test_a_prompt_goes_on_with_what_the_model_makes() -> None:
    model = model_from_proto(speller())
    text = Text(model, "ba", goes_on=True)
    assert await fed(text, one_hot(5, 4, 3, 2)) == [1, 0, 4, 3]
    assert await fed(Text(model, "ba"), one_hot(5, 4, 3, 2)) == [1, 0]


async def test_draws_follow_the_distribution_and_the_seed() -> None:
    model = model_from_proto(speller())
    outputs = one_hot(*[3] * 400)
    drawn = [
        await fed(Text(model, "a", goes_on=True, temperature=t, seed=seed), outputs)
        for t, seed in [(1.0, 1), (1.0, 1), (1.0, 2), (0.01, 1), (50.0, 1)]
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    shares = [np.mean(np.array(tokens[1:]) == 3) for tokens in drawn]
    assert shares[0] == pytest.approx(0.95, abs=0.04)
    assert shares[3] == 1.0
    assert shares[4] == pytest.approx(1 / 6, abs=0.08)


async def test_the_pace_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    clock = 100.0

    async def sleep(seconds: float) -> None:
        nonlocal clock
        waits.append(seconds)
        clock += seconds

    loop = asyncio.get_running_loop()
    monkeypatch.setattr(asyncio, "sleep", sleep)
    monkeypatch.setattr(loop, "time", lambda: clock)
    pace = Pace(4.0)
    for _ in range(3):
        await pace.wait()
    assert waits == pytest.approx([0, 0.25, 0.25])
    clock += 10.0  # nobody typed anything for a while: no burst follows
    for _ in range(3):
        await pace.wait()
    assert waits[3:] == pytest.approx([0, 0.25, 0.25])
    waits.clear()
    await Pace(0.0).wait()
    assert not waits


def test_tokens_without_labels_are_fed_as_numbers(watch, threaded_server: FakeServer) -> None:
    bare = type(TOKENS)()
    bare.CopyFrom(TOKENS)
    bare.name = "bare"
    del bare.signature.input.labels[:]
    threaded_server.models.append(bare)
    message = "error: the tokens of bare have no labels, so it takes no text; use --csv\n"
    assert watch("bare", "--text", "a", status=1).stderr == message
