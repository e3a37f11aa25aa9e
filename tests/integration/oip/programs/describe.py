"""What a client can ask about a server and its models, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tritonclient.grpc as triton
from common import arguments, emit, seen


def refused(call: Callable[[], Any]) -> dict[str, Any]:
    try:
        call()
    except triton.InferenceServerException as error:
        return seen(error)
    return {"status": "OK", "message": ""}


def main() -> None:
    address, wanted = arguments()
    model = wanted["model"]
    with triton.InferenceServerClient(address) as client:
        emit(
            {
                "live": client.is_server_live(),
                "ready": client.is_server_ready(),
                "model_ready": {
                    "newest": client.is_model_ready(model),
                    "1": client.is_model_ready(model, "1"),
                    "7": client.is_model_ready(model, "7"),
                    "unknown": client.is_model_ready("unknown"),
                },
                "server": client.get_server_metadata(as_json=True),
                "metadata": client.get_model_metadata(model, as_json=True),
                "config": client.get_model_config(model, as_json=True)["config"],
                "index": client.get_model_repository_index(as_json=True)["models"],
                "statistics": client.get_inference_statistics(as_json=True)["model_stats"],
                "refused": {
                    "metadata of unknown": refused(lambda: client.get_model_metadata("unknown")),
                    "config of version 7": refused(lambda: client.get_model_config(model, "7")),
                    "config of version x": refused(lambda: client.get_model_config(model, "x")),
                    "statistics of unknown": refused(
                        lambda: client.get_inference_statistics("unknown")
                    ),
                    "system memory": refused(client.get_system_shared_memory_status),
                    "system memory register": refused(
                        lambda: client.register_system_shared_memory("a", "/a", 8)
                    ),
                    "system memory unregister": refused(client.unregister_system_shared_memory),
                    "cuda memory": refused(client.get_cuda_shared_memory_status),
                    "cuda memory register": refused(
                        lambda: client.register_cuda_shared_memory("a", b"YQ==", 0, 8)
                    ),
                    "cuda memory unregister": refused(client.unregister_cuda_shared_memory),
                    "trace": refused(client.get_trace_settings),
                    "log": refused(client.get_log_settings),
                    "load": refused(lambda: client.load_model(model)),
                    "unload": refused(lambda: client.unload_model(model)),
                },
            }
        )


main()
