"""The blocking twin: the asynchronous client on one background event loop.

Names, parameters and errors are those of `conveyor_client.aio`; what awaits there waits here, what
is an asynchronous iterator there is a plain one here. Objects may be used from several threads.
"""

from collections import deque
from collections.abc import Callable, Coroutine, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from functools import wraps
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import numpy.typing as npt

from conveyor_client import _client, _generation, _session
from conveyor_client._calls import Metadata, Tls
from conveyor_client._generation import GenerationEnd
from conveyor_client._nouns import FloatArray, ModelInfo, Output, Rows, TraceMode
from conveyor_client._policy import Options
from conveyor_client._portal import Portal, Reading, Twin, blocking, iterating
from conveyor_client._trace import Trace

_P = ParamSpec("_P")
_R = TypeVar("_R")


class Generation(Twin, Iterator[int | FloatArray]):
    """An iterator of what is generated: tokens, or output rows of shape (O,)."""

    _inner: _generation.Generation

    @property
    def end(self) -> GenerationEnd | None:
        """Why it ended: "steps_max" or "stop_token"; None while it goes on."""
        return self._inner.end

    @property
    def applied_step(self) -> int:
        """The session's applied step once it ended; 0 before."""
        return self._inner.applied_step

    @property
    def step(self) -> int:
        """The number of the step whose output the latest item was made from."""
        return self._inner.step

    def __next__(self) -> int | FloatArray:
        item = self._portal.call(_next_or_none(self._inner))
        if item is None:
            raise StopIteration
        return item

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self._portal.forked:
            self.close()

    def close(self) -> None:
        """Ends the call if it still runs."""
        self._portal.call(self._inner.aclose())


async def _next_or_none(generation: _generation.Generation) -> int | FloatArray | None:
    async for item in generation:
        return item
    return None


class Session(Twin):
    """One sequence's state on one model, stepped over a shared stream.

    The blocking twin of `conveyor_client.aio.Session`, which says more; open it with ``with``.
    """

    _inner: _session.Session

    session_id = Reading[str](_session.Session.session_id)
    model = Reading[ModelInfo](_session.Session.model)
    epoch = Reading[int](_session.Session.epoch)
    token = Reading[str](_session.Session.token)
    resumed = Reading[bool](_session.Session.resumed)
    applied_step = Reading[int](_session.Session.applied_step)
    durable_step = Reading[int](_session.Session.durable_step)

    open = blocking(_session.Session.open)
    close = blocking(_session.Session.close)
    detach = blocking(_session.Session.detach)
    step = blocking(_session.Session.step)
    step_with_trace = blocking(_session.Session.step_with_trace)
    reset = blocking(_session.Session.reset)
    rewind = blocking(_session.Session.rewind)
    export = blocking(_session.Session.export)
    info = blocking(_session.Session.info)

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self._portal.forked:  # the session is the parent's
            self._portal.call(self._inner.__aexit__(kind, error, traceback))

    def stream(
        self,
        inputs: Iterable[Rows],
        *,
        in_flight: int = 32,
        output: Output | None = None,
        timeout_seconds: float | None = None,
    ) -> Generator[FloatArray]:
        """Runs steps or chunks one after the other, several in flight.

        The inputs are read in the caller's thread, so an output is yielded when it is there and the
        next input has been read, or when `in_flight` inputs are ahead of it.

        Args:
            inputs: Steps or chunks, each as `step` takes it.
            in_flight: At most so many are sent ahead of the output that was yielded last.
            output: Which rows come back; overrides the session's choice.
            timeout_seconds: For each of them.

        Yields:
            One output for each input, in order.

        Raises:
            ConveyorError: As `step`; inputs after the failed one are not run.
        """

        def start(item: Rows) -> Coroutine[Any, Any, FloatArray]:
            return self._inner.step(item, output=output, timeout_seconds=timeout_seconds)

        yield from self._in_order(inputs, in_flight, start)

    def stream_with_trace(
        self,
        inputs: Iterable[Rows],
        *,
        mode: TraceMode = "summary",
        in_flight: int = 32,
        timeout_seconds: float | None = None,
    ) -> Generator[tuple[FloatArray, Trace]]:
        """Runs steps or chunks, several in flight, and tells what the gates did.

        As `stream`, with what `step_with_trace` returns for each input.

        Args:
            inputs: Steps or chunks, each as `step` takes it.
            mode: "summary" for statistics of each gate, "full" for every activation.
            in_flight: At most so many are sent ahead of the output that was yielded last.
            timeout_seconds: For each of them.

        Yields:
            The output rows and the trace of each input, in order.

        Raises:
            NotSupported: The server does not trace.
            ConveyorError: As `step`; inputs after the failed one are not run.
        """

        def start(item: Rows) -> Coroutine[Any, Any, tuple[FloatArray, Trace]]:
            return self._inner.step_with_trace(item, mode=mode, timeout_seconds=timeout_seconds)

        yield from self._in_order(inputs, in_flight, start)

    def _in_order(
        self,
        inputs: Iterable[Rows],
        in_flight: int,
        start: Callable[[Rows], Coroutine[Any, Any, _R]],
    ) -> Generator[_R]:
        sent: deque[Future[_R]] = deque()
        try:
            for item in self._inner.items(inputs):
                # Here, as the item after it may be under way before a coroutine could refuse it.
                self._inner.check(item)
                while sent and (len(sent) >= in_flight or sent[0].done()):
                    yield sent.popleft().result()
                sent.append(self._portal.submit(start(item)))
            while sent:
                yield sent.popleft().result()
        finally:
            for future in sent:
                future.cancel()

    def generate(
        self,
        prompt: Rows | None = None,
        *,
        steps_max: int,
        temperature: float = 1.0,
        top_k: int = 0,
        stop_tokens: Sequence[int] = (),
        seed: int = 0,
        timeout_seconds: float | None = None,
    ) -> Generation:
        """Lets the model go on by itself, see `conveyor_client.aio.Session.generate`."""
        inner = self._inner.generate(
            prompt,
            steps_max=steps_max,
            temperature=temperature,
            top_k=top_k,
            stop_tokens=stop_tokens,
            seed=seed,
            timeout_seconds=timeout_seconds,
        )
        return Generation(self._portal, inner)

    def fork(
        self, copies: int | Sequence[str] = 1, *, timeout_seconds: float | None = None
    ) -> "list[Session]":
        """Copies the session, see `conveyor_client.aio.Session.fork`."""
        forks = self._portal.call(self._inner.fork(copies, timeout_seconds=timeout_seconds))
        return [Session(self._portal, fork) for fork in forks]


