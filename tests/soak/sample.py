"""What a server holds at one moment, by its metrics and by /proc."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.integration.process import ServerProcess

QUIET_SECONDS_MAX: Final = 90.0
"""For sessions to expire and connections to be seen closed."""
GROWTH_BYTES_MAX: Final = 64 * 2**20
"""Of the process's memory, whose allocator keeps some for later."""
RESIDENT: Final = "resident bytes"
THREADS_MORE_MAX: Final = 8
"""gRPC and asyncio begin the threads of their pools when they first need them."""
DESCRIPTORS_MORE_MAX: Final = 2
"""The connection that asks for the metrics is one, and the one before may just be closing."""
_ALLOWED: Final = {
    RESIDENT: GROWTH_BYTES_MAX,
    "threads": THREADS_MORE_MAX,
    "descriptors": DESCRIPTORS_MORE_MAX,
}
_GAUGES: Final = (
    "conveyor_sessions",
    "conveyor_streams",
    "conveyor_inbox_chunks",
    "conveyor_held_result_bytes",
    "conveyor_state_bytes",
    "conveyor_memories_bytes",
    "conveyor_predictions",
)


@dataclass(frozen=True)
class Sample:
    """Name -> value."""

    values: dict[str, float]

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:,.0f}" for name, value in self.values.items())

    def most(self, other: Sample) -> Sample:
        """The larger of each."""
        return Sample({name: max(value, other.values[name]) for name, value in self.values.items()})


def sample(server: ServerProcess) -> Sample:
    """Now."""
    process = Path(f"/proc/{server.pid}")
    totals = dict.fromkeys((*_GAUGES, "slots used"), 0.0)
    for line in server.scrape().splitlines():
        series, _, value = line.rpartition(" ")
        name, _, labels = series.partition("{")
        if name == "conveyor_slots" and 'state="used"' in labels:
            name = "slots used"
        if name in totals:
            totals[name] += float(value)
    pages = int((process / "statm").read_text().split()[1])
    return Sample(
        {
            RESIDENT: pages * os.sysconf("SC_PAGE_SIZE"),
            "descriptors": len(list((process / "fd").iterdir())),
            "threads": len(list((process / "task").iterdir())),
            **{name.removeprefix("conveyor_").replace("_", " "): n for name, n in totals.items()},
        }
    )


async def quiet_sample(server: ServerProcess) -> Sample:
    """Once no session is left, or the time is over.

    Descriptors and threads follow a little later, so it waits for them to stay as they are.
    """
    deadline = time.monotonic() + QUIET_SECONDS_MAX
    before = sample(server)
    while time.monotonic() < deadline:
        await asyncio.sleep(2)
        now = sample(server)
        still = all(now.values[name] == before.values[name] for name in ("descriptors", "threads"))
        if still and not now.values["sessions"] and not now.values["streams"]:
            return now
        before = now
    return before


def differences(before: Sample, after: Sample) -> list[str]:
    """What is more than it was."""
    lost: list[str] = []
    for name, value in before.values.items():
        allowed = _ALLOWED.get(name, 0)
        if after.values[name] > value + allowed:
            lost.append(name)
    return lost
