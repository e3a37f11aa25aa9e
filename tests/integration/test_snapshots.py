"""Paging, snapshots and barriers: a carry keeps its bits wherever it has been."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from conveyor.v1 import session_pb2
from tests.integration.bundles import TINY, add_model
from tests.integration.conftest import StartServer
from tests.integration.process import ServerProcess
from tests.integration.wire import NONE, Entry, Refusal, Stream, Wire, refused, until

Rows = Callable[..., npt.NDArray[Any]]


@pytest.fixture(scope="module")
def other(start_server: StartServer) -> ServerProcess:
    """A second server of the same models, with two slots only."""
    return start_server({"engine.slots": 2, "shutdown.grace_seconds": 2})


async def _import(wire: Wire, snapshot: bytes, session_id: str = "") -> session_pb2.Session:
    request = session_pb2.ImportSessionRequest(snapshot=snapshot, session_id=session_id)
    return (await wire.sessions.ImportSession(request)).session


@pytest.mark.parametrize("model", ["tiny", "deep", "words"])
async def test_a_session_moves_to_another_server_with_its_bits(
    wire: Wire, other: ServerProcess, rows: Rows, model: str
) -> None:
    x = rows(30, vocabulary=7) if model == "words" else rows(30, 4 if model == "deep" else 3)
    async with Wire(other.address) as there:
        session_id = await wire.new_session(model)
        await wire.step(session_id, 1, x[:17])
        moved = await _import(there, await wire.export(session_id))
        assert (moved.session_id, moved.applied_step, moved.epoch) == (session_id, 17, 1)
        out = (await there.step(session_id, 18, x[17:])).rows
        assert out == (await wire.predict(model, x))[-len(out) :]
        assert out == (await wire.step(session_id, 18, x[17:])).rows
        again = await refused(_import(there, await wire.export(session_id)))
        assert again == Refusal("ALREADY_EXISTS", "SESSION_EXISTS")
        await there.close(session_id)


async def test_a_session_never_stepped_moves_too(
    wire: Wire, other: ServerProcess, rows: Rows
) -> None:
    async with Wire(other.address) as there:
        session_id = await wire.new_session("tiny")
        moved = await _import(there, await wire.export(session_id))
        assert moved.applied_step == 0
        out = (await there.step(session_id, 1, rows(3))).rows
        assert out == await wire.predict("tiny", rows(3))
        await there.close(session_id)


async def test_a_snapshot_of_other_weights_is_refused(
    wire: Wire, start_server: StartServer, rows: Rows, tmp_path: Path
) -> None:
    add_model(tmp_path, "tiny", TINY, seed=1)
    server = start_server(models=tmp_path)
    session_id = await wire.new_session("tiny")
    await wire.step(session_id, 1, rows(2))
    async with Wire(server.address) as there:
        incompatible = Refusal("FAILED_PRECONDITION", "SNAPSHOT_INCOMPATIBLE")
        assert await refused(_import(there, await wire.export(session_id))) == incompatible
        of_another = await wire.new_session("deep")
        assert await refused(_import(there, await wire.export(of_another))) == incompatible
        page = await there.sessions.ListSessions(session_pb2.ListSessionsRequest())
        assert page.total_size == 0


async def test_a_damaged_snapshot_is_refused(wire: Wire, rows: Rows) -> None:
    session_id = await wire.new_session("tiny")
    await wire.step(session_id, 1, rows(2))
    snapshot = await wire.export(session_id)
    await wire.close(session_id)
    random = np.random.default_rng(0)
    damaged = [snapshot[:cut] for cut in (0, 1, 9, len(snapshot) // 2, len(snapshot) - 1)]
    damaged.append(snapshot + b"\0")
    for bit in random.integers(0, 8 * len(snapshot), 60):
        flipped = bytearray(snapshot)
        flipped[bit // 8] ^= 1 << (bit % 8)
        damaged.append(bytes(flipped))
    for each in damaged:
        said = await refused(_import(wire, each))
        assert said.reason in ("SNAPSHOT_CORRUPT", "SNAPSHOT_INCOMPATIBLE")
        assert said.code in ("DATA_LOSS", "FAILED_PRECONDITION")
    assert (await _import(wire, snapshot)).applied_step == 2
    await wire.close(session_id)


async def test_fifty_sessions_on_two_slots_keep_their_bits(
    wire: Wire, other: ServerProcess, rows: Rows
) -> None:
    inputs = [rows(9, seed=number) for number in range(50)]
    before = [other.metric(f"conveyor_page_{way}_total", model="tiny") for way in ("ins", "outs")]
    outs = [bytearray() for _ in inputs]
    async with Wire(other.address) as there, there.stream() as stream:
        handles = [(await stream.open("tiny")).handle for _ in inputs]
        for t in range(0, 9, 3):
            await stream.send_steps(
                *(Entry(h, t + 1, x[t : t + 3]) for h, x in zip(handles, inputs, strict=True))
            )
            got = 0
            while got < 50:
                for piece in await _some_pieces(stream):
                    outs[handles.index(piece[0])] += piece[1]
                    got += 1
        assert other.metric("conveyor_slots", state="used", model="tiny") == 2
        # The same inputs again on the stream's sessions are answered from memory.
        await stream.send_steps(Entry(handles[0], 9, inputs[0][8:]))
        assert (await stream.pieces(1, 2))[0].duplicate
        for handle in handles:
            await stream.send(close=session_pb2.CloseFrame(handle=handle))
            await stream.next("closed")
    for x, out in zip(inputs, outs, strict=True):
        assert bytes(out) == await wire.predict("tiny", x)
    after = [other.metric(f"conveyor_page_{way}_total", model="tiny") for way in ("ins", "outs")]
    assert all(now - then >= 90 for now, then in zip(after, before, strict=True))
    assert other.metric("conveyor_state_bytes", tier="host") == 0


async def _some_pieces(stream: Stream) -> list[tuple[int, bytes]]:
    from tests.integration.wire import split

    return [(piece.handle, piece.rows) for piece in split(await stream.next("results"), 2)]


async def test_a_paged_out_session_says_where_it_lies(other: ServerProcess, rows: Rows) -> None:
    async with Wire(other.address) as there:
        ids = [await there.new_session("tiny") for _ in range(3)]
        for session_id in ids:
            await there.step(session_id, 1, rows(1))
        tiers = [(await there.get(session_id)).tier for session_id in ids]
        assert tiers == [
            session_pb2.STATE_TIER_HOST,
            session_pb2.STATE_TIER_DEVICE,
            session_pb2.STATE_TIER_DEVICE,
        ]
        # Exporting and forking work from wherever the carry is.
        snapshot = await there.export(ids[0])
        assert (await _import(there, snapshot, "copy")).tier == session_pb2.STATE_TIER_HOST
        outs = [(await there.step(each, 2, rows(1))).rows for each in (*ids, "copy")]
        assert len(set(outs)) == 1
        for session_id in (*ids, "copy"):
            await there.close(session_id)


# --- what comes after chunks waits for them ---


async def _busy(wire: Wire, stream: Stream, steps: int, rows: Rows) -> str:
    """A session whose queue holds a long chunk."""
    opened = await stream.open("heavy")
    await stream.send_steps(Entry(opened.handle, 1, rows(steps, 8), NONE))
    await stream.next("results")
    session_id = opened.session.session.session_id
    assert (await wire.get(session_id)).state == session_pb2.SESSION_STATE_ACTIVE
    return session_id


async def test_export_and_fork_wait_for_what_was_sent_before(wire: Wire, rows: Rows) -> None:
    async with wire.stream() as stream:
        session_id = await _busy(wire, stream, 600, rows)
        exported = wire.sessions.ExportSession(
            session_pb2.ExportSessionRequest(session_id=session_id)
        )
        forked = wire.sessions.ForkSession(
            session_pb2.ForkSessionRequest(session_id=session_id, new_session_ids=["waited"])
        )
        answers = await asyncio.gather(exported, forked)
        assert answers[0].session.applied_step == 600
        assert answers[1].sessions[0].applied_step == 600
        imported = await _import(wire, answers[0].snapshot, "imported-after")
        outs = [
            (await wire.step(each, 601, rows(1, 8))).rows
            for each in ("waited", imported.session_id)
        ]
        assert outs[0] == outs[1]
        for each in (session_id, "waited", "imported-after"):
            await wire.close(each)


async def test_reset_waits_for_what_was_sent_before(wire: Wire, rows: Rows) -> None:
    async with wire.stream() as stream:
        session_id = await _busy(wire, stream, 600, rows)
        request = session_pb2.ResetSessionRequest(session_id=session_id)
        response = await wire.sessions.ResetSession(request)
        assert response.session.applied_step == 0
        lengths = 16
        while lengths < 600:
            lengths += sum(entry.length for entry in (await stream.next("results")).entries)
        assert lengths == 600, "every step was run before the session was reset"
        await wire.close(session_id)


async def test_close_waits_and_what_comes_after_it_is_refused(wire: Wire, rows: Rows) -> None:
    async with wire.stream() as stream:
        session_id = await _busy(wire, stream, 600, rows)
        closing = asyncio.ensure_future(wire.close(session_id))
        assert (await closing).applied_step == 600
        gone = Refusal("NOT_FOUND", "SESSION_CLOSED")
        assert await refused(wire.step(session_id, 601, rows(1, 8))) == gone


async def test_a_caller_that_gives_up_waiting_leaves_the_session_sound(
    wire: Wire, rows: Rows
) -> None:
    async with wire.stream() as stream:
        session_id = await _busy(wire, stream, 400, rows)
        request = session_pb2.ExportSessionRequest(session_id=session_id)
        said = await refused(wire.sessions.ExportSession(request, timeout=0.01))
        assert said.code == "DEADLINE_EXCEEDED"

        async def done() -> bool:
            return (await wire.get(session_id)).applied_step == 400

        await until(done)
        assert (await wire.step(session_id, 401, rows(1, 8))).length == 1
        await wire.close(session_id)
