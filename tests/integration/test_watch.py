"""``conveyor watch`` and the client's traces against a real server with the shipped models."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conveyor_client import Client, Trace
from conveyor_models import load_bundle
from conveyor_models.attention import attend
from conveyor_models.cells import LstmCarry, LstmWeights, traced_lstm_cell
from conveyor_models.network import attention_weights, cell_weights, layer_tensors
from tests.integration.bundles import add_model
from tests.integration.conftest import ZOO, StartServer
from tests.integration.process import ServerProcess, command_environment

LOOKER: dict[str, Any] = {
    "input": {"kind": "features", "size": 2},
    "attention": {"memory_size": 3, "size": 8, "gate": True, "head": True},
    "layers": [{"cell": "gru", "size": 5, "reset": "after"}, {"cell": "rnn", "size": 7}],
    "head": {"size": 2},
}
"""Looks at six rows of three numbers."""
TEXT = "The server returns a list of values. "
Gates = list[dict[str, np.ndarray]]


@pytest.fixture(scope="module")
def server(start_server: StartServer) -> ServerProcess:
    return start_server(models=ZOO)


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[Client]:
    with Client(server.address) as client:
        yield client


def watch(
    server: ServerProcess, *arguments: str, stdin: str = "", status: int = 0
) -> subprocess.CompletedProcess[str]:
    code = "from conveyor_client.cli import main; main()"
    environment = command_environment() | {"CONVEYOR_TARGET": server.address}
    done = subprocess.run(
        [sys.executable, "-c", code, "watch", *arguments],
        input=stdin, capture_output=True, text=True, timeout=60, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    return done


def reference(tokens: np.ndarray) -> Gates:
    """What the gates of `letters` do according to the cells' equations, in float64."""
    bundle = load_bundle(ZOO / "letters")
    weights = {name: tensor.double() for name, tensor in bundle.weights.items()}
    cells = [
        cell_weights(layer, layer_tensors(weights, number, ""))
        for number, layer in enumerate(bundle.spec.layers)
    ]
    carries = [
        LstmCarry(torch.zeros(1, layer.size).double(), torch.zeros(1, layer.size).double())
        for layer in bundle.spec.layers
    ]
    seen: list[dict[str, list[np.ndarray]]] = [{name: [] for name in "ifgoch"} for _ in cells]
    for token in tokens.tolist():
        x = weights["embedding.weight"][token][None]
        for number, cell in enumerate(cells):
            assert isinstance(cell, LstmWeights)
            carries[number], x, gates = traced_lstm_cell(cell, carries[number], x)
            for name, value in (gates | {"c": carries[number].c, "h": x}).items():
                seen[number][name].append(value[0].numpy())
    return [{name: np.stack(rows) for name, rows in layer.items()} for layer in seen]


def assert_is_reference(trace: Trace, expected: Gates) -> None:
    assert trace.complete
    assert [layer.cell for layer in trace.layers] == ["lstm", "lstm"]
    for layer, gates in zip(trace.layers, expected, strict=True):
        assert set(layer.gates) == set(gates)
        for name, rows in gates.items():
            values = layer[name].values
            assert values is not None
            assert values.shape == rows.shape
            error = np.linalg.norm(values - rows) / np.linalg.norm(rows)
            assert error < 1e-5, (layer.layer, name, error)


def test_the_gates_are_those_of_the_equations(client: Client) -> None:
    with client.session("letters") as session:
        tokens = session.model.input.encode(TEXT)
        expected = reference(tokens)
        whole, trace = session.step_with_trace(tokens, mode="full")
        assert_is_reference(trace, expected)
    with client.session("letters") as session:
        made = list(session.stream_with_trace(tokens, mode="full", in_flight=4))
        np.testing.assert_array_equal(np.stack([output for output, _ in made]), whole)
        assert_is_reference(Trace.joined([trace for _, trace in made]), expected)
    with client.session("letters") as session:
        plain = session.step(tokens)
    np.testing.assert_array_equal(plain, whole)  # tracing changes no bit


def test_a_summary_is_that_of_the_values(client: Client) -> None:
    with client.session("letters") as session:
        tokens = session.model.input.encode(TEXT)
        _, summary = session.step_with_trace(tokens)
        session.reset()
        _, full = session.step_with_trace(tokens, mode="full")
    for ours, theirs in zip(summary.layers, full.layers, strict=True):
        for gate in ours:
            assert gate.values is None
            np.testing.assert_allclose(gate.summary, theirs[gate.name].summary, atol=1e-6)


def test_a_unary_step_is_traced(client: Client) -> None:
    opened = client.open_session("letters")
    session_id = opened.info.session_id
    tokens = client.model("letters").input.encode(TEXT)
    result = client.step(session_id, tokens[:5], first_step=1, trace="full")
    rest = client.step(session_id, tokens[5:], first_step=6, trace="full")
    assert result.trace is not None
    assert rest.trace is not None
    assert_is_reference(Trace.joined([result.trace, rest.trace]), reference(tokens))
    again = client.step(session_id, tokens[5:], first_step=6, trace="full")
    assert again.duplicate
    assert again.trace is not None
    assert not again.trace.covered.any()
    client.close_session(session_id)


