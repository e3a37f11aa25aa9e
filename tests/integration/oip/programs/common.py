"""What the client programs share. They import nothing of ours: each is a program of a Triton user.

Each is run as ``python NAME.py ADDRESS ARGUMENTS`` with the arguments as JSON, and prints what it
saw as JSON.
"""

from __future__ import annotations

import json
import queue
import sys
from typing import Any

import numpy as np
import tritonclient.grpc as triton

WAIT_SECONDS_MAX = 30
DATATYPES = {"float32": "FP32", "int32": "INT32", "int64": "INT64", "object": "BYTES"}


def arguments() -> tuple[str, dict[str, Any]]:
    """Address and arguments."""
    return sys.argv[1], json.loads(sys.argv[2])


def emit(seen: Any) -> None:
    """Prints what the program saw."""
    json.dump(seen, sys.stdout)


def inputs(values: Any, module: Any = triton) -> list[Any]:
    """One input tensor of these values."""
    array = np.asarray(values)
    tensor = module.InferInput("INPUT", list(array.shape), DATATYPES[str(array.dtype)])
    tensor.set_data_from_numpy(array)
    return [tensor]


def seen(result: Any) -> dict[str, Any]:
    """An answer, or an error, as JSON."""
    if isinstance(result, Exception):
        return {"status": result.status(), "message": result.message()}
    answer = result.get_response()
    return {
        "id": answer.id,
        "model": answer.model_name,
        "version": answer.model_version,
        "final": answer.parameters["triton_final_response"].bool_param,
        "output": result.as_numpy("OUTPUT").tolist(),
    }


class Stream:
    """A client's one stream, its answers in a queue as they come."""

    def __init__(self, client: triton.InferenceServerClient, **options: Any) -> None:
        self._answers: queue.Queue[Any] = queue.Queue()
        self._client = client
        client.start_stream(callback=self._take, **options)

    def _take(self, result: Any, error: Any) -> None:
        self._answers.put(result if error is None else error)

    def send(self, model: str, values: Any, **options: Any) -> None:
        self._client.async_stream_infer(model, inputs(values), **options)

    def take(self, count: int) -> list[dict[str, Any]]:
        return [seen(self._answers.get(timeout=WAIT_SECONDS_MAX)) for _ in range(count)]

    def stop(self, **options: Any) -> list[dict[str, Any]]:
        """Ends the stream; returns what was not taken yet."""
        self._client.stop_stream(**options)
        return [seen(self._answers.get()) for _ in range(self._answers.qsize())]
