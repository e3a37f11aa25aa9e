"""Text, character by character: the server samples and feeds back, the client only prints.

The random numbers depend on the seed and the number of the step alone, so the same seed writes the
same text again, on any server that has the model.

    python examples/text_generation.py [HOST:PORT]
"""

import sys

from conveyor_client import Client

TARGET = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:50051"
PROMPT = "The function returns "
CHARACTERS = 120


def write(client: Client, *, temperature: float, seed: int) -> str:
    """Goes on from the prompt, and prints each character as it comes."""
    letters = client.model("letters").input
    print(f"\ntemperature {temperature}, seed {seed}\n{PROMPT}", end="")
    text = ""
    with client.session("letters") as session:
        prompt = letters.encode(PROMPT)
        for token in session.generate(
            prompt, steps_max=CHARACTERS, temperature=temperature, seed=seed
        ):
            text += letters.decode(token)
            print(letters.decode(token), end="", flush=True)
        print(f"\n  [{session.info().applied_step} steps]")
    return text


with Client(TARGET) as client:
    write(client, temperature=0, seed=0)  # always the most probable character
    first = write(client, temperature=0.7, seed=1)
    again = write(client, temperature=0.7, seed=1)
    other = write(client, temperature=0.7, seed=2)
    print("\nthe same seed wrote the same text:", first == again)
    print("another seed wrote another one:", first != other)
