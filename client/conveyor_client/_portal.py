"""From threads to one background event loop, and the wrappers that carry methods across."""

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from concurrent.futures import Future
from functools import wraps
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, overload

from conveyor_client._errors import NotOpen
from conveyor_client._home import Home

_P = ParamSpec("_P")
_R = TypeVar("_R")

_JOIN_SECONDS_MAX = 10.0


class Portal:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self._home = Home(self)
        self._loop = asyncio.new_event_loop()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="conveyor-client", daemon=True)
        self._thread.start()

    @property
    def forked(self) -> bool:
        """Whether this is a child of the process whose thread it is."""
        return self._home.forked

    def submit(self, coroutine: Coroutine[Any, Any, _R]) -> "Future[_R]":
        """Starts a coroutine on the loop.

        Args:
            coroutine: What to run.

        Returns:
            Its result to be; cancelling it cancels the coroutine.

        Raises:
            NotOpen: The portal is closed, or its thread is in the parent of this process.
        """
        assert threading.current_thread() is not self._thread, "this would wait for itself"
        try:
            self._home.require_process()
            if self._closed:
                raise NotOpen("the client is closed")
        except NotOpen:
            coroutine.close()
            raise
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def call(self, coroutine: Coroutine[Any, Any, _R]) -> _R:
        """Runs a coroutine on the loop and waits for it; an interrupt cancels it.

        Args:
            coroutine: What to run.

        Returns:
            What it returned.

        Raises:
            NotOpen: The portal is closed.
        """
        future = self.submit(coroutine)
        try:
            return future.result()
        finally:
            future.cancel()  # of no effect unless waiting was interrupted
            del future  # it has the error, the error this frame

    def run(self, action: Callable[[], _R]) -> _R:
        """Runs a plain function on the loop and waits for it.

        Args:
            action: What to run.

        Returns:
            What it returned.
        """

        async def act() -> _R:
            return action()

        return self.call(act())

    def close(self) -> None:
        """Stops the loop and its thread; does nothing the second time, or in a forked child."""
        if self._closed or self.forked:
            return
        self._closed = True
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_JOIN_SECONDS_MAX)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
            left = asyncio.all_tasks(self._loop)
            for task in left:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        finally:
            self._loop.close()


class Twin:
    """An object that stands for one on the background loop."""

    def __init__(self, portal: Portal, inner: Any) -> None:
        self._portal = portal
        self._inner = inner

    def across(self, coroutine: Coroutine[Any, Any, _R]) -> _R:
        """Runs a coroutine of the inner object and waits for it."""
        return self._portal.call(coroutine)

    @property
    def inner(self) -> Any:
        """The object on the loop."""
        return self._inner


def blocking(
    method: Callable[Concatenate[Any, _P], Coroutine[Any, Any, _R]],
) -> Callable[Concatenate[Any, _P], _R]:
    """Makes a method that runs the coroutine method of the inner object and waits for it.

    Args:
        method: A coroutine function of the inner object's class.

    Returns:
        The method, with the same parameters and documentation.
    """

    @wraps(method)
    def call(self: Twin, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        return self.across(method(self.inner, *args, **kwargs))

    return call


def iterating(
    method: Callable[Concatenate[Any, _P], AsyncGenerator[_R]],
) -> Callable[Concatenate[Any, _P], Generator[_R]]:
    """Makes a generator method out of an asynchronous one of the inner object.

    Args:
        method: An asynchronous generator function of the inner object's class.

    Returns:
        The method, with the same parameters and documentation.
    """

    @wraps(method)
    def call(self: Twin, *args: _P.args, **kwargs: _P.kwargs) -> Generator[_R]:
        items = method(self.inner, *args, **kwargs)
        try:
            while True:
                item = self.across(_next(items))
                if not item:
                    return
                yield item[0]
        finally:
            self.across(items.aclose())

    return call


async def _next(items: AsyncGenerator[_R]) -> tuple[_R] | None:
    async for item in items:
        return (item,)
    return None


class Reading(Generic[_R]):
    """A property read from the inner object."""

    def __init__(self, inner: property) -> None:
        self.__doc__ = inner.__doc__
        self._inner = inner

    @overload
    def __get__(self, instance: None, owner: type) -> "Reading[_R]": ...
    @overload
    def __get__(self, instance: Twin, owner: type) -> _R: ...
    def __get__(self, instance: Twin | None, owner: type) -> "Reading[_R] | _R":
        if instance is None:
            return self
        return self._inner.__get__(instance.inner)
