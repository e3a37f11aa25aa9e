"""Sound in chunks, as a microphone hands it over: who speaks when?

The sound is made up here, noise and two bursts that hum and swell as vowels do, so that the answer
can be checked. A chunk is 100 ms; the server keeps the state between chunks. The model is made by
`make_voice.py`.

    python examples/microphone.py [HOST:PORT]
"""

import asyncio
import sys
from collections.abc import AsyncIterator

import numpy as np

from conveyor_client import aio

TARGET = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:50051"
RATE_HZ = 16_000
FRAME = RATE_HZ // 100  # samples in 10 ms, one step of the model
FRAMES_PER_CHUNK = 10
SECONDS = 5.0
SPOKEN = [(1.0, 2.2), (3.1, 4.3)]  # seconds
HURRY = 20  # times faster than life


def sound() -> np.ndarray:
    """The samples, between -1 and 1."""
    seconds = np.arange(int(SECONDS * RATE_HZ)) / RATE_HZ
    samples = 0.004 * np.random.default_rng(7).standard_normal(len(seconds))
    hum = sum(np.sin(2 * np.pi * 140 * n * seconds) / n for n in range(1, 9))
    syllables = 0.6 + 0.4 * np.sin(2 * np.pi * 4 * seconds)
    for begin, end in SPOKEN:
        samples += 0.1 * hum * syllables * ((seconds >= begin) & (seconds < end))
    return samples


async def microphone() -> AsyncIterator[np.ndarray]:
    """Chunks of features: the level of each frame in decibels, (FRAMES_PER_CHUNK, 1)."""
    frames = sound().reshape(-1, FRAME)
    levels = 10 * np.log10((frames**2).mean(axis=1) + 1e-9)
    for chunk in levels.reshape(-1, FRAMES_PER_CHUNK):
        await asyncio.sleep(FRAMES_PER_CHUNK / 100 / HURRY)
        yield chunk[:, None]


async def main() -> None:
    """Prints when voice begins and ends, while the sound comes in."""
    heard, frame = False, 0
    strip = ""
    async with aio.Client(TARGET) as client, client.session("voice") as session:
        async for voice in session.stream(microphone()):
            for probability in voice[:, 0]:
                if heard != (probability > 0.5):
                    heard = not heard
                    print(f"{frame / 100:5.2f} s  voice {'begins' if heard else 'ends'}")
                frame += 1
            strip += "█" if voice.mean() > 0.5 else "·"
    print(strip, "a character for each chunk")
    print("spoken:", ", ".join(f"{begin:.2f} to {end:.2f} s" for begin, end in SPOKEN))


asyncio.run(main())
