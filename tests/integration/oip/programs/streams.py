"""Sends the requests it is told to on one stream, without waiting, and tells the answers."""

from __future__ import annotations

import numpy as np
import tritonclient.grpc as triton
from common import Stream, arguments, emit


def main() -> None:
    address, wanted = arguments()
    with triton.InferenceServerClient(address) as client:
        stream = Stream(client, headers=wanted.get("headers"))
        for request in wanted["requests"]:
            values = np.array(request.pop("values"), dtype=np.float32)
            stream.send(request.pop("model"), values, **request)
        # To stop is to half-close: what was sent is answered all the same.
        emit(stream.stop())


main()
