"""Generate: reproducible, resumable, batched with everybody's steps."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pytest

from conveyor.v1 import session_pb2
from tests.integration.process import ServerProcess
from tests.integration.wire import Refusal, Wire, floats, refused, until

Rows = Callable[..., npt.NDArray[Any]]
PROMPT: Final = np.array([0, 3, 5, 1], dtype=np.int32)
ON_WORDS: Final[dict[str, Any]] = {
    "model": "words",
    "prompt": PROMPT.tobytes(),
    "prompt_length": len(PROMPT),
}


def tokens(made: list[session_pb2.GenerateResponse]) -> list[int]:
    """All tokens, after a look at the numbering."""
    found: list[int] = []
    for response in made:
        if response.tokens:
            assert response.step == made[0].step + len(found)
        found += response.tokens
    assert [bool(response.end) for response in made] == [False] * (len(made) - 1) + [True]
    return found


async def test_the_most_probable_token_is_what_stepping_says(wire: Wire) -> None:
    made = tokens(await wire.generate(**ON_WORDS, steps_max=20))
    sequence = list(PROMPT)
    for token in made:
        out = floats(await wire.predict("words", np.array(sequence, np.int32)), 7)
        assert token == out[-1].argmax()
        sequence.append(np.int32(token))


async def test_one_seed_gives_one_text_and_another_another(wire: Wire) -> None:
    sampling = {"temperature": 1.0, "steps_max": 60}
    one, again, other = [
        tokens(await wire.generate(**ON_WORDS, **sampling, seed=seed)) for seed in (7, 7, 8)
    ]
    assert one == again
    assert one != other
    assert set(one) <= set(range(7))


async def test_temperature_and_top_k_narrow_the_choice(wire: Wire) -> None:
    greedy = tokens(await wire.generate(**ON_WORDS, steps_max=40))
    top_1 = tokens(await wire.generate(**ON_WORDS, steps_max=40, temperature=1.0, top_k=1, seed=3))
    assert top_1 == greedy
    cold = tokens(await wire.generate(**ON_WORDS, steps_max=40, temperature=1e-4, seed=3))
    assert cold == greedy


async def test_generation_ends_after_a_stop_token(wire: Wire) -> None:
    free = tokens(await wire.generate(**ON_WORDS, steps_max=60, temperature=1.0, seed=1))
    stop = free[10]
    made = await wire.generate(
        **ON_WORDS, steps_max=60, temperature=1.0, seed=1, stop_tokens=[stop]
    )
    assert tokens(made) == free[: free.index(stop) + 1]
    assert made[-1].end == session_pb2.GENERATE_END_STOP_TOKEN
    assert made[-1].applied_step == 4 + free.index(stop) + 1


async def test_a_session_goes_on_where_generation_ended(wire: Wire) -> None:
    sampling = {"temperature": 0.8, "seed": 5}
    whole = tokens(await wire.generate(**ON_WORDS, steps_max=50, **sampling))
    session_id = await wire.new_session("words")
    prompt = {"prompt": PROMPT.tobytes(), "prompt_length": 4}
    first = await wire.generate(session_id=session_id, steps_max=20, **prompt, **sampling)
    assert first[-1].applied_step == 24
    assert first[-1].end == session_pb2.GENERATE_END_STEPS_MAX
    second = await wire.generate(session_id=session_id, steps_max=29, first_step=25, **sampling)
    assert second[0].step == 24
    assert second[-1].applied_step == 53
    third = await wire.generate(session_id=session_id, steps_max=1, **sampling)
    assert tokens(first) + tokens(second) + tokens(third) == whole
    said = await refused(wire.generate(session_id=session_id, steps_max=1, first_step=53))
    assert said == Refusal("FAILED_PRECONDITION", "STEP_GAP")
    assert (await wire.get(session_id)).applied_step == 54


async def test_generation_goes_on_from_steps(wire: Wire) -> None:
    whole = tokens(await wire.generate(**ON_WORDS, steps_max=10))
    session_id = await wire.new_session("words")
    await wire.step(session_id, 1, PROMPT)
    assert tokens(await wire.generate(session_id=session_id, steps_max=10)) == whole


async def test_features_are_fed_back_as_they_come(wire: Wire, rows: Rows) -> None:
    x = rows(3, 2)
    made = await wire.generate(model="loop", prompt=x.tobytes(), prompt_length=3, steps_max=12)
    generated = np.concatenate([floats(response.rows, 2) for response in made])
    assert len(generated) == 12
    whole = floats(await wire.predict("loop", np.concatenate((x, generated))), 2)
    assert np.array_equal(whole[2:14], generated)


async def test_a_generation_without_its_last_output_held_asks_for_a_prompt(wire: Wire) -> None:
    session_id = await wire.new_session("words")
    await wire.step(session_id, 1, PROMPT, output=session_pb2.OUTPUT_MODE_NONE)
    said = await refused(wire.generate(session_id=session_id, steps_max=3))
    assert said == Refusal("FAILED_PRECONDITION", "STEP_RESULT_NOT_HELD")


async def test_generations_and_steps_are_batched_together(
    wire: Wire, server: ServerProcess, rows: Rows
) -> None:
    x = rows(100, vocabulary=7)

    async def step() -> bytes:
        session_id = await wire.new_session("words")
        async with wire.stream() as stream:
            handle = (await stream.open(session_id=session_id)).handle
            outs = [await stream.steps(handle, t + 1, x[t : t + 1], 7) for t in range(100)]
        return b"".join(outs)

    def ticks() -> float:
        return server.metric("conveyor_tick_sessions_count", model="words")

    alone = tokens(await wire.generate(**ON_WORDS, steps_max=300, temperature=1.0, seed=2))
    before = ticks()
    *texts, stepped, stepped_too = await asyncio.gather(
        *(wire.generate(**ON_WORDS, steps_max=300, temperature=1.0, seed=2) for _ in range(8)),
        step(),
        step(),
    )
    ticked = ticks() - before
    assert all(tokens(text) == alone for text in texts)
    assert stepped == stepped_too == await wire.predict("words", x)
    assert ticked < (8 * 301 + 2 * 100) / 2


async def test_a_caller_that_goes_ends_its_generation(wire: Wire, server: ServerProcess) -> None:
    request = session_pb2.GenerateRequest(**ON_WORDS, steps_max=60_000)
    call = wire.sessions.Generate(request)
    await call.read()
    assert server.metric("conveyor_sessions") >= 1
    call.cancel()

    def gone() -> bool:
        return server.metric("conveyor_inbox_chunks") == 0

    await until(gone)
    steps = server.metric("conveyor_steps_total", model="words")
    await asyncio.sleep(0.1)
    assert server.metric("conveyor_steps_total", model="words") == steps


@pytest.mark.parametrize("read", [0, 3])
async def test_a_reader_that_pauses_gets_everything(wire: Wire, read: int) -> None:
    whole = tokens(await wire.generate(**ON_WORDS, steps_max=2000))
    call = wire.sessions.Generate(session_pb2.GenerateRequest(**ON_WORDS, steps_max=2000))
    made = [await call.read() for _ in range(read)]
    await asyncio.sleep(0.3)
    made += [response async for response in _rest(call)]
    assert tokens(made) == whole


async def _rest(call: Any) -> Any:
    from grpc import aio

    while (response := await call.read()) is not aio.EOF:
        yield response
