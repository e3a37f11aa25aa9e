"""Every file of examples/ is run, against a real server, and has to say what is true."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from tests.integration.conftest import ZOO, StartServer
from tests.integration.process import ServerProcess, command_environment

EXAMPLES: Final = Path(__file__).parents[2] / "examples"
LINES_MAX: Final = 80
MAKERS: Final = {"make_look_up.py": "look-up", "make_voice.py": "voice"}
"""Programs that write a model, and which one."""
CLIENTS: Final = sorted(path.name for path in EXAMPLES.glob("*.py") if path.name not in MAKERS)
MODULES: Final = sys.stdlib_module_names | {"conveyor_client", "numpy"}


def _run(name: str, argument: str) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), argument],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=command_environment() | {"PYTHONIOENCODING": "utf-8"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


@pytest.fixture(scope="module")
def server(start_server: StartServer, tmp_path_factory: pytest.TempPathFactory) -> ServerProcess:
    """Serves the shipped models and those that the examples make."""
    models = tmp_path_factory.mktemp("models")
    for bundle in ZOO.glob("*/model.toml"):
        shutil.copytree(bundle.parent, models / bundle.parent.name)
    for maker, model in MAKERS.items():
        assert f"{model}: sha256:" in _run(maker, str(models))
    return start_server({"shutdown.grace_seconds": 2}, models=models)


def _carry_on(said: str) -> None:
    assert said.count("cut after") == 2
    assert "200 steps applied" in said
    connections, epoch = re.findall(r"(\d+) connections, epoch (\d+)", said)[0]
    assert int(connections) == int(epoch) == 3
    assert "the same bits as over a connection that held: True" in said


def _gates(said: str) -> None:
    within, between = (float(share) for share in re.findall(r"(?:words|them) ([\d.]+)%", said))
    assert 0 < 1.5 * within < between < 100
    assert said.count("█") > 0
    assert "the same bits without a trace: True" in said


def _look_up(said: str) -> None:
    assert "corner shop, 3 rows" in said
    assert "market, 6 rows" in said
    assert said.count("right") == 7
    assert "WRONG" not in said
    assert said.count("█") == 7  # each question finds one row


def _microphone(said: str) -> None:
    found = [float(seconds) for seconds in re.findall(r"([\d.]+) s  voice", said)]
    spoken = re.findall(r"([\d.]+) to ([\d.]+) s", said)
    assert found == pytest.approx([float(edge) for pair in spoken for edge in pair], abs=0.05)
    assert said.count("█") == 24


def _sensor_fleet(said: str) -> None:
    errors = [float(error) for error in said.split("°F: ")[1].splitlines()[0].split(", ")]
    assert len(errors) == 3
    assert max(errors) < 1.0  # degrees; the climates swing by 6 to 16 of them a day
    assert "100 sensors, 7200 steps" in said


def _text_generation(said: str) -> None:
    assert said.count("The function returns ") == 4
    assert said.count("[141 steps]") == 4  # 21 of the prompt, 120 made
    assert "the same seed wrote the same text: True" in said
    assert "another seed wrote another one: True" in said


def _what_if(said: str) -> None:
    order = re.findall(r"(-[\d.]+) a character  (\w+)", said)
    assert [word for _, word in order][-2:] == ["elephant", "xq"]
    scores = [float(score) for score, _ in order]
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) == 4
    assert "now at step 51" in said
    assert "still at step 31" in said


CHECKS: Final[dict[str, Callable[[str], None]]] = {
    "carry_on.py": _carry_on,
    "gates.py": _gates,
    "look_up.py": _look_up,
    "microphone.py": _microphone,
    "sensor_fleet.py": _sensor_fleet,
    "text_generation.py": _text_generation,
    "what_if.py": _what_if,
}


@pytest.mark.parametrize("name", CLIENTS)
def test_an_example_runs_and_says_what_is_true(name: str, server: ServerProcess) -> None:
    CHECKS[name](_run(name, server.address))


def test_the_fleet_is_one_stream_and_runs_in_batches(server: ServerProcess) -> None:
    steps = server.metric("conveyor_steps_total", model="temperature")
    ticks = server.metric("conveyor_tick_steps_count", model="temperature")
    streams = server.metric("grpc_server_started_total", grpc_method="StreamSteps")
    _run("sensor_fleet.py", server.address)
    assert server.metric("conveyor_steps_total", model="temperature") == steps + 7200
    assert server.metric("conveyor_tick_steps_count", model="temperature") < ticks + 720
    assert server.metric("grpc_server_started_total", grpc_method="StreamSteps") == streams + 1


@pytest.mark.parametrize("name", [*CLIENTS, *MAKERS])
def test_an_example_is_short_and_described(name: str) -> None:
    text = (EXAMPLES / name).read_text(encoding="utf-8")
    assert len(text.splitlines()) < LINES_MAX
    assert ast.get_docstring(ast.parse(text))
    assert f"| [{name}]({name}) |" in (EXAMPLES / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", CLIENTS)
def test_an_example_uses_the_public_client_alone(name: str) -> None:
    for node in ast.walk(ast.parse((EXAMPLES / name).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert {alias.name.partition(".")[0] for alias in node.names} <= MODULES
        if isinstance(node, ast.ImportFrom):
            assert node.module in MODULES | {"collections.abc", "conveyor_client"}
        if isinstance(node, ast.Attribute):
            assert not node.attr.startswith("_"), node.attr
