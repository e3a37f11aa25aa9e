"""Long random runs.

The seed of one that fails is printed; `CONVEYOR_SIM_SEED=seed` plays it again.
"""

import os
from collections import Counter

import pytest

from tests.simulation.play import Player

SEEDS = 300
EVENTS = 200
GROUPS = 10


def _play(seed: int) -> Counter[str]:
    player = Player(seed)
    try:
        player.play(EVENTS)
    except BaseException:
        print(f"\nreplay this run with CONVEYOR_SIM_SEED={seed}")
        raise
    return player.simulation.world.ended


@pytest.mark.parametrize("group", range(GROUPS))
def test_random_runs_keep_every_rule(group: int) -> None:
    chosen = os.environ.get("CONVEYOR_SIM_SEED")
    if chosen is not None:
        _play(int(chosen))
        return
    seen: Counter[str] = Counter()
    for seed in range(group, SEEDS, GROUPS):
        seen += _play(seed)
    # A simulation in which nothing happens proves nothing.
    for what in ("applied", "duplicate", "created", "resumed", "closed", "quarantined",
                 "STEP_GAP", "STEP_CONFLICT", "SESSION_SUPERSEDED", "ENGINE_FAILED",
                 "SESSION_EXPIRED", "INBOX_FULL", "MEMORIES_LIMIT", "MEMORY_FAILED", "shared",
                 "traced", "whole", "whole DEADLINE_EXCEEDED", "whole INBOX_FULL",
                 "whole ENGINE_FAILED", "given up"):  # fmt: skip
        assert seen[what], f"{what} never happened"
