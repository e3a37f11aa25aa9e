"""What keeps a server from starting, before it looks at its models."""

from __future__ import annotations

from collections.abc import Callable
from tempfile import TemporaryFile
from typing import TYPE_CHECKING

from conveyor.os_errors import os_error_text
from conveyor_server.app import StartError, tracing_class
from conveyor_server.engine.devices import DeviceError, find_device
from conveyor_server.rpc.tls import TlsFilesError, credentials

if TYPE_CHECKING:
    from conveyor_server.config import Config


def start_problems(config: Config) -> list[str]:
    """Makes the checks of `serve` that change nothing, and that a running server does not disturb.

    Addresses are left out: the server that runs may have them.

    Returns:
        What `serve` would say, each on one line; empty if it would go on to its models.
    """
    checks: tuple[Callable[[], object], ...] = (
        lambda: tracing_class(config.tracing),
        lambda: find_device(config.engine.device),
        lambda: _check_ready_file(config),
        lambda: credentials(config.listen),
    )
    problems: list[str] = []
    for check in checks:
        try:
            check()
        except (StartError, DeviceError, TlsFilesError) as error:
            problems.append(str(error))
    return problems


def _check_ready_file(config: Config) -> None:
    file = config.listen.ready_file
    if file is None:
        return
    try:
        # The file itself may be that of a server that runs.
        with TemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        raise StartError(f"listen.ready_file: {os_error_text(error, file)}") from error
