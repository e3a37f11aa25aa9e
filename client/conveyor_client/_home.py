"""Where a client may be used: in the process that made it, and in one event loop.

gRPC keeps threads of its own for as long as any channel is open, and a fork copies none of them: a
call in the child would wait for ever, and so would letting go of a channel there. So a child uses
no client of its parent, keeps what it was left, and makes clients of its own only if its parent had
none open.
"""

import asyncio
import gc
import os
from contextlib import suppress
from weakref import WeakKeyDictionary, WeakSet, ref

from conveyor_client._errors import NotOpen

_FORKED = (
    "this client was made before the process forked, and its connection stays with the parent:"
    " make a new client in the child"
)
_CHILD_OF_OPEN = (
    "this process was forked while a client or another gRPC channel was open, and gRPC cannot be"
    " used in it: close them all before the fork, or start processes with"
    " multiprocessing.get_context('spawn')"
)
_OTHER_LOOP = (
    "this client belongs to the event loop that it was first used in: make one in each event loop"
)


class _Forks:
    """The clients with a connection, for the sake of children of this process."""

    def __init__(self) -> None:
        self._open = WeakSet[object]()
        self._left: list[object] = []
        self._in_loop = WeakKeyDictionary[asyncio.AbstractEventLoop, int]()
        self._closed_some = False
        self._running = False
        self.unusable = False
        if hasattr(os, "register_at_fork"):  # else there is no fork, either
            os.register_at_fork(before=self._before, after_in_child=self._in_child)

    def add(self, client: object, loop: asyncio.AbstractEventLoop) -> None:
        """It opens a channel."""
        self._open.add(client)
        self._in_loop[loop] = self.in_loop(loop) + 1

    def discard(self, client: object, loop: asyncio.AbstractEventLoop) -> None:
        """It closed its channel."""
        self._open.discard(client)
        self._in_loop[loop] = self.in_loop(loop) - 1
        self._closed_some = True

    def in_loop(self, loop: asyncio.AbstractEventLoop) -> int:
        """How many clients have a channel in an event loop."""
        return self._in_loop.get(loop, 0)

    def _before(self) -> None:
        # What a call that failed left in a reference cycle may keep a closed channel.
        if self._closed_some:
            self._closed_some = False
            gc.collect()
        self._running = bool(self._open) or _grpc_runs()

    def _in_child(self) -> None:
        self._left.extend(self._open)
        self.unusable = self.unusable or self._running


def _grpc_runs() -> bool:
    """Whether gRPC has threads, for a channel of somebody else or one not yet ended."""
    names: set[str] = set()
    with suppress(OSError):  # only Linux tells, and a thread may end meanwhile
        for thread in os.listdir("/proc/self/task"):
            with suppress(OSError), open(f"/proc/self/task/{thread}/comm") as file:
                names.add(file.read().strip())
    return any(name.startswith(("grpc_", "event_engine", "lifeguard")) for name in names)


_forks = _Forks()  # as much one for the process as the handlers that it registers


class Home:
    """The process and the event loop of one client.

    Raises:
        NotOpen: No client can be used in this process.
    """

    def __init__(self, client: object) -> None:
        if _forks.unusable:
            raise NotOpen(_CHILD_OF_OPEN)
        self._client = ref(client)
        self._pid = os.getpid()
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def forked(self) -> bool:
        """Whether this is a child of the process that made the client."""
        return self._pid != os.getpid()

    @property
    def lost(self) -> bool:
        """Whether the client's event loop is closed."""
        return self._loop is not None and self._loop.is_closed()

    def require_process(self) -> None:
        """Raises `NotOpen` in a child of the process that made the client."""
        if self.forked:
            raise NotOpen(_FORKED)

    def enter(self) -> None:
        """Makes the running event loop the client's, if it has none yet.

        Raises:
            NotOpen: The client belongs to another process or to another event loop.
        """
        self.require_process()
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
        elif self._loop is not loop:
            raise NotOpen(_OTHER_LOOP)

    def note_open(self) -> None:
        """The client has a channel: a child forked from now on keeps it as it is."""
        if (client := self._client()) is not None and self._loop is not None:
            _forks.add(client, self._loop)

    def note_closed(self) -> None:
        """The client's channel is gone, and of no concern to a child."""
        if (client := self._client()) is not None and self._loop is not None:
            _forks.discard(client, self._loop)

    @property
    def last(self) -> bool:
        """Whether no other client has a channel in this client's event loop."""
        return self._loop is None or _forks.in_loop(self._loop) <= 1
