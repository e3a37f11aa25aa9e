"""Watching gates: where does a character model forget?

A trace tells for every step and layer what the gates did. Here it is a summary, and of it the share
of units whose forget gate is nearly shut, in the lower layer: they drop what they held. The outputs
are the same bits with and without a trace.

    python examples/gates.py [HOST:PORT]
"""

import sys

import numpy as np

from conveyor_client import Client

TARGET = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:50051"
TEXT = "The file is opened. If it does not exist, an error is raised."
BAR = 120  # characters for a share of 1

with Client(TARGET) as client:
    tokens = client.model("letters").input.encode(TEXT)
    with client.session("letters") as session:
        outputs, trace = session.step_with_trace(tokens, mode="summary")
    with client.session("letters") as session:
        untraced = session.step(tokens)

forgetting = trace.layers[0].gates["f"].share_low  # (len(TEXT),), the share of units below 0.1
for character, share in zip(TEXT, forgetting, strict=True):
    print(f"{character!r:5} {share:4.0%} {'█' * round(BAR * share)}")
within = np.array([character.isalpha() for character in TEXT])
print(f"within words {forgetting[within].mean():.1%} of the units forget,")
print(f"between them {forgetting[~within].mean():.1%}")
print("the same bits without a trace:", np.array_equal(outputs, untraced))
