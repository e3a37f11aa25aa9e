"""A server whose garbage collector never runs by itself.

On SIGUSR1 it runs, and what only it could free is written to the log, by type.
"""

import gc
import logging
import signal
from collections import Counter

from conveyor_server.cli import main

LOGGER = "garbage"


def _tell(*_: object) -> None:
    gc.set_debug(gc.DEBUG_SAVEALL)
    gc.collect()
    gc.set_debug(0)
    passed_over = _of_transports(gc.garbage)
    found = Counter(
        f"{type(each).__module__}.{type(each).__qualname__}"
        for each in gc.garbage
        if id(each) not in passed_over
    )
    gc.garbage.clear()
    logging.getLogger(LOGGER).warning("collected", extra={"found": dict(found)})


def _of_transports(garbage: list[object]) -> set[int]:
    """asyncio's transports, each of which holds a method of its own, and what they hold.

    The metrics port leaves one behind each request: some kilobytes, whatever was asked.
    """
    level = [each for each in garbage if type(each).__name__ == "_SelectorSocketTransport"]
    seen: set[int] = set()
    for _ in range(3):  # the transport; its attributes; the socket's and the method's
        seen.update(map(id, level))
        level = gc.get_referents(*level)
    return seen | set(map(id, level))


if __name__ == "__main__":
    gc.disable()
    signal.signal(signal.SIGUSR1, _tell)
    main()
