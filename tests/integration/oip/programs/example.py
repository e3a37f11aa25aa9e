"""The protocol's well-known example: two sequences of int32, by calls and on one stream.

Nothing but the address is Conveyor's. The model it wants puts out its input, plus 1 at the start.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tritonclient.grpc as triton
from common import Stream, arguments, emit, inputs


def by_calls(client: Any, model: str, sequence: int | str, values: list[int]) -> list[Any]:
    outputs = [triton.InferRequestedOutput("OUTPUT")]
    found: list[Any] = []
    for number, value in enumerate(values):
        result = client.infer(
            model,
            inputs(np.full((1, 1), value, dtype=np.int32)),
            outputs=outputs,
            sequence_id=sequence,
            sequence_start=number == 0,
            sequence_end=number == len(values) - 1,
        )
        found.append(result.as_numpy("OUTPUT")[0][0].item())
    return found


def on_a_stream(client: Any, model: str, sequences: list[tuple[Any, list[int]]]) -> list[list[Any]]:
    stream = Stream(client)
    for index, (sequence, values) in enumerate(sequences):
        for number, value in enumerate(values):
            stream.send(
                model,
                np.full((1, 1), value, dtype=np.int32),
                request_id=f"{index}_{number}",
                sequence_id=sequence,
                sequence_start=number == 0,
                sequence_end=number == len(values) - 1,
            )
    answers = stream.take(sum(len(values) for _, values in sequences))
    assert stream.stop() == []
    found: list[list[Any]] = [[] for _ in sequences]
    for answer in answers:
        found[int(answer["id"].partition("_")[0])].append(answer["output"][0][0])
    return found


def main() -> None:
    address, wanted = arguments()
    model = wanted["model"]
    sequences: list[tuple[Any, list[int]]] = [tuple(each) for each in wanted["sequences"]]
    with triton.InferenceServerClient(address) as client:
        calls = [by_calls(client, model, sequence, values) for sequence, values in sequences]
        emit({"calls": calls, "stream": on_a_stream(client, model, sequences)})


main()
