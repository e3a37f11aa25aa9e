"""Whatever refuses because of a limit names the setting and its value."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, cast

import pytest

from conveyor_server.admission.admission import Binding, Entry
from conveyor_server.config import LimitsConfig
from conveyor_server.core import LimitSource, MemoryRows, OutputMode, WholeSequence
from conveyor_server.errors import ConveyorError, InboxFull, limit_text
from conveyor_server.rpc.results import ResultsBudget
from conveyor_server.rpc.streams import Streams
from conveyor_server.scheduler.sampling import Sampling
from tests.support.models import ATTENTIVE, BOTHWAYS, FEATURES, TOKENS
from tests.support.replies import Recorder
from tests.support.rig import PRINCIPAL, Rig, rows_of

MEMORY_ROW = bytes(ATTENTIVE.memory_row_bytes)


def _message_bytes(it: Rig) -> None:
    it.admission.message(bytes(1025))


def _chunk_steps(it: Rig) -> None:
    it.step("s", 1, range(4))


def _predict_steps(it: Rig) -> None:
    it.admission.sequence(FEATURES, 4, rows_of(FEATURES, *range(4)))


def _generate_steps(it: Rig) -> None:
    it.admission.generation(
        TOKENS,
        prompt=rows_of(TOKENS, 1),
        prompt_length=1,
        steps_max=3,
        sampling=Sampling(),
        stop_tokens=(),
    )


def _sessions(it: Rig) -> None:
    for name in "abcd":
        it.open(name)


def _streams(it: Rig) -> None:
    streams = Streams(it.limits.streams_max)
    with ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(streams.joined(cast(Any, object())))


def _memory_rows(it: Rig) -> None:
    model = replace(ATTENTIVE, memory_rows_max=it.limits.memory_rows_max)
    it.models.add(model)
    it.open(model=model.key.name, memory=MemoryRows(4, MEMORY_ROW * 4))


def _memories_bytes(it: Rig) -> None:
    it.models.add(ATTENTIVE)
    it.open(model=ATTENTIVE.key.name, memory=MemoryRows(1, MEMORY_ROW))


def _predictions(it: Rig) -> None:
    it.models.add(BOTHWAYS)
    for _ in range(4):
        done: list[Any] = []
        sequence = WholeSequence(BOTHWAYS, rows_of(BOTHWAYS, 1), 1, 1, done.append, 0.0, None)
        it.operations.predict(sequence)


def _steps_in_flight(it: Rig) -> None:
    it.open()
    it.step("s", 1, range(4))


def _inbox_chunks(it: Rig) -> None:
    it.open()
    for step in range(1, 5):
        it.send("s", step, [step], Recorder())


def _inbox_bytes(it: Rig) -> None:
    it.open()
    it.send("s", 1, range(200), Recorder())


def _result_bytes(it: Rig) -> None:
    binding = Binding(PRINCIPAL, "s", 1, FEATURES, Recorder(), 1)
    it.admission.chunk(
        Entry(binding, 1, 100, OutputMode.ALL), rows_of(FEATURES, *range(100)), 0, None
    )


def _results(it: Rig) -> None:
    ResultsBudget(it.limits).count_for_call("ann", 2**20)


def _idle_seconds(it: Rig) -> None:
    it.admission.idle_seconds(4)


def _lifetime_seconds(it: Rig) -> None:
    it.open()
    reply = Recorder()
    it.clock.advance(2)
    it.step("s", 1, [1])
    it.clock.advance(1.5)
    chunk = it.send("s", 2, [1], reply)
    it.run()
    error = reply.of(chunk).error
    assert error is not None
    raise error


def _host_state_bytes(it: Rig) -> None:
    it.open()
    it.step("s", 1, [1])
    it.fork("s", *(f"copy-{number}" for number in range(20)))


def _forks(it: Rig) -> None:
    it.admission.fork_ids([""] * 4)


def _labels(it: Rig) -> None:
    it.admission.open(
        principal=PRINCIPAL,
        model=FEATURES.key.name,
        version=0,
        session_id="",
        mode=0,
        durability=0,
        idle_seconds=None,
        memory=None,
        labels=dict.fromkeys("abcd", ""),
        token="",
    )


PROVOKED: dict[str, tuple[float, Callable[[Rig], object]]] = {
    "message_bytes_max": (1024, _message_bytes),
    "chunk_steps_max": (3, _chunk_steps),
    "predict_steps_max": (3, _predict_steps),
    "generate_steps_max": (3, _generate_steps),
    "sessions_max": (3, _sessions),
    "principal_sessions_max": (3, _sessions),
    "streams_max": (3, _streams),
    "memory_rows_max": (3, _memory_rows),
    "memories_bytes_max": (3, _memories_bytes),
    "predictions_max": (3, _predictions),
    "steps_in_flight_max": (3, _steps_in_flight),
    "inbox_chunks_max": (3, _inbox_chunks),
    "inbox_bytes_max": (1024, _inbox_bytes),
    "result_bytes_max": (1024, _result_bytes),
    "principal_results_bytes_max": (1024, _results),
    "results_total_bytes_max": (1024, _results),
    "idle_seconds_max": (3, _idle_seconds),
    "lifetime_seconds_max": (3, _lifetime_seconds),
    "host_state_bytes_max": (2048, _host_state_bytes),
    "fork_sessions_max": (3, _forks),
    "labels_max": (3, _labels),
}
ON_THE_WIRE = {
    "metadata_bytes_max",
    "stream_sessions_max",
    "frame_entries_max",
    "slow_reader_seconds_max",
    "concurrent_calls_max",
    "connections_max",
    "connection_calls_max",
    "connection_idle_seconds_max",
    "connection_handshake_seconds_max",
    "connection_watches_max",
    "health_calls_max",
    "message_seconds_max",
    "request_bytes_max",
}
"""They need a server: tests/integration/test_limits.py and tests/attacks."""
REFUSE_NOTHING = {
    "running_predictions_max",
    "outbox_bytes_max",
    "idle_seconds_default",
    "held_results_steps_max",
    "held_results_bytes_max",
    "held_results_total_bytes_max",
    "replay_steps_max",
    "replay_bytes_max",
    "ended_sessions_max",
    "ended_seconds_max",
}
"""What is beyond them waits, is forgotten, or is the client's to keep."""


