"""Attention: each session brings a table of its own, and the trace shows where it looks.

Two shops have price lists of different lengths. A session is opened with a list as its memory; a
step asks for an article, the step after it says the price. The model is made by `make_look_up.py`.

    python examples/look_up.py [HOST:PORT]
"""

import sys

import numpy as np

from conveyor_client import Client

TARGET = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:50051"
SHOPS = {
    "corner shop": {"bread": 3.5, "milk": 1.2, "salt": 0.9},
    "market": {"apples": 2.8, "bread": 2.9, "cheese": 8.4, "milk": 1.1, "pears": 3.1, "salt": 0.7},
}
ARTICLES = sorted({article for prices in SHOPS.values() for article in prices})
KEYS = {article: number / len(ARTICLES) for number, article in enumerate(ARTICLES)}


def ask(client: Client, shop: str, wanted: list[str]) -> None:
    """Prints what the shop asks for each article, and how the rows of its list were weighed."""
    prices = SHOPS[shop]
    memory = [[KEYS[article], price] for article, price in prices.items()]  # (M, 2)
    with client.session("look-up", memory=memory) as session:
        questions = np.array([[KEYS[article]] for article in [*wanted, wanted[-1]]])
        said, trace = session.step_with_trace(questions, mode="full")
    print(f"\n{shop}, {len(memory)} rows: {', '.join(prices)}")
    # What is asked in one step is answered in the next.
    for article, (price,), weights in zip(wanted, said[1:], trace.attention[1:], strict=True):
        looks = " ".join("█" if weight > 0.5 else "·" for weight in weights)
        right = "right" if abs(price - prices[article]) < 0.01 else "WRONG"
        print(f"  {article:7} {price:5.2f}  looks at  {looks}  {right}")


with Client(TARGET) as client:
    ask(client, "corner shop", ["milk", "bread", "salt"])
    ask(client, "market", ["milk", "bread", "pears", "apples"])
