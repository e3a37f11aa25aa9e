"""Makes the calls it is told to, one after the other, and tells what became of each."""

from __future__ import annotations

from typing import Any

import numpy as np
import tritonclient.grpc as triton
from common import arguments, emit, inputs, seen


def call(client: Any, values: Any, dtype: str, model: str, **options: Any) -> dict[str, Any]:
    try:
        return seen(client.infer(model, inputs(np.array(values, dtype=dtype)), **options))
    except triton.InferenceServerException as error:
        return seen(error)


def main() -> None:
    address, wanted = arguments()
    headers = wanted.get("headers")
    with triton.InferenceServerClient(address) as client:
        emit([call(client, headers=headers, **each) for each in wanted["calls"]])


main()
