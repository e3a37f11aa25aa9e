"""The asynchronous client: concurrent calls, and one stream of two sequences."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import tritonclient.grpc.aio as triton
from common import arguments, emit, inputs, seen


async def by_calls(client: Any, model: str, sequence: Any, rows: Any) -> list[Any]:
    found: list[Any] = []
    for number, row in enumerate(rows):
        result = await client.infer(
            model,
            inputs(row[None, None], triton),
            sequence_id=sequence,
            sequence_start=number == 0,
            sequence_end=number == len(rows) - 1,
        )
        found.append(seen(result)["output"][0][0])
    return found


async def on_a_stream(client: Any, model: str, ids: list[Any], rows: Any) -> list[Any]:
    async def requests() -> AsyncIterator[dict[str, Any]]:
        for number, row in enumerate(rows):
            for sequence in ids:
                yield {
                    "model_name": model,
                    "inputs": inputs(row[None, None], triton),
                    "request_id": f"{sequence}",
                    "sequence_id": sequence,
                    "sequence_start": number == 0,
                    "sequence_end": number == len(rows) - 1,
                }

    return [
        seen(result if error is None else error)
        async for result, error in client.stream_infer(requests())
    ]


async def main() -> None:
    address, wanted = arguments()
    model, rows = wanted["model"], np.array(wanted["rows"], dtype=np.float32)
    async with triton.InferenceServerClient(address) as client:
        calls = await asyncio.gather(*(by_calls(client, model, i, rows) for i in wanted["ids"]))
        emit({"calls": calls, "stream": await on_a_stream(client, model, wanted["ids"], rows)})


asyncio.run(main())
