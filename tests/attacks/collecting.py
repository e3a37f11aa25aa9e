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
    found = Counter(f"{type(each).__module__}.{type(each).__qualname__}" for each in gc.garbage)
    gc.garbage.clear()
    logging.getLogger(LOGGER).warning("collected", extra={"found": dict(found)})


if __name__ == "__main__":
    gc.disable()
    signal.signal(signal.SIGUSR1, _tell)
    main()
