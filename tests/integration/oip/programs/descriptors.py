"""Prints the protocol as the client's own generated code has it."""

from __future__ import annotations

import base64

from common import emit
from tritonclient.grpc import model_config_pb2, service_pb2

emit(
    [
        base64.b64encode(module.DESCRIPTOR.serialized_pb).decode()
        for module in (model_config_pb2, service_pb2)
    ]
)
