"""``conveyor-server models import``, and what was imported, served beside its framework."""

from __future__ import annotations

import os
import pickle
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
import safetensors.torch
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from conveyor_client import ModelNotStreamable, aio
from conveyor_models import load_bundle, scan
from tests.integration.conftest import StartServer
from tests.integration.process import run_command

FloatArray = npt.NDArray[np.float32]
STEPS: Final = 40
ERROR_MAX: Final = 1e-5
"""Float32 against float32, in another order of additions, over `STEPS` steps."""
KERAS: Final = Path(__file__).parents[1] / "unit" / "models" / "keras_files.py"
KERAS_NAMES: Final = ("lstm_hard", "gru_before", "words")


@dataclass(frozen=True)
class Case:
    """A file, how it is imported, what it is fed with and what its framework answers."""

    file: Path
    arguments: tuple[str, ...]
    x: npt.NDArray[Any]
    expected: FloatArray


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(13, 6)
        self.lstm = nn.LSTM(6, 9, 2)
        self.fc = nn.Linear(9, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc(self.lstm(self.embedding(tokens))[0]).log_softmax(-1)


def torch_cases(folder: Path) -> dict[str, Case]:
    torch.manual_seed(1)
    modules: dict[str, tuple[nn.Module, str, tuple[str, ...]]] = {
        "tagger": (Tagger(), ".pt", ("--activation", "log_softmax")),
        "gru": (nn.GRU(3, 17, 2), ".safetensors", ()),
        "rnn": (nn.RNN(3, 7, nonlinearity="relu"), ".pth", ("--cell", "rnn-relu")),
    }
    cases: dict[str, Case] = {}
    for name, (module, suffix, arguments) in modules.items():
        file = folder / f"{name}{suffix}"
        if suffix == ".safetensors":
            safetensors.torch.save_file(module.state_dict(), file)
        else:
            torch.save(module.state_dict(), file)
        x = torch.randint(13, (STEPS, 1)) if name == "tagger" else torch.randn(STEPS, 1, 3)
        with torch.no_grad():
            y = module(x)
        y = y[0] if isinstance(y, tuple) else y
        cases[name] = Case(file, arguments, x[:, 0].numpy(), y[:, 0].numpy())
    return cases


def onnx_case(folder: Path) -> Case:
    """Peepholes, coupled gates, a clip, an initial state and a head, judged by ONNX Runtime."""
    rng = np.random.default_rng(2)
    shapes = {"W": (1, 20, 3), "R": (1, 20, 5), "B": (1, 40), "h": (1, 1, 5), "c": (1, 1, 5)}
    shapes |= {"P": (1, 15), "K": (5, 2), "k": (2,)}
    constants = {name: rng.normal(0, 0.6, shape) for name, shape in shapes.items()}
    inputs = ["x", "W", "R", "B", "", "h", "c", "P"]
    nodes = [
        helper.make_node("LSTM", inputs, ["y"], hidden_size=5, input_forget=1, clip=1.5),
        helper.make_node("Squeeze", ["y", "one"], ["s"]),
        helper.make_node("MatMul", ["s", "K"], ["m"]),
        helper.make_node("Add", ["m", "k"], ["out"]),
    ]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["t", 1, 3])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
        [
            numpy_helper.from_array(np.array([1]), "one"),
            *(numpy_helper.from_array(each.astype("f4"), key) for key, each in constants.items()),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    file = folder / "clockwork.onnx"
    onnx.save(model, file)
    x = rng.normal(0, 1, (STEPS, 3)).astype(np.float32)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return Case(file, (), x, session.run(None, {"x": x[:, None]})[0][:, 0])


def keras_cases(folder: Path) -> dict[str, Case]:
    done = subprocess.run(
        [sys.executable, str(KERAS), str(folder), *KERAS_NAMES],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
        env=os.environ | {"KERAS_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    cases: dict[str, Case] = {}
    for number, name in enumerate(KERAS_NAMES):
        found = np.load(folder / f"{name}.npz")
        file = folder / f"{name}{('.keras', '.h5')[number % 2]}"
        cases[f"keras_{name}"] = Case(file, (), found["x"][0], found["y"][0])
    return cases


def import_file(case: Case, name: str, into: Path, *more: str) -> subprocess.CompletedProcess[str]:
    named = ["--name", name, "--into", str(into)]
    return run_command(["models", "import", str(case.file), *named, *case.arguments, *more])


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    folder = tmp_path_factory.mktemp("files")
    return torch_cases(folder) | {"clockwork": onnx_case(folder)} | keras_cases(folder)


@pytest.fixture(scope="module")
def imported(cases: dict[str, Case], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository that the command made."""
    folder = tmp_path_factory.mktemp("imported") / "models"
    for name, case in cases.items():
        done = import_file(case, name, folder, "--version", "3")
        assert done.returncode == 0, done.stderr
        assert load_bundle(folder / name / "3").digest in done.stdout
    return folder


def error(found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    assert found.shape == expected.shape
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


async def test_served_step_by_step_and_in_chunks_it_is_what_its_framework_says(
    cases: dict[str, Case], imported: Path, start_server: StartServer
) -> None:
    server = start_server(models=imported)
    async with aio.Client(server.address) as client:
        for name, case in cases.items():
            async with client.session(name) as session:
                single = [await session.step(row) for row in case.x]
            async with client.session(name) as session:
                chunks = [
                    await session.step(case.x[begin:end])
                    for begin, end in ((0, 1), (1, 8), (8, 21), (21, len(case.x)))
                ]
            whole = await client.predict(name, case.x)
            for found in (np.stack(single), np.concatenate(chunks), whole):
                assert error(found, case.expected) < ERROR_MAX, name


async def test_predict_runs_both_directions_and_a_session_is_refused(
    start_server: StartServer, tmp_path: Path
) -> None:
    module = nn.GRU(3, 5, 2, bidirectional=True)
    torch.save(module.state_dict(), tmp_path / "both.pt")
    x = torch.randn(STEPS, 1, 3)
    with torch.no_grad():
        expected = module(x)[0][:, 0].numpy()
    case = Case(tmp_path / "both.pt", (), x[:, 0].numpy(), expected)
    done = import_file(case, "both", tmp_path / "models")
    assert done.returncode == 0, done.stderr
    assert "Predict runs it" in done.stdout
    server = start_server(models=tmp_path / "models")
    async with aio.Client(server.address) as client:
        assert error(await client.predict("both", case.x), expected) < ERROR_MAX
        with pytest.raises(ModelNotStreamable):
            await client.session("both").open()


async def test_a_classifier_on_both_last_states_is_in_the_last_row(
    start_server: StartServer, tmp_path: Path
) -> None:
    """The importer adds a layer that keeps what the first row holds."""
    rng = np.random.default_rng(4)
    shapes = {"W": (2, 20, 3), "R": (2, 20, 5), "B": (2, 40), "K": (10, 2)}
    constants = {name: rng.normal(0, 0.6, shape).astype("f4") for name, shape in shapes.items()}
    nodes = [
        helper.make_node(
            "LSTM", ["x", "W", "R", "B"], ["y", "h"], hidden_size=5, direction="bidirectional"
        ),
        helper.make_node("Transpose", ["h"], ["t"], perm=[1, 0, 2]),
        helper.make_node("Reshape", ["t", "flat"], ["both"]),
        helper.make_node("MatMul", ["both", "K"], ["out"]),
    ]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["t", 1, 3])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
        [
            numpy_helper.from_array(np.array([0, -1]), "flat"),
            *(numpy_helper.from_array(each, key) for key, each in constants.items()),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    file = tmp_path / "ends.onnx"
    onnx.save(model, file)
    x = rng.normal(0, 1, (STEPS, 3)).astype(np.float32)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    expected = session.run(None, {"x": x[:, None]})[0][0]
    done = import_file(Case(file, (), x, expected), "ends", tmp_path / "models")
    assert done.returncode == 0, done.stderr
    assert "keeps that of the first row for the last one" in done.stdout
    server = start_server(models=tmp_path / "models")
    async with aio.Client(server.address) as client:
        assert error((await client.predict("ends", x))[-1], expected) < ERROR_MAX


def test_the_command_says_what_it_understood(cases: dict[str, Case], tmp_path: Path) -> None:
    done = import_file(cases["tagger"], "tagger", tmp_path / "models")
    assert done.returncode == 0, done.stderr
    bundle = load_bundle(tmp_path / "models" / "tagger")
    assert bundle.spec.version == 1
    for said in ("13 tokens, embedding 6", "lstm 9  (from lstm.l1)", "log_softmax", bundle.digest):
        assert said in done.stdout


def test_a_version_that_is_there_gives_way_only_when_told(
    cases: dict[str, Case], tmp_path: Path
) -> None:
    rnn, gru = cases["rnn"], cases["gru"]
    assert import_file(rnn, "model", tmp_path, "--version", "2").returncode == 0
    before = load_bundle(tmp_path / "model" / "2").digest
    refusals: list[tuple[Case, tuple[str, ...], str]] = [
        (gru, ("--version", "2"), "exists already"),
        (gru, (), "has versions already"),
    ]
    for case, more, said in refusals:
        done = import_file(case, "model", tmp_path, *more)
        assert done.returncode == 2
        assert said in done.stderr
    assert load_bundle(tmp_path / "model" / "2").digest == before
    assert import_file(gru, "model", tmp_path, "--version", "2", "--replace").returncode == 0
    assert load_bundle(tmp_path / "model" / "2").spec.layers[0].cell == "gru"
    listing = scan(tmp_path)
    assert [(each.spec.name, each.spec.version) for each in listing.bundles] == [("model", 2)]
    assert not listing.problems
    assert [each.name for each in tmp_path.iterdir()] == ["model"]


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def harmful_pickle(folder: Path) -> None:
    torch.save({"weight_ih_l0": Canary(folder / "canary")}, folder / "model.pt")


def harmful_plain_pickle(folder: Path) -> None:
    (folder / "model.pt").write_bytes(pickle.dumps(Canary(folder / "canary")))


def cut_off(folder: Path) -> None:
    torch.save(nn.LSTM(2, 3).state_dict(), folder / "whole.pt")
    (folder / "model.pt").write_bytes((folder / "whole.pt").read_bytes()[:500])


def unlike(folder: Path) -> None:
    torch.save(nn.Linear(2, 3).state_dict(), folder / "model.pt")


def not_finite(folder: Path) -> None:
    state = nn.LSTM(2, 3).state_dict()
    state["weight_ih_l0"][0, 0] = float("nan")
    torch.save(state, folder / "model.pt")


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (harmful_pickle, "never run"),
        (harmful_plain_pickle, "never loaded"),
        (cut_off, "model.pt"),
        (unlike, "holds no nn.LSTM"),
        (not_finite, "weight_ih_l0: has a NaN"),
        (lambda _: None, "missing"),
    ],
)
def test_what_is_refused_leaves_no_trace(
    write: Callable[[Path], None], said: str, tmp_path: Path
) -> None:
    write(tmp_path)
    into = tmp_path / "models"
    into.mkdir()
    done = run_command(
        ["models", "import", str(tmp_path / "model.pt"), "--name", "model", "--into", str(into)]
    )
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "canary").exists()
    assert not list(into.iterdir())


# --- State dicts, whose structure has to be said -------------------------------------------------


class Front(nn.Module):
    """What stands around the recurrent layers, and where they begin, is learned as well."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.fc1 = nn.Linear(4, 8)
        self.cell = nn.LSTMCell(8, 6)
        self.start = nn.Parameter(torch.randn(1, 6))
        self.actor = nn.Linear(6, 3)
        self.critic = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        state = self.start.expand(x.shape[1], -1), torch.zeros(x.shape[1], 6)
        rows: list[Tensor] = []
        for row in x:
            state = self.cell(self.fc1(self.norm(row)), state)
            rows.append(torch.cat([self.actor(state[0]), self.critic(state[0])], -1))
        return torch.stack(rows)


def answered(stderr: str) -> list[list[str]]:
    """The commands that a refusal offers, without the program's name."""
    lines = [line.removeprefix("conveyor-server:").strip() for line in stderr.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("conveyor-server models ")]


async def test_the_commands_that_a_question_offers_lead_to_what_torch_computes(
    tmp_path: Path, start_server: StartServer
) -> None:
    torch.manual_seed(5)
    module = Front()
    module(torch.randn(9, 3, 4))  # in training: the running statistics move
    module.eval()
    file, into = tmp_path / "front.ckpt", tmp_path / "models"
    state = {f"model.{name}": tensor for name, tensor in module.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 4}, file)
    command = ["models", "import", str(file), "--name=front", "--into", str(into)]
    asked = run_command(command)
    assert asked.returncode == 2
    assert "say --initial-state" in asked.stderr
    asked = run_command(next(each for each in answered(asked.stderr) if "h=model.start" in each))
    assert asked.returncode == 2
    assert not into.exists()
    for said in ("--epsilon", "--between none", "actor+model.critic"):
        assert said in asked.stderr
    answers = answered(asked.stderr)
    assert all("h=model.start" in answer for answer in answers)
    wanted = "model.norm,model.fc1,model.cell,model.actor+model.critic"
    done = run_command(next(answer for answer in answers if wanted in answer))
    assert done.returncode == 0, done.stderr
    for said in ("0 to 2 are model.actor's", "model.norm, model.fc1 folded into", "a checkpoint"):
        assert said in done.stdout
    x = torch.randn(STEPS, 1, 4)
    with torch.no_grad():
        expected = module(x)[:, 0].numpy()
    server = start_server(models=into)
    async with aio.Client(server.address) as client:
        assert error(await client.predict("front", x[:, 0].numpy()), expected) < ERROR_MAX
        async with client.session("front") as session:
            rows = [await session.step(row.numpy()) for row in x[:, 0]]
        assert error(np.stack(rows), expected) < ERROR_MAX


def test_the_command_takes_its_options_back_in_its_messages(tmp_path: Path) -> None:
    file, into = tmp_path / "m.pt", tmp_path / "models"
    torch.save(nn.ModuleDict({"rnn": nn.GRU(4, 4), "fc": nn.Linear(4, 4)}).state_dict(), file)
    for option, value, said in (
        ("--between", "relu", "--between relu: a bundle has no place"),
        ("--order", "rnn,relu,fc", "--order: relu: a bundle has no place"),
        ("--epsilon", "small", "--epsilon small: expected a number"),
        ("--initial-state", "rnn=x", "--initial-state rnn=x: expected h=TENSOR"),
        ("--initial-state", "h=x,h=y", "--initial-state h=y: h is given twice"),
        ("--cell", "lstn", "--cell lstn: expected one of"),
        ("--head", "gc", "gc: --head names it; there is fc"),
        ("--embedding", "gc", "gc: --embedding names it; there is fc"),
    ):
        command = ["models", "import", str(file), "--name", "m", "--into", str(into)]
        done = run_command([*command, option, value])
        assert done.returncode == 2
        assert said in done.stderr
        assert "Traceback" not in done.stderr
    assert not into.exists()
