"""``conveyor generate``: a model goes on by itself, and what it makes appears as it comes."""

import sys
from contextlib import AsyncExitStack
from typing import Annotated

import numpy as np
import numpy.typing as npt
import typer

from conveyor_client._client import Client
from conveyor_client._errors import TokenOutOfRange
from conveyor_client._generation import Generation
from conveyor_client._nouns import Int32Array, ModelInfo
from conveyor_client.cli._common import (
    fail,
)
from conveyor_client.cli._connection import Connection, connecting
from conveyor_client.cli._memory import MemoryFile, memory_from


@connecting
def generate(
    connection: Connection,
    model: Annotated[str, typer.Argument(help="A model of tokens.")] = "letters",
    *,
    prompt: Annotated[str, typer.Option(help="Text to go on from.")] = "",
    steps: Annotated[int, typer.Option(min=1, help="Tokens at most.")] = 400,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Among so many likeliest; 0: all.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same text.")] = 0,
    stop: Annotated[str, typer.Option(help="End after any of these characters.")] = "",
    session: Annotated[
        str, typer.Option(help="Go on from this session, and leave it moved on.")
    ] = "",
    memory: MemoryFile = None,
) -> None:
    """Generates text, letter by letter."""

    async def act() -> None:
        async with AsyncExitStack() as stack:
            client = await stack.enter_async_context(connection.client())
            described = await client.model(model)
            if not described.input.is_tokens:
                fail(f"{model} takes features, not tokens; it cannot generate text")
            if not described.input.labels:
                fail(f"the tokens of {model} have no labels, so it takes no text")
            options = {"steps_max": steps, "top_k": top_k, "seed": seed}
            rows = memory_from(memory)
            stop_tokens = [int(n) for n in described.input.encode(stop)]
            first = _prompt(described, prompt, required=not session)
            generation = await _start(
                client,
                stack,
                described,
                session,
                first,
                temperature=temperature,
                stop_tokens=stop_tokens,
                memory=rows,
                **options,
            )
            sys.stdout.write(prompt)
            async for made in generation:
                sys.stdout.write(described.input.decode(made))
                sys.stdout.flush()
            sys.stdout.write("\n")

    connection.run(act)


async def _start(
    client: Client,
    stack: AsyncExitStack,
    model: ModelInfo,
    session_id: str,
    prompt: Int32Array | None,
    *,
    steps_max: int,
    temperature: float,
    top_k: int,
    stop_tokens: list[int],
    seed: int,
    memory: npt.NDArray[np.generic] | None,
) -> Generation:
    if not session_id:
        assert prompt is not None, "a prompt is required without a session"
        return await client.generate(
            model.name,
            prompt,
            steps_max=steps_max,
            temperature=temperature,
            top_k=top_k,
            stop_tokens=stop_tokens,
            seed=seed,
            memory=memory,
        )
    session = client.session(model.name, session_id=session_id, memory=memory)
    await session.open()
    stack.push_async_callback(session.detach)
    generation = session.generate(
        prompt,
        steps_max=steps_max,
        temperature=temperature,
        top_k=top_k,
        stop_tokens=stop_tokens,
        seed=seed,
    )
    return await stack.enter_async_context(generation)


def _prompt(model: ModelInfo, text: str, *, required: bool) -> Int32Array | None:
    """The prompt's tokens; without one, a line's end, as text begins after one."""
    if text:
        return model.input.encode(text)
    if not required:
        return None
    try:
        return model.input.encode("\n")
    except TokenOutOfRange:
        return np.zeros(1, dtype=np.int32)