def _making_session(
    method: Callable[Concatenate[Any, _P], _session.Session],
) -> Callable[Concatenate[Any, _P], Session]:
    """Makes a method that describes a session on the loop and returns its twin."""

    @wraps(method)
    def call(self: "Client", *args: _P.args, **kwargs: _P.kwargs) -> Session:
        portal = self._portal  # pyright: ignore[reportPrivateUsage]
        return Session(portal, portal.run(lambda: method(self.inner, *args, **kwargs)))

    return call


class Client(Twin):
    """A connection to a Conveyor server, or to a proxy before several.

    The blocking twin of `conveyor_client.aio.Client`; open it with ``with`` or end it with `close`.

    Args:
        target: Where the server is, as gRPC names it: "host:port", "unix:path", "dns:///name:port".
        token: Sent as "authorization: Bearer ..." with every call.
        tls: How to speak TLS; None speaks plain HTTP/2.
        metadata: Sent with every call.
        options: Times and bounds.
    """

    _inner: _client.Client

    session = _making_session(_client.Client.session)
    resume = _making_session(_client.Client.resume)

    open_session = blocking(_client.Client.open_session)
    step = blocking(_client.Client.step)
    get_session = blocking(_client.Client.get_session)
    sessions = iterating(_client.Client.sessions)
    close_session = blocking(_client.Client.close_session)
    reset_session = blocking(_client.Client.reset_session)
    fork_session = blocking(_client.Client.fork_session)
    rewind_session = blocking(_client.Client.rewind_session)
    export_session = blocking(_client.Client.export_session)
    predict = blocking(_client.Client.predict)
    models = iterating(_client.Client.models)
    model = blocking(_client.Client.model)
    healthy = blocking(_client.Client.healthy)
    wait_healthy = blocking(_client.Client.wait_healthy)

    def __init__(
        self,
        target: str,
        *,
        token: str | None = None,
        tls: Tls | None = None,
        metadata: Metadata = (),
        options: Options | None = None,
    ) -> None:
        portal = Portal()
        try:
            inner = portal.run(
                lambda: _client.Client(
                    target, token=token, tls=tls, metadata=metadata, options=options
                )
            )
        except BaseException:
            portal.close()
            raise
        super().__init__(portal, inner)
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes every stream and the channel; sessions still open live on within their lease.

        In a forked child nothing happens: the connection is the parent's.
        """
        if self._closed or self._portal.forked:
            return
        self._closed = True
        try:
            self._portal.call(self._inner.aclose())
        finally:
            self._portal.close()

    def import_session(
        self,
        snapshot: bytes,
        *,
        session_id: str = "",
        idle_seconds: float | None = None,
        output: Output = "all",
        timeout_seconds: float | None = None,
    ) -> Session:
        """Makes a session from a snapshot, see `conveyor_client.aio.Client.import_session`."""
        inner = self._portal.call(
            self._inner.import_session(
                snapshot,
                session_id=session_id,
                idle_seconds=idle_seconds,
                output=output,
                timeout_seconds=timeout_seconds,
            )
        )
        return Session(self._portal, inner)

    def generate(
        self,
        model: str,
        prompt: Rows,
        *,
        steps_max: int,
        version: int = 0,
        temperature: float = 1.0,
        top_k: int = 0,
        stop_tokens: Sequence[int] = (),
        seed: int = 0,
        memory: npt.ArrayLike | None = None,
        timeout_seconds: float | None = None,
    ) -> Generation:
        """Lets a model go on from a prompt, see `conveyor_client.aio.Client.generate`."""
        inner = self._portal.call(
            self._inner.generate(
                model,
                prompt,
                steps_max=steps_max,
                version=version,
                temperature=temperature,
                top_k=top_k,
                stop_tokens=stop_tokens,
                seed=seed,
                memory=memory,
                timeout_seconds=timeout_seconds,
            )
        )
        return Generation(self._portal, inner)
