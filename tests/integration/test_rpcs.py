"""Every RPC's happy path, each against what the model itself computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from conveyor.v1 import model_pb2, session_pb2
from conveyor_models import Bundle
from tests.integration.process import ServerProcess
from tests.integration.wire import LAST, NONE, Refusal, Wire, floats, refused, seconds

Rows = Callable[..., npt.NDArray[Any]]


def reference(bundle: Bundle, rows: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    _, out = bundle.network(torch.float64).run(torch.from_numpy(rows)[:, None])
    return out[:, 0].numpy()


async def test_a_session_is_opened_stepped_described_and_closed(
    wire: Wire, bundles: dict[str, Bundle], rows: Rows
) -> None:
    opened = await wire.open("tiny", session_id="s-1", labels={"a": "b"}, idle_ttl=seconds(50))
    session = opened.session
    assert (session.session_id, session.model, session.version) == ("s-1", "tiny", 1)
    assert session.model_digest == bundles["tiny"].digest
    assert (session.epoch, session.applied_step, session.durable_step) == (1, 0, 0)
    assert session.state_bytes == 2 * 5 * 4
    assert session.idle_ttl.ToSeconds() == 50
    assert dict(session.labels) == {"a": "b"}
    assert session.tier == session_pb2.STATE_TIER_UNSPECIFIED
    assert not opened.resumed
    assert opened.token
    assert opened.replay_window.steps_max > 0
    assert opened.replay_window.bytes_max > 0
    assert opened.held_results_steps == 256

    x = rows(7)
    first = await wire.step("s-1", 1, x[:3])
    assert (first.first_step, first.length, first.rows_length, first.duplicate) == (1, 3, 3, False)
    second = await wire.step("s-1", 4, x[3:], output=LAST)
    assert (second.length, second.rows_length) == (4, 1)
    expected = reference(bundles["tiny"], x)
    np.testing.assert_allclose(floats(first.rows, 2), expected[:3], rtol=0, atol=1e-6)
    np.testing.assert_allclose(floats(second.rows, 2), expected[6:], rtol=0, atol=1e-6)

    described = await wire.get("s-1")
    assert described.applied_step == 7
    assert described.state == session_pb2.SESSION_STATE_IDLE
    assert described.tier == session_pb2.STATE_TIER_DEVICE
    assert described.expire_time.ToDatetime() > described.active_time.ToDatetime()
    closed = await wire.close("s-1")
    assert closed.applied_step == 7


async def test_opening_again_resumes_with_a_new_epoch_and_changes_nothing(
    wire: Wire, rows: Rows
) -> None:
    x = rows(4)
    opened = await wire.open("tiny")
    one = opened.session.session_id
    out = (await wire.step(one, 1, x[:2])).rows
    again = await wire.open(session_id=one, mode=session_pb2.OPEN_MODE_RESUME, token=opened.token)
    assert again.resumed
    assert (again.session.epoch, again.session.applied_step) == (2, 2)
    out += (await wire.step(one, 3, x[2:], epoch=2)).rows
    assert out == await wire.predict("tiny", x)


async def test_sessions_are_listed_in_pages(wire: Wire) -> None:
    ids = [f"page-{number:02}" for number in range(7)]
    for session_id in ids:
        await wire.open("loop", session_id=session_id)
    found: list[str] = []
    token = ""
    pages = 0
    while True:
        request = session_pb2.ListSessionsRequest(page_size=3, page_token=token, model="loop")
        page = await wire.sessions.ListSessions(request)
        assert page.total_size == 7
        found += [session.session_id for session in page.sessions]
        token, pages = page.next_page_token, pages + 1
        if not token:
            break
    assert (found, pages) == (ids, 3)
    for session_id in ids:
        await wire.close(session_id)


async def test_a_reset_session_begins_anew(wire: Wire, rows: Rows) -> None:
    x = rows(3)
    session_id = await wire.new_session("tiny")
    fresh = (await wire.step(session_id, 1, x)).rows
    response = await wire.sessions.ResetSession(
        session_pb2.ResetSessionRequest(session_id=session_id)
    )
    assert response.session.applied_step == 0
    again = await wire.step(session_id, 1, x)
    assert again.rows == fresh
    assert not again.duplicate


async def test_forks_go_on_independently_from_the_same_state(wire: Wire, rows: Rows) -> None:
    x, y = rows(5, 4), rows(2, 4, seed=1)
    session_id = await wire.new_session("deep")
    await wire.step(session_id, 1, x)
    forked = await wire.sessions.ForkSession(
        session_pb2.ForkSessionRequest(
            session_id=session_id, new_session_ids=["copy", ""], at_step=5
        )
    )
    copies = [session.session_id for session in forked.sessions]
    assert copies[0] == "copy"
    assert len(set(copies)) == 2
    assert all(session.applied_step == 5 for session in forked.sessions)
    outs = [(await wire.step(each, 6, y)).rows for each in (session_id, *copies)]
    whole = await wire.predict("deep", np.concatenate((x, y)))
    assert outs == [whole[5 * 12 :]] * 3


async def test_an_exported_session_is_imported_with_its_state(wire: Wire, rows: Rows) -> None:
    x = rows(6)
    session_id = await wire.new_session("tiny")
    await wire.step(session_id, 1, x[:4])
    snapshot = await wire.export(session_id)
    imported = await wire.sessions.ImportSession(
        session_pb2.ImportSessionRequest(
            snapshot=snapshot, session_id="imported", idle_ttl=seconds(77)
        )
    )
    assert imported.session.session_id == "imported"
    assert imported.session.applied_step == 4
    assert imported.session.idle_ttl.ToSeconds() == 77
    copy = await wire.step("imported", 5, x[4:])
    assert copy.rows == (await wire.step(session_id, 5, x[4:])).rows


async def test_predict_equals_stepping(wire: Wire, bundles: dict[str, Bundle], rows: Rows) -> None:
    x = rows(50, vocabulary=7)
    whole = await wire.predict("words", x)
    session_id = await wire.new_session("words")
    stepped = [(await wire.step(session_id, t + 1, x[t : t + 1])).rows for t in range(50)]
    assert b"".join(stepped) == whole
    expected = reference(bundles["words"], x)
    np.testing.assert_allclose(floats(whole, 7), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("output", "wanted"), [(LAST, slice(19, 20)), (NONE, slice(0, 0))])
async def test_predict_sends_the_rows_wanted(
    wire: Wire, rows: Rows, output: int, wanted: slice
) -> None:
    x = rows(20)
    whole = floats(await wire.predict("tiny", x), 2)
    request = session_pb2.PredictRequest(model="tiny", version=1, length=20, rows=x.tobytes())
    request.output = session_pb2.OutputMode.ValueType(output)
    response = await wire.sessions.Predict(request)
    assert response.version == 1
    assert response.rows_length == len(whole[wanted])
    assert response.rows == whole[wanted].tobytes()


async def test_predict_leaves_no_session(wire: Wire, rows: Rows) -> None:
    before = (await wire.sessions.ListSessions(session_pb2.ListSessionsRequest())).total_size
    await wire.predict("tiny", rows(3))
    after = await wire.sessions.ListSessions(session_pb2.ListSessionsRequest())
    assert after.total_size == before


async def test_models_are_listed_and_described(wire: Wire, bundles: dict[str, Bundle]) -> None:
    listed: list[model_pb2.Model] = []
    token = ""
    while True:
        page = await wire.models.ListModels(
            model_pb2.ListModelsRequest(page_size=2, page_token=token)
        )
        listed += page.models
        token = page.next_page_token
        if not token:
            break
    assert [model.name for model in listed] == sorted(bundles)
    described = await wire.models.GetModel(model_pb2.GetModelRequest(name="deep"))
    model = described.model
    spec = bundles["deep"].spec
    assert (model.version, model.digest, model.newest) == (1, bundles["deep"].digest, True)
    assert (model.parameters, model.carry_bytes) == (spec.weight_values, 4 * spec.carry_values)
    assert [(layer.cell, layer.size, layer.projection) for layer in model.layers] == [
        ("lstm", 33, 17),
        ("lstm", 9, 0),
    ]
    signature = model.signature
    assert signature.input.element_type == model_pb2.ELEMENT_TYPE_FLOAT32
    assert (signature.input.row_elements, signature.input.row_bytes) == (4, 16)
    assert (signature.output.row_elements, signature.output_activation) == (3, "sigmoid")
    assert model.streamable
    assert not model.generative
    assert model.device == "cpu"
    assert model.limits.chunk_steps_max == 16_384
    words = (await wire.models.GetModel(model_pb2.GetModelRequest(name="words"))).model
    assert words.signature.input.element_type == model_pb2.ELEMENT_TYPE_INT32
    assert (words.signature.input.vocabulary_size, words.embedding_size) == (7, 4)
    assert words.generative
    short = (await wire.models.GetModel(model_pb2.GetModelRequest(name="short", version=1))).model
    assert short.limits.chunk_steps_max == 8


async def test_rewinding_says_it_is_not_supported(wire: Wire) -> None:
    session_id = await wire.new_session("tiny")
    request = session_pb2.RewindSessionRequest(session_id=session_id, step=1)
    said = await refused(wire.sessions.RewindSession(request))
    assert said == Refusal("UNIMPLEMENTED", "NOT_SUPPORTED")


async def test_a_carry_that_overflows_quarantines_its_session_alone(
    wire: Wire, server: ServerProcess
) -> None:
    calm, wild = np.zeros((1, 1), np.float32), np.full((8, 1), 1000, np.float32)
    one, other = await wire.new_session("explosive"), await wire.new_session("explosive")
    await wire.step(one, 1, calm)
    await wire.step(other, 1, calm)
    quarantined = Refusal("DATA_LOSS", "SESSION_QUARANTINED")
    assert await refused(wire.step(one, 2, wild)) == quarantined
    described = await wire.get(one)
    assert described.state == session_pb2.SESSION_STATE_QUARANTINED
    assert described.applied_step == 1
    assert await refused(wire.step(one, 2, calm)) == quarantined
    assert await refused(wire.export(one)) == quarantined
    assert (await wire.step(other, 2, calm)).rows == bytes(4)
    assert server.metric("conveyor_sessions", state="quarantined") == 1
    await wire.sessions.ResetSession(session_pb2.ResetSessionRequest(session_id=one))
    assert (await wire.step(one, 1, calm)).rows == bytes(4)
