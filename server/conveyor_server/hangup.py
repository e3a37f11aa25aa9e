"""What SIGHUP means: look for changed models, or stop because the terminal is gone."""

import asyncio
import logging
import os
import signal
from collections.abc import Callable
from typing import Final

RECHECK_SECONDS: Final = 1.0
"""A shell that ends may send the signal just before the terminal goes."""
_log = logging.getLogger(__name__)


class HangUp:
    """Tells a closed terminal from a request to reload, which arrive as the same signal.

    A process without a controlling terminal (a service, a container) reloads. One with a terminal
    reloads too as long as the terminal is there, as with `kill -HUP`, and stops once it is gone.
    A process that was started with the signal ignored, as nohup does, goes on ignoring it.
    """

    def __init__(
        self,
        reload: Callable[[], None],
        stop: Callable[[], None],
        terminal_is_there: Callable[[], bool] | None = None,
    ) -> None:
        """Handles nothing yet.

        Args:
            reload: Looks for changed models.
            stop: Stops the server gracefully.
            terminal_is_there: Whether the process has a controlling terminal.
        """
        self._reload = reload
        self._stop = stop
        self._terminal_is_there = terminal_is_there or has_terminal
        self._had_terminal = self._terminal_is_there()

    def listen(self) -> None:
        """Handles the signal from now on, on the running loop."""
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._on_signal)

    def _on_signal(self) -> None:
        if self._stop_without_terminal():
            return
        self._reload()
        asyncio.get_running_loop().call_later(RECHECK_SECONDS, self._stop_without_terminal)

    def _stop_without_terminal(self) -> bool:
        gone = self._had_terminal and not self._terminal_is_there()
        if gone:
            _log.info("the terminal is gone, the server stops")
            self._stop()
        return gone


def has_terminal() -> bool:
    """Returns whether this process has a controlling terminal that was not hung up."""
    try:
        descriptor = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return False
    os.close(descriptor)
    return True
