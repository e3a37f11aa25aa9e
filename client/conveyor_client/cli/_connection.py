"""How a command reaches the server: the options of all of them, and the client made of these."""

import difflib
import inspect
import os
import ssl
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Concatenate, ParamSpec, get_args

import typer
from typer.models import OptionInfo

from conveyor_client._client import Client
from conveyor_client._errors import ConveyorError, DeadlineExceeded, TransportError
from conveyor_client._policy import Options
from conveyor_client.cli._common import fail, run
from conveyor_client.cli._tls import TlsFiles, explain, read_files

_P = ParamSpec("_P")

Target = Annotated[
    str, typer.Option("--target", envvar="CONVEYOR_TARGET", help="host:port of the server.")
]
Token = Annotated[
    str | None, typer.Option("--token", envvar="CONVEYOR_TOKEN", help="Sent as bearer token.")
]
Timeout = Annotated[
    float,
    typer.Option("--timeout", envvar="CONVEYOR_TIMEOUT", min=0.001, help="Seconds for each call."),
]
UseTls = Annotated[
    bool | None,
    typer.Option(
        "--tls/--no-tls",
        envvar="CONVEYOR_TLS",
        help="Speak TLS, or not; else as soon as one of the next three is given.",
    ),
]
Ca = Annotated[
    Path | None,
    typer.Option(
        "--ca",
        metavar="FILE",
        envvar="CONVEYOR_CA",
        help="PEM of whom to trust, instead of the system's roots.",
    ),
]
Cert = Annotated[
    Path | None,
    typer.Option(
        "--cert",
        metavar="FILE",
        envvar="CONVEYOR_CERT",
        help="PEM chain of a client certificate.",
    ),
]
Key = Annotated[
    Path | None,
    typer.Option("--key", metavar="FILE", envvar="CONVEYOR_KEY", help="PEM of its private key."),
]

_PREFIX = "CONVEYOR_"
_LIKENESS = 0.85
"""Ratio of difflib from which on another spelling can mean nothing else: TARGT, TIMOUT, KEYS."""
DEFAULT_TARGET = "127.0.0.1:50051"
DEFAULT_TIMEOUT_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Connection:
    """How to reach the server."""

    target: str
    token: str | None
    timeout_seconds: float
    files: TlsFiles | None = None

    @property
    def context(self) -> ssl.SSLContext | None:
        """Whom HTTPS is to trust; None means the system's roots."""
        return None if self.files is None else self.files.context

    def client(self, options: Options | None = None) -> Client:
        """Makes a client."""
        options = replace(options or Options(), timeout_seconds=self.timeout_seconds)
        tls = None if self.files is None else self.files.tls
        return Client(self.target, token=self.token, tls=tls, options=options)

    def run(self, act: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Runs a command's coroutine, see `conveyor_client.cli._common.run`."""
        run(act, self._explain)

    def _explain(self, error: ConveyorError) -> str:
        if isinstance(error, TransportError | DeadlineExceeded):
            return explain(self.target, self.files)
        return ""


def _connection(
    target: Target = DEFAULT_TARGET,
    token: Token = None,
    timeout: Timeout = DEFAULT_TIMEOUT_SECONDS,
    tls: UseTls = None,
    ca: Ca = None,
    cert: Cert = None,
    key: Key = None,
) -> Connection:
    if tls is None:
        tls = any(file is not None for file in (ca, cert, key))
    return Connection(target, token, timeout, read_files(ca, cert, key) if tls else None)


def _check_environment(own: Sequence[str]) -> None:
    """Ends the command where a variable looks like one of its own and is not.

    A misspelt CONVEYOR_TLS would send the token in clear. Other variables of this prefix may be the
    settings of a server; they have two underscores between section and key.
    """
    stems = [each.removeprefix(_PREFIX) for each in own]
    for name in sorted(os.environ):
        if name in own or not name.upper().startswith(_PREFIX) or "__" in name:
            continue
        stem = name.upper().removeprefix(_PREFIX)
        close = difflib.get_close_matches(stem, stems, n=1, cutoff=_LIKENESS)
        if close:
            fail(f"{name}: unknown environment variable; did you mean {_PREFIX}{close[0]}?")


def _variables(parameters: Iterable[inspect.Parameter]) -> list[str]:
    """What stands in for options, as their annotations say."""
    said = [each for one in parameters for each in get_args(one.annotation)[1:]]
    found = [each.envvar for each in said if isinstance(each, OptionInfo)]
    return [name for name in found if isinstance(name, str)]


def connecting(command: Callable[Concatenate[Connection, _P], None]) -> Callable[..., None]:
    """Gives a command the options above, made into the `Connection` that is its first parameter.

    Args:
        command: The command.

    Returns:
        A function with the command's other parameters, and the options behind them.
    """
    added = inspect.signature(_connection).parameters

    @wraps(command)
    def call(**given: Any) -> None:
        _check_environment(variables)
        options = {name: given.pop(name) for name in added}
        command(_connection(**options), **given)  # pyright: ignore[reportCallIssue]

    own = list(inspect.signature(command).parameters.values())[1:]
    options = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in added.values()]
    parameters = [*own, *options]
    variables = _variables(parameters)
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {each.name: each.annotation for each in parameters}
    return call
