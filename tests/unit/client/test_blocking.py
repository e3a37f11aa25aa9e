"""The blocking twin does what the asynchronous client does, from any thread."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import conveyor_client
from conveyor_client import InvalidShape, ModelNotFound, NotOpen, SessionNotFound, StepGap
from tests.unit.client.conftest import QUICK
from tests.unit.client.fake.server import FakeServer


@pytest.fixture
def client(threaded_server: FakeServer):
    with conveyor_client.Client(threaded_server.target, options=QUICK) as client:
        yield client


def test_a_session_from_open_to_close(
    threaded_server: FakeServer, client: conveyor_client.Client
) -> None:
    with client.session("counter", session_id="one") as session:
        assert session.session_id == "one"
        assert session.step([1, 2]).tolist() == [1, 2]
        assert session.step(np.ones((2, 2)), output="last").tolist() == [3, 4]
        assert (session.applied_step, session.epoch, session.resumed) == (3, 1, False)
        assert session.model.name == "counter"
        assert session.info().applied_step == 3
        (fork,) = session.fork(["two"])
        with fork:
            assert fork.step([1, 1]).tolist() == [4, 5]
        snapshot = session.export()
        session.reset()
        assert session.applied_step == 0
    with client.import_session(snapshot, session_id="three") as copy:
        assert copy.step([0, 0]).tolist() == [3, 4]
    assert not threaded_server.world.sessions


def test_streams_and_generations_are_plain_iterators(client: conveyor_client.Client) -> None:
    with client.session("counter") as session:
        outs = list(session.stream(([n, 1] for n in range(20)), in_flight=4))
        assert [out[1] for out in outs] == list(range(1, 21))
    with client.session("tokens") as session:
        made = session.generate([1, 2], steps_max=4)
        assert list(made) == [3, 2, 0, 0]
        assert (made.end, made.applied_step) == ("steps_max", session.applied_step)
        with session.generate(steps_max=500) as left:
            next(left)
        assert session.step(0).shape == (3,)
    assert list(client.generate("tokens", [1], steps_max=2)) == [1, 2]


def test_a_stream_left_early_can_be_followed(client: conveyor_client.Client) -> None:
    with client.session("counter") as session:
        for out in session.stream([[1, 1]] * 10, in_flight=3):
            assert out.tolist() == [1, 1]
            break
        session.step([0, 0])
        assert session.step([0, 0])[0] == session.applied_step - 2


def test_an_input_refused_in_a_stream_stops_it_there(client: conveyor_client.Client) -> None:
    with client.session("counter") as session:
        outs = session.stream([[1, 1], [1, 1, 1], [1, 1]])
        with pytest.raises(InvalidShape):
            list(outs)
        assert session.step([1, 1]).tolist() == [2, 2]


def test_calls_lists_and_errors(client: conveyor_client.Client) -> None:
    assert client.healthy()
    assert client.wait_healthy(timeout_seconds=1)
    assert [model.name for model in client.models()] == ["counter", "tokens"]
    client.open_session("counter", session_id="one")
    assert client.step("one", [1, 1], first_step=1).output.tolist() == [1, 1]
    with pytest.raises(StepGap):
        client.step("one", [1, 1], first_step=9)
    assert [info.session_id for info in client.sessions()] == ["one"]
    assert client.predict("counter", [[1, 1]]).tolist() == [[1, 1]]
    client.close_session("one")
    with pytest.raises(SessionNotFound):
        client.get_session("one")
    with pytest.raises(ModelNotFound), client.session("nobody"):
        pass


def test_many_threads_share_one_client(client: conveyor_client.Client) -> None:
    def run(number: int) -> list[float]:
        with client.session("counter") as session:
            return [float(session.step([number, 1])[0]) for _ in range(20)]

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(run, range(16)))
    assert results == [[float(number * n) for n in range(1, 21)] for number in range(16)]


def test_closing_ends_the_thread_and_what_is_used_later_says_so(
    threaded_server: FakeServer,
) -> None:
    before = threading.active_count()
    client = conveyor_client.Client(threaded_server.target)
    session = client.session("counter")
    session.open()
    assert threading.active_count() > before
    client.close()
    client.close()
    assert not any(thread.name == "conveyor-client" for thread in threading.enumerate())
    with pytest.raises(NotOpen):
        session.step([1, 1])
    with pytest.raises(NotOpen):
        client.model("counter")