class _Texts(HTMLParser):
    """The cells of a page's table, and how many pictures it has."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.pictures = 0
        self._inside = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.pictures += tag == "img"
        self._inside = tag == "td"

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.cells.append(data)
            self._inside = False


def test_a_text_is_watched_and_drawn(server: ServerProcess, client: Client, tmp_path: Path) -> None:
    html, png = tmp_path / "gates.html", tmp_path / "gates.png"
    done = watch(server, "letters", "--text", TEXT, "--html", str(html), "--png", str(png))
    lines = done.stdout.splitlines()[2:]
    assert len(lines) == len(TEXT)
    assert lines[2].startswith("step 3  in e  out ")
    expected = reference(client.model("letters").input.encode(TEXT))
    forget = expected[1]["f"]
    share_low, share_high = (forget[-1] < 0.1).mean(), (forget[-1] > 0.9).mean()
    last = lines[-1].partition("layer 1 lstm: ")[2]
    assert f" f {forget[-1].mean():.2f} ({share_low:.0%}/{share_high:.0%}) g " in last
    texts = _Texts(html.read_text(encoding="utf-8"))
    rows = [texts.cells[n : n + 8] for n in range(0, len(texts.cells), 8)]
    assert [row[1][0] for row in rows] == list("ifgoch") * 2
    assert rows[7][2:4] == ["192", f"{forget.mean():.3f}"]
    assert texts.pictures == 3
    data = png.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", data[16:24])
    assert width > 1000
    assert height > 2000


def test_where_a_model_looks_is_watched_and_drawn(
    start_server: StartServer, tmp_path: Path
) -> None:
    bundle = add_model(tmp_path, "looker", LOOKER)
    memory = np.random.default_rng(5).standard_normal((6, 3)).astype(np.float32)
    inputs = np.random.default_rng(6).standard_normal((9, 2)).astype(np.float32)
    network = bundle.network(torch.float64)
    rows = network.memory(torch.from_numpy(memory)[None])
    assert bundle.spec.attention is not None
    attention = attention_weights(
        bundle.spec.attention, {name: each.double() for name, each in bundle.weights.items()}
    )
    carry, expected = network.initial_carry(1), []
    for row in inputs:
        expected.append(attend(attention, rows, carry[-1].h)[1][0].numpy())
        carry, _ = network.step(carry, torch.from_numpy(row)[None].double(), rows)
    server = start_server(models=tmp_path)
    with Client(server.address) as client, client.session("looker", memory=memory) as session:
        _, trace = session.step_with_trace(inputs, mode="full")
        assert session.info().memory_rows == 6
    assert [list(layer.gates) for layer in trace.layers] == [list("rznh"), ["h"]]
    assert trace.attention is not None
    np.testing.assert_allclose(trace.attention, np.stack(expected), atol=1e-5)
    file, html = tmp_path / "memory.npy", tmp_path / "gates.html"
    np.save(file, memory)
    lines = "".join(f"{left},{right}\n" for left, right in inputs.tolist())
    options = ("--memory", str(file), "--grid", "2x3", "--html", str(html))
    done = watch(server, "looker", *options, stdin=lines)
    looked = [int(np.argmax(weights)) for weights in expected]
    assert [
        f"  looks at row {row} (" in line
        for row, line in zip(looked, done.stdout.splitlines()[2:], strict=True)
    ] == [True] * 9
    assert _Texts(html.read_text(encoding="utf-8")).pictures == 4
    assert "INVALID_MEMORY" in watch(server, "looker", stdin=lines, status=1).stderr


def test_a_model_goes_on_by_itself(server: ServerProcess) -> None:
    options = ("--prompt", "The ", "--steps", "30", "--temperature", "0.5", "--summary")
    first, again = (watch(server, "letters", *options, "--seed", "7") for _ in range(2))
    steps = [done.stdout.splitlines()[2:] for done in (first, again)]
    assert steps[0] == steps[1]
    assert len(steps[0]) == 30


def test_a_session_is_driven_and_left_open(server: ServerProcess, client: Client) -> None:
    session = client.session("temperature", session_id="roof:1", idle_seconds=60)
    session.open()
    session.step(np.zeros((3, 5)))
    session.detach()
    done = watch(server, "roof:1", stdin="50,0,1,0,1\n51,0,1,0,1\n")
    assert "session roof:1 is at step 5" in done.stderr
    assert [line.split("  ")[0] for line in done.stdout.splitlines()[2:]] == ["step 4", "step 5"]
    assert client.get_session("roof:1").applied_step == 5
    client.close_session("roof:1")
    gone = watch(server, "roof:1", stdin="50,0,1,0,1\n", status=1)
    assert "SESSION_CLOSED" in gone.stderr
