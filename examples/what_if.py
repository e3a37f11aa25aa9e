"""What if? Forks of one session try several futures, and the past is read only once.

A character model has read the beginning of a sentence. Each way it might go on gets a fork: a copy
of the state, from here on apart. What the model thinks of a continuation is the sum of the
log-probabilities of its characters.

    python examples/what_if.py [HOST:PORT]
"""

import sys

from conveyor_client import Client

TARGET = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:50051"
PAST = "If the file does not exist, an "
FUTURES = ["exception is raised.", "error is returned.", "elephant is painted.", "xq zvvk jjwpt q."]

with Client(TARGET) as client:
    letters = client.model("letters").input
    with client.session("letters") as session:
        first = session.step(letters.encode(PAST), output="last")  # log-probabilities, (V,)
        forks = session.fork(len(FUTURES))
        scores = []
        for fork, future in zip(forks, FUTURES, strict=True):
            with fork:
                tokens = letters.encode(future)
                rows = [first, *fork.step(tokens)]  # each row is about the character after it
                score = sum(float(row[token]) for row, token in zip(rows, tokens, strict=False))
                scores.append((score / len(tokens), future, fork.applied_step))
        print(PAST + "...")
        for score, future, steps in sorted(scores, reverse=True):
            print(f"  {score:6.2f} a character  {future:24} now at step {steps}")
        print(f"the session itself is still at step {session.info().applied_step}")
