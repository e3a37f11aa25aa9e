"""Every limit: what is at it passes, what is beyond it is refused by name and harms nobody."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pytest
from grpc import aio

from conveyor.v1 import session_pb2
from conveyor_client import LimitExceeded
from conveyor_client import aio as aio_client
from tests.integration.conftest import StartServer
from tests.integration.process import ServerProcess
from tests.integration.wire import (
    LAST,
    NONE,
    Entry,
    Refusal,
    Stream,
    Wire,
    refusal,
    refusal_of,
    refused,
    seconds,
    until,
)

Rows = Callable[..., npt.NDArray[Any]]
MESSAGE_BYTES: Final = 1440
"""120 rows of `tiny`."""
TRANSPORT_BYTES: Final = MESSAGE_BYTES + 64 * 2**10 + 5 * 32
TOKENS: Final = """
[auth.tokens]
"anna-0123456789abcdef" = "anna"
"bert-0123456789abcdef" = "bert"
"""


@pytest.fixture(scope="module")
def server(start_server: StartServer) -> ServerProcess:
    """Every limit as low as a test needs it."""
    return start_server(
        {
            "shutdown.grace_seconds": 1,
            "limits.message_bytes_max": MESSAGE_BYTES,
            "limits.chunk_steps_max": 100,
            "limits.predict_steps_max": 110,
            "limits.generate_steps_max": 50,
            "limits.stream_sessions_max": 4,
            "limits.streams_max": 3,
            "limits.frame_entries_max": 5,
            "limits.steps_in_flight_max": 120,
            "limits.held_results_steps_max": 8,
            "limits.fork_sessions_max": 3,
            "limits.sessions_max": 60,
            "limits.labels_max": 2,
            "limits.idle_seconds_default": 100,
            "limits.idle_seconds_max": 100,
            "limits.metadata_bytes_max": 4096,
        }
    )


@pytest.fixture(autouse=True)
async def nothing_left(server: ServerProcess) -> AsyncIterator[None]:
    """Closes every session after a test, and sees that no chunk is left behind."""
    yield
    async with Wire(server.address) as wire:
        page = await wire.sessions.ListSessions(session_pb2.ListSessionsRequest(page_size=1000))
        for session in page.sessions:
            await wire.close(session.session_id)
        await until(lambda: server.metric("conveyor_streams") == 0)
    assert server.metric("conveyor_inbox_chunks") == 0


def exhausted(reason: str) -> Refusal:
    return Refusal("RESOURCE_EXHAUSTED", reason)


def names(said: Refusal, limit: str, value: str) -> bool:
    """Whether a refusal tells people which setting it comes from, and its value."""
    return f"limits.{limit} is {value}" in said.message


async def test_chunk_steps(wire: Wire, rows: Rows) -> None:
    session_id = await wire.new_session("tiny")
    assert (await wire.step(session_id, 1, rows(100))).length == 100
    said = await refused(wire.step(session_id, 101, rows(101)))
    assert said == Refusal("INVALID_ARGUMENT", "CHUNK_TOO_LONG")
    assert said.metadata == {"limit": "limits.chunk_steps_max", "maximum": "100"}
    assert names(said, "chunk_steps_max", "100")
    assert (await wire.get(session_id)).applied_step == 100


async def test_predict_steps(wire: Wire, rows: Rows) -> None:
    assert len(await wire.predict("tiny", rows(110))) == 110 * 8
    said = await refused(wire.predict("tiny", rows(111)))
    assert said == Refusal("INVALID_ARGUMENT", "CHUNK_TOO_LONG")
    assert names(said, "predict_steps_max", "110")


async def test_generate_steps(wire: Wire) -> None:
    prompt = {"model": "words", "prompt": bytes(40), "prompt_length": 10}
    made = await wire.generate(**prompt, steps_max=40)
    assert sum(len(response.tokens) for response in made) == 40
    said = await refused(wire.generate(**prompt, steps_max=41))
    assert said == Refusal("INVALID_ARGUMENT", "CHUNK_TOO_LONG")
    assert names(said, "generate_steps_max", "50")


async def test_message_bytes_in_a_call(wire: Wire, rows: Rows) -> None:
    session_id = await wire.new_session("tiny")
    too_large = exhausted("MESSAGE_TOO_LARGE")
    # Just beyond the limit, and just below where the transport itself refuses.
    for size in (MESSAGE_BYTES + 12, TRANSPORT_BYTES - 100):
        said = await refused(wire.step(session_id, 1, bytes(size), 1))
        assert said == too_large
        assert said.retry_seconds is None
        assert said.metadata["limit"] == "limits.message_bytes_max"
        assert names(said, "message_bytes_max", "1,440")
        assert await refused(wire.predict("tiny", np.zeros(size // 4, "<f4"))) == too_large
    beyond = await refused(wire.step(session_id, 1, bytes(TRANSPORT_BYTES + 1), 1))
    assert beyond.code == "RESOURCE_EXHAUSTED"
    assert (await wire.get(session_id)).applied_step == 0
    assert (await wire.step(session_id, 1, rows(100))).length == 100


async def test_message_bytes_at_the_limit(wire: Wire, rows: Rows) -> None:
    async with wire.stream() as stream:
        handles = [(await stream.open("tiny")).handle for _ in range(2)]
        await stream.send_steps(Entry(handles[0], 1, rows(60)), Entry(handles[1], 1, rows(60)))
        applied = 0
        while applied < 120:
            applied += sum(entry.length for entry in (await stream.next("results")).entries)


async def test_message_bytes_on_a_stream(wire: Wire, rows: Rows) -> None:
    async with wire.stream() as stream:
        handle = (await stream.open("tiny")).handle
        await stream.send_steps(Entry(handle, 1, np.zeros(MESSAGE_BYTES + 1, "u1"), 0, 1))
        said, frame = await stream.failure()
        assert said == exhausted("MESSAGE_TOO_LARGE")
        assert (frame.handle, frame.first_step) == (handle, 1)
        await stream.steps(handle, 1, rows(3), 2)


async def test_a_message_beyond_the_transport_ends_its_stream_alone(wire: Wire, rows: Rows) -> None:
    async with wire.stream() as harmed, wire.stream() as other:
        opened = await harmed.open("tiny")
        handle = (await other.open("tiny")).handle
        await harmed.send_steps(Entry(opened.handle, 1, np.zeros(TRANSPORT_BYTES + 9, "u1"), 0, 1))
        assert (await harmed.call.code()).name == "RESOURCE_EXHAUSTED"
        await other.steps(handle, 1, rows(3), 2)
    assert (await wire.get(opened.session.session.session_id)).applied_step == 0


async def test_metadata_bytes(wire: Wire) -> None:
    wire.metadata = (("note", "x" * 3000),)
    await wire.open("tiny")
    wire.metadata = (("note", "x" * 4200),)
    said = await refused(wire.open("tiny"))
    assert said == exhausted("MESSAGE_TOO_LARGE")
    assert names(said, "metadata_bytes_max", "4,096")
    wire.metadata = (("note", "x" * 20_000),)
    assert (await refused(wire.open("tiny"))).code == "RESOURCE_EXHAUSTED"


async def test_frame_entries(wire: Wire, rows: Rows) -> None:
    async with wire.stream() as stream:
        handle = (await stream.open("tiny")).handle
        await stream.send_steps(*(Entry(handle, n + 1, rows(1)) for n in range(5)))
        assert sum(piece.length for piece in await stream.pieces(5, 2)) == 5
        await stream.send_steps(*(Entry(handle, n + 6, rows(1)) for n in range(6)))
        said, frame = await stream.failure()
        assert said == exhausted("MESSAGE_TOO_LARGE")
        assert said.metadata == {"limit": "limits.frame_entries_max", "maximum": "5"}
        assert names(said, "frame_entries_max", "5")
        assert (frame.handle, frame.first_step, frame.tag) == (0, 0, 0)
        await stream.steps(handle, 6, rows(1), 2)
        assert not stream.unread  # one failure for the frame, not one for each entry


async def test_stream_sessions(wire: Wire, rows: Rows) -> None:
    async with wire.stream() as stream:
        handles = [(await stream.open("tiny")).handle for _ in range(4)]
        said = await stream.open_or_fail("tiny")
        assert said == exhausted("STREAM_SESSIONS_LIMIT")
        assert isinstance(said, Refusal)
        assert said.retry_seconds == 1.0
        assert said.metadata == {"limit": "limits.stream_sessions_max", "maximum": "4"}
        assert names(said, "stream_sessions_max", "4")
        await stream.steps(handles[0], 1, rows(1), 2)
        await stream.send(close=session_pb2.CloseFrame(handle=handles[3]))
        await stream.next("closed")
        await stream.open("tiny")


async def test_opens_sent_at_once_count_too(wire: Wire) -> None:
    async with wire.stream() as stream:
        for tag in range(6):
            request = session_pb2.OpenSessionRequest(model="tiny")
            await stream.send(open=session_pb2.OpenFrame(tag=tag + 1, session=request))
        for _ in range(4):
            await stream.next("opened")
        for _ in range(2):
            assert (await stream.failure())[0] == exhausted("STREAM_SESSIONS_LIMIT")


async def test_streams(wire: Wire) -> None:
    async with wire.stream() as one, wire.stream() as two, wire.stream() as three:
        for stream in (one, two, three):
            await stream.open("tiny")
        beyond = Stream(wire)
        said = await refused(beyond.call.read())
        assert said == exhausted("STREAMS_LIMIT")
        assert names(said, "streams_max", "3")
        assert said.retry_seconds == 1.0
        await one.end()
        await until(lambda: _opens(wire))


async def _opens(wire: Wire) -> bool:
    async with wire.stream() as stream:
        try:
            await stream.open("tiny")
        except (aio.AioRpcError, asyncio.InvalidStateError):  # the place may not be free yet
            return False
        return True


async def test_steps_in_flight(wire: Wire, rows: Rows) -> None:
    async with wire.stream() as stream:
        handle = (await stream.open("heavy")).handle
        for number in range(12):  # 10 chunks of 10 steps and 20 more: none can be done by then
            await stream.send_steps(Entry(handle, 1 + 10 * number, rows(10, 8), NONE))
        await stream.send_steps(Entry(handle, 121, rows(45, 8), NONE))
        refusals = 0
        applied = 0
        while applied < 120:
            frame = await stream.read()
            if frame.WhichOneof("frame") == "failure":
                refusals += 1
                said = refusal(frame.failure.status)
                assert said == exhausted("STEPS_IN_FLIGHT_LIMIT")
                assert said.retry_seconds == 0.05
                assert frame.failure.first_step == 121
            else:
                applied += sum(entry.length for entry in frame.results.entries)
        assert refusals <= 1
        # Whatever was refused can be sent again.
        if refusals:
            await stream.steps(handle, 121, rows(45, 8), 1, output=NONE)


async def test_steps_in_flight_of_one_frame(wire: Wire, rows: Rows) -> None:
    # Chunks of one frame arrive in the same tick, so that none is done before the last is counted.
    async with wire.stream() as stream:
        handle = (await stream.open("tiny")).handle
        await stream.send_steps(Entry(handle, 1, rows(60), LAST), Entry(handle, 61, rows(60), LAST))
        applied = 0
        while applied < 120:
            applied += sum(entry.length for entry in (await stream.next("results")).entries)
        await stream.send_steps(
            Entry(handle, 121, rows(60), NONE),
            Entry(handle, 181, rows(59), NONE),
            Entry(handle, 240, rows(1), NONE),
            Entry(handle, 241, np.zeros((0, 3), np.float32), NONE),
        )
        assert (await stream.failure())[0].reason == "EMPTY_CHUNK"
        while applied < 240:
            applied += sum(entry.length for entry in (await stream.next("results")).entries)


async def test_sessions_of_the_server(wire: Wire, rows: Rows) -> None:
    ids = [await wire.new_session("tiny") for _ in range(60)]
    said = await refused(wire.open("tiny"))
    assert said == exhausted("SESSIONS_LIMIT")
    assert said.retry_seconds == 1.0
    for call in (
        wire.predict("tiny", rows(1)),
        wire.generate(model="words", prompt=bytes(4), prompt_length=1, steps_max=1),
        wire.sessions.ForkSession(
            session_pb2.ForkSessionRequest(session_id=ids[0], new_session_ids=[""])
        ),
    ):
        assert await refused(call) == exhausted("SESSIONS_LIMIT")
    await wire.step(ids[0], 1, rows(1))  # those there are go on
    await wire.close(ids[1])
    await wire.open("tiny")


async def test_forks(wire: Wire) -> None:
    session_id = await wire.new_session("tiny")

    def fork(count: int) -> Any:
        request = session_pb2.ForkSessionRequest(
            session_id=session_id, new_session_ids=[""] * count
        )
        return wire.sessions.ForkSession(request)

    assert len((await fork(3)).sessions) == 3
    assert await refused(fork(4)) == Refusal("INVALID_ARGUMENT", "INVALID_FIELD")


async def test_labels(wire: Wire) -> None:
    await wire.open("tiny", labels={"a": "1", "b": "2"})
    said = await refused(wire.open("tiny", labels={"a": "1", "b": "2", "c": "3"}))
    assert said == Refusal("INVALID_ARGUMENT", "INVALID_FIELD")


async def test_idle_time(wire: Wire) -> None:
    assert (await wire.open("tiny", idle_ttl=seconds(100))).session.idle_ttl.ToSeconds() == 100
    said = await refused(wire.open("tiny", idle_ttl=seconds(100.000001)))
    assert said == Refusal("INVALID_ARGUMENT", "INVALID_FIELD")
    assert (await wire.open("tiny")).session.idle_ttl.ToSeconds() == 100


async def test_results_held(wire: Wire, rows: Rows) -> None:
    x = rows(20)
    session_id = await wire.new_session("tiny")
    for t in range(20):
        await wire.step(session_id, t + 1, x[t : t + 1])
    assert (await wire.step(session_id, 13, x[12:13])).duplicate
    said = await refused(wire.step(session_id, 12, x[11:12]))
    assert said == Refusal("FAILED_PRECONDITION", "STEP_RESULT_NOT_HELD")
    assert (await wire.get(session_id)).applied_step == 20


# --- limits that need a server of their own ---


async def test_sessions_of_one_principal(start_server: StartServer) -> None:
    server = start_server(
        {"limits.principal_sessions_max": 2},
        config=TOKENS,
    )
    async with (
        Wire(server.address, [("authorization", "Bearer anna-0123456789abcdef")]) as anna,
        Wire(server.address, [("authorization", "Bearer bert-0123456789abcdef")]) as bert,
    ):
        await anna.open("tiny")
        await anna.open("tiny")
        said = await refused(anna.open("tiny"))
        assert said == exhausted("PRINCIPAL_SESSIONS_LIMIT")
        assert said.retry_seconds == 1.0
        await bert.open("tiny")


@pytest.mark.parametrize(
    ("setting", "maximum", "accepted"),
    [("limits.inbox_chunks_max", 3, 3), ("limits.inbox_bytes_max", 1024, 2)],
)
async def test_the_inbox(
    start_server: StartServer, rows: Rows, setting: str, maximum: int, accepted: int
) -> None:
    server = start_server({setting: maximum, "engine.quantum_steps": 64})
    async with Wire(server.address) as wire, wire.stream() as stream:
        handles = [(await stream.open("tiny")).handle for _ in range(5)]
        await stream.send_steps(*(Entry(handle, 1, rows(40), LAST) for handle in handles))
        for handle in handles[accepted:]:
            said, frame = await stream.failure()
            assert said == exhausted("INBOX_FULL")
            assert said.metadata == {"limit": setting, "maximum": str(maximum)}
            assert said.retry_seconds == 0.1
            assert (frame.handle, frame.first_step) == (handle, 1)
        assert [piece.length for piece in await stream.pieces(accepted, 2)] == [40] * accepted
        for handle in handles[:accepted]:
            await stream.steps(handle, 41, rows(1), 2)
        await stream.steps(handles[-1], 1, rows(40), 2)
    assert server.metric("conveyor_inbox_chunks") == 0


async def test_sessions_end_when_nobody_uses_them(start_server: StartServer, rows: Rows) -> None:
    server = start_server(
        {"limits.ended_seconds_max": 600},
        config=TOKENS,
    )
    async with (
        Wire(server.address, [("authorization", "Bearer anna-0123456789abcdef")]) as anna,
        Wire(server.address, [("authorization", "Bearer bert-0123456789abcdef")]) as bert,
        anna.stream() as stream,
    ):
        opened = await stream.open("tiny", session_id="short-lived", idle_ttl=seconds(0.3))
        await stream.steps(opened.handle, 1, rows(2), 2)
        closed = await stream.next("closed")
        assert refusal(closed.status) == Refusal("NOT_FOUND", "SESSION_EXPIRED")
        assert (closed.handle, closed.applied_step) == (opened.handle, 2)
        expired = Refusal("NOT_FOUND", "SESSION_EXPIRED")
        assert await refused(anna.get("short-lived")) == expired
        assert await refused(anna.step("short-lived", 3, rows(1))) == expired
        assert await refused(anna.open(session_id="short-lived", mode=2)) == expired
        absent = Refusal("NOT_FOUND", "SESSION_NOT_FOUND")
        assert await refused(bert.get("short-lived")) == absent
        # A heartbeat in time keeps a session.
        kept = await stream.open("tiny", idle_ttl=seconds(1.5))
        for nonce in range(10):
            await asyncio.sleep(0.2)
            await stream.send(heartbeat=session_pb2.HeartbeatFrame(nonce=nonce))
            await stream.next("heartbeat")
        await stream.steps(kept.handle, 1, rows(1), 2)
        assert server.metric("conveyor_sessions_ended_total", reason="expired") == 1
        assert server.metric("conveyor_slots", state="used", model="tiny") == 1


async def test_lifetime_ends_however_busy_a_session_is(
    start_server: StartServer, rows: Rows
) -> None:
    server = start_server({"limits.lifetime_seconds_max": 0.5})
    async with Wire(server.address) as wire:
        session_id = await wire.new_session("tiny")
        step, said = 0, list[Refusal]()

        async def ended() -> bool:
            nonlocal step
            try:
                await wire.step(session_id, step + 1, rows(1))
            except aio.AioRpcError as error:
                said.append(refusal_of(error))
                return True
            step += 1
            return False

        await until(ended)
        assert step > 1
        assert said == [Refusal("NOT_FOUND", "SESSION_EXPIRED")]


async def test_carries_beyond_the_host_memory_evict_the_longest_idle(
    start_server: StartServer, rows: Rows
) -> None:
    server = start_server({"engine.slots": 1, "limits.host_state_bytes_max": 1024})
    async with Wire(server.address) as wire:
        ids = [await wire.new_session("tiny") for _ in range(6)]
        for session_id in ids:
            await wire.step(session_id, 1, rows(1))
        assert await refused(wire.get(ids[0])) == Refusal("NOT_FOUND", "SESSION_EVICTED")
        assert (await wire.get(ids[-1])).applied_step == 1
        assert (await wire.get(ids[-2])).applied_step == 1
        assert server.metric("conveyor_sessions_ended_total", reason="evicted") >= 1
        assert server.metric("conveyor_state_bytes", tier="host") <= 1024


async def test_a_client_that_reads_nothing_is_let_go(start_server: StartServer) -> None:
    server = start_server(
        {"limits.slow_reader_seconds_max": 0.5, "limits.outbox_bytes_max": 65_536}
    )
    rows = np.zeros((4_000, 1), np.float32)
    async with Wire(server.address) as wire, wire.stream() as stream:
        handle = (await stream.open("broad")).handle
        await stream.send_steps(Entry(handle, 1, rows))  # 66 MB of results
        await until(lambda: server.metric("conveyor_streams") == 0)
        assert server.metric("conveyor_rejected_total", reason="SLOW_READER") == 1
        await until(lambda: server.metric("conveyor_inbox_chunks") == 0)
        # Why, it learns when it reads on at last.
        said = await refused(_read_on(stream))
        assert said == exhausted("SLOW_READER")
        assert names(said, "slow_reader_seconds_max", "0.5")


async def _read_on(stream: Stream) -> None:
    while await stream.call.read() is not aio.EOF:
        pass


async def test_more_calls_at_once_than_the_server_handles(start_server: StartServer) -> None:
    server = start_server({"limits.concurrent_calls_max": 1})
    async with (
        Wire(server.address) as wire,
        aio_client.Client(server.address) as client,
        wire.stream() as stream,
    ):
        await stream.open("tiny")
        with pytest.raises(LimitExceeded, match=r"\(limits.concurrent_calls_max is 1\)"):
            await client.model("tiny")
