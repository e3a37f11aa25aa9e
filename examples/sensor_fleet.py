"""A fleet of sensors on one stream: a session each, all over one connection.

Each sensor has a climate of its own (made up: a mean, a swing, an hour of its highest). Every hour
all of them report; what they submit in one turn of the event loop leaves in one message, and the
server runs them as one batch.

    python examples/sensor_fleet.py [HOST:PORT]
"""

import asyncio
import sys
import time

import numpy as np

from conveyor_client import aio

TARGET = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:50051"
SENSORS = 100
HOURS = 72
HORIZONS = (1, 6, 24)  # hours ahead, what the model `temperature` forecasts
SCORED_FROM = 48  # by then each session has seen two whole days


def climate(hours: np.ndarray) -> np.ndarray:
    """Degrees Fahrenheit of every sensor at these hours, (len(hours), SENSORS)."""
    random = np.random.default_rng(1)
    mean = random.uniform(44, 60, SENSORS)
    swing = random.uniform(3, 8, SENSORS)
    warmest = random.uniform(13, 16, SENSORS)
    return mean + swing * np.cos(2 * np.pi * (hours[:, None] - warmest) / 24)


def features(degrees: np.ndarray, hour: int) -> np.ndarray:
    """What the model reads, for every sensor: (SENSORS, 5)."""
    turn = 2 * np.pi * hour / 24
    clock = [np.sin(turn), np.cos(turn), np.sin(2 * turn), np.cos(2 * turn)]
    return np.column_stack([degrees, np.tile(clock, (len(degrees), 1))])


async def main() -> None:
    """Prints some forecasts, and how far all of them were off."""
    truth = climate(np.arange(HOURS + max(HORIZONS)))
    misses: list[np.ndarray] = []
    async with aio.Client(TARGET) as client:
        fleet = [client.session("temperature") for _ in range(SENSORS)]
        await asyncio.gather(*(session.open() for session in fleet))
        began = time.perf_counter()
        for hour in range(HOURS):
            rows = features(truth[hour], hour)
            steps = (session.step(row) for session, row in zip(fleet, rows, strict=True))
            forecasts = np.stack(await asyncio.gather(*steps))  # (SENSORS, 3)
            if hour >= SCORED_FROM:
                misses.append(forecasts - truth[[hour + ahead for ahead in HORIZONS]].T)
        seconds = time.perf_counter() - began
        await asyncio.gather(*(session.close() for session in fleet))
    print("sensor   now   " + "   ".join(f"+{ahead} h (was)  " for ahead in HORIZONS))
    for sensor in range(5):
        pairs = zip(forecasts[sensor], HORIZONS, strict=True)
        cells = (f"{said:6.1f} ({truth[hour + ahead, sensor]:4.1f})" for said, ahead in pairs)
        print(f"{sensor:6d}  {truth[hour, sensor]:4.1f}  " + "    ".join(cells))
    error = np.abs(misses).mean(axis=(0, 1))
    print("mean error, °F:", ", ".join(f"{e:.2f}" for e in error))
    print(f"{SENSORS} sensors, {SENSORS * HOURS} steps in {seconds:.2f} s over one connection")


asyncio.run(main())
