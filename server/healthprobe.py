"""Asks a server for its health and exits 0 where it serves: the container's health check.

The one argument is the address. Where it is left out, it is the port that the server is told to
listen on by its environment, on loopback. A server that speaks TLS needs another check.
"""

import os
import sys
from typing import Any, cast

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

PORT_DEFAULT = "50051"
ANSWER_SECONDS_MAX = 3.0


def address_of_server() -> str:
    """Where the server in the same container listens."""
    port = os.environ.get("CONVEYOR_LISTEN__ADDRESS", "").rpartition(":")[2]
    return f"127.0.0.1:{port or PORT_DEFAULT}"


def serving(address: str) -> bool:
    """Returns whether the server at `address` says SERVING within the deadline."""
    with grpc.insecure_channel(address) as channel:
        stub = cast(Any, health_pb2_grpc.HealthStub(channel))  # its types lack the methods
        request = health_pb2.HealthCheckRequest(service="")
        try:
            answer: health_pb2.HealthCheckResponse = stub.Check(request, timeout=ANSWER_SECONDS_MAX)
        except grpc.RpcError:
            return False
    return answer.status == health_pb2.HealthCheckResponse.SERVING


if __name__ == "__main__":
    sys.exit(0 if serving(sys.argv[1] if len(sys.argv) > 1 else address_of_server()) else 1)
