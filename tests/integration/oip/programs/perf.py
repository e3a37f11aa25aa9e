"""What perf_analyzer does in sequence mode, call for call, as its log of requests shows it.

It asks for the model's metadata and configuration, for the server's metadata, opens its streams,
reads the statistics, keeps a request of each of its sequences in flight for a while, and reads the
statistics again. (Its own binary needs libraries that no package index has.)
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from common import Stream, arguments, emit, inputs

SEQUENCE_STEPS = 5


def shape_of(config: Any, metadata: Any) -> list[int]:
    """The shape of its one input; the batch's dimension is 1, and no other may be unknown."""
    assert config.WhichOneof("scheduling_choice") == "sequence_batching"
    assert not config.model_transaction_policy.decoupled
    known = {tensor.name for tensor in (*metadata.inputs, *metadata.outputs)}
    assert {tensor.name for tensor in (*config.input, *config.output)} <= known
    (tensor,) = metadata.inputs
    shape = list(tensor.shape)
    assert config.max_batch_size > 0
    assert shape[1:] == list(config.input[0].dims)
    assert -1 not in shape[1:], "the user would have to give the shape"
    return [1, *shape[1:]]


class Sequences:
    """Endless sequences, a request of each in flight; a new id for each as perf_analyzer does."""

    def __init__(self, count: int, first_id: int) -> None:
        self._last_id = first_id - 1
        self._running = [(self._new_id(), 0) for _ in range(count)]
        self.requests = 0

    def _new_id(self) -> int:
        self._last_id += 1
        return self._last_id

    def next(self, index: int) -> dict[str, Any]:
        sequence, step = self._running[index]
        ends = step == SEQUENCE_STEPS - 1
        self._running[index] = (self._new_id(), 0) if ends else (sequence, step + 1)
        self.requests += 1
        return {
            "request_id": f"{index << 48 | self.requests}",
            "sequence_id": sequence,
            "sequence_start": step == 0,
            "sequence_end": ends,
            "parameters": None,
        }


def streaming(client: Any, model: str, values: Any, sequences: Sequences, seconds: float) -> None:
    stream = Stream(client)
    for index in range(4):
        stream.send(model, values, **sequences.next(index))
    until = time.monotonic() + seconds
    in_flight = 4
    while in_flight:
        (answer,) = stream.take(1)
        assert "output" in answer, answer
        assert answer["final"]
        in_flight -= 1
        if time.monotonic() < until:
            stream.send(model, values, **sequences.next(int(answer["id"]) >> 48))
            in_flight += 1
    assert stream.stop() == []


def by_calls(client: Any, model: str, values: Any, sequences: Sequences, seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for index in range(4):
            client.infer(model, inputs(values), **sequences.next(index))


def window(client: Any, model: str, run: Any, values: Any, sequences: Sequences) -> dict[str, Any]:
    """One measurement: the statistics before, the load, the statistics after."""
    before = client.get_inference_statistics(model)
    requests = sequences.requests
    run(client, model, values, sequences, 0.3)
    after = client.get_inference_statistics(model)
    (old,), (new,) = before.model_stats, after.model_stats
    assert int(new.version) >= 1
    parts = ("success", "queue", "compute_input", "compute_infer", "compute_output")
    return {
        "requests": sequences.requests - requests,
        "inferences": new.inference_count - old.inference_count,
        "executions": new.execution_count - old.execution_count,
        **{
            part: [
                getattr(getattr(new.inference_stats, part), field)
                - getattr(getattr(old.inference_stats, part), field)
                for field in ("count", "ns")
            ]
            for part in parts
        },
    }


def main() -> None:
    address, wanted = arguments()
    model = wanted["model"]
    with triton.InferenceServerClient(address) as client:
        metadata = client.get_model_metadata(model)
        config = client.get_model_config(model).config
        assert "statistics" in client.get_server_metadata().extensions
        values = np.random.default_rng(1).random(shape_of(config, metadata), dtype=np.float32)
        sequences = Sequences(4, first_id=1)
        emit([window(client, model, run, values, sequences) for run in (streaming, by_calls)])


main()