def test_every_limit_is_provoked_or_refuses_nothing() -> None:
    kinds = (set(PROVOKED), ON_THE_WIRE, REFUSE_NOTHING)
    assert set().union(*kinds) == set(LimitsConfig.model_fields)
    assert sum(map(len, kinds)) == len(LimitsConfig.model_fields)


@pytest.mark.parametrize("name", PROVOKED)
def test_a_refusal_names_the_limit_and_its_value(name: str) -> None:
    value, provoke = PROVOKED[name]
    it = Rig((FEATURES, TOKENS), limits=LimitsConfig.model_validate({name: value}))
    with pytest.raises(ConveyorError) as caught:
        provoke(it)
    assert f"limits.{name} is {value:,}" in caught.value.message


def test_a_limit_of_a_bundle_names_its_model() -> None:
    own = replace(FEATURES, chunk_steps_max=2)
    with pytest.raises(ConveyorError, match=r"limits.chunk_steps_max is 2 in .*'weather'"):
        Rig((own,)).step("s", 1, range(3))
    source = LimitSource("limits.memory_rows_max", model="captions")
    model = replace(ATTENTIVE, memory_rows_limit=source)
    with pytest.raises(ConveyorError, match=r"limits.memory_rows_max is 5 in .*'captions'"):
        Rig((model,)).open(memory=MemoryRows(6, MEMORY_ROW * 6))


def test_values_are_written_for_people() -> None:
    assert limit_text("limits.a", 65_536) == "limits.a is 65,536"
    assert limit_text("limits.a", 86_400.0) == "limits.a is 86,400"
    assert limit_text("limits.a", 0.5) == "limits.a is 0.5"
    error = InboxFull("full", limit="limits.inbox_chunks_max", maximum=65_536)
    assert error.metadata == {"limit": "limits.inbox_chunks_max", "maximum": "65536"}
