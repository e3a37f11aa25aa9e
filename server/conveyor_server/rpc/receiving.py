"""Takes in the one message of a unary request, within bounds of time and of bytes.

Nothing is read of a call before it is let in: until then the transport takes only the beginning of
a message (`server.UNREAD_BYTES_MAX`). Once it is read for, the transport gathers it whole. So a
message that is late counts as the largest that may come; one that came counts as what it is until
its call has ended.
"""

import asyncio
import gc
from typing import Final

from grpc import aio

from conveyor_server.config import LimitsConfig
from conveyor_server.errors import CallsLimit, ConveyorError, DeadlineExceeded, InvalidField
from conveyor_server.rpc.service import Context

LATE_SECONDS: Final = 0.05
"""A message that takes longer is late; those of a usual size come with their call."""
COLLECTED_BYTES: Final = 64 * 2**20
"""After so many bytes of messages the garbage collector looks through what is young.

By itself it counts objects, of which a cycle may hold few and yet much memory.
"""


class Receiver:
    """Reads the messages of unary requests, and counts their bytes.

    Attributes:
        size_bytes: Of the messages that are handled or late.
    """

    def __init__(self, limits: LimitsConfig, message_bytes_max: int) -> None:
        """`message_bytes_max`: the largest message that the transport lets through."""
        self._bytes_max = limits.request_bytes_max
        self._late_bytes = min(message_bytes_max, limits.request_bytes_max)
        self._seconds_max = limits.message_seconds_max
        self._waiting_max = limits.health_calls_max
        self._waiting: dict[Received, None] = {}
        self._uncollected_bytes = 0
        self.size_bytes = 0

    async def read(self, context: Context, *, first_out: bool = False) -> "Received":
        """Reads a call's message; its taker releases it when the call has ended.

        With `first_out` the message is one of those that anybody may make the server wait for. Of
        too many of them the one that has waited longest is given up.

        Raises:
            CallsLimit: The server has as many bytes of requests as it may.
            DeadlineExceeded: No message came in time.
            InvalidField: The client ended the request without a message.
        """
        received = Received(self)
        if first_out:
            if len(self._waiting) >= self._waiting_max:
                next(iter(self._waiting)).give_up(
                    CallsLimit(
                        "too many health calls wait for their message",
                        limit="limits.health_calls_max",
                        maximum=self._waiting_max,
                    )
                )
            self._waiting[received] = None
        try:
            await received.arrive(context)
        except BaseException:
            received.release()
            raise
        finally:
            self._waiting.pop(received, None)
        return received

    def full(self) -> CallsLimit:
        """What a call is told that there is no room for."""
        return CallsLimit(
            f"{self.size_bytes} bytes of requests are being handled",
            limit="limits.request_bytes_max",
            maximum=self._bytes_max,
        )

    def recount(self, before: int, after: int) -> bool:
        """Counts `after` bytes in place of `before`, if they fit. The first message always does."""
        others = self.size_bytes - before
        if others and after > before and others + after > self._bytes_max:
            return False
        self.size_bytes = others + after
        return True

    @property
    def late_bytes(self) -> int:
        """What a message that is late counts as."""
        return self._late_bytes

    @property
    def seconds_max(self) -> float:
        """How long a message may take."""
        return self._seconds_max

    def let_go(self, size: int) -> None:
        """Notes that nobody needs so many bytes any more, and that a circle may still keep them."""
        self._uncollected_bytes += size
        if self._uncollected_bytes >= COLLECTED_BYTES:
            self._uncollected_bytes = 0
            gc.collect(1)


class Received:
    """One message, on its way or there."""

    def __init__(self, receiver: Receiver) -> None:
        """It counts nothing yet."""
        self._receiver = receiver
        self._counted = 0
        self._data = b""
        self._refusal: ConveyorError | None = None
        self._timeout: asyncio.Timeout | None = None

    async def arrive(self, context: Context) -> None:
        """See `Receiver.read`."""
        late = asyncio.get_running_loop().call_later(LATE_SECONDS, self._late)
        try:
            async with asyncio.timeout(self._receiver.seconds_max) as self._timeout:
                data = await context.read()
        except TimeoutError:
            raise self._refusal or DeadlineExceeded(
                f"no message came within {self._receiver.seconds_max:g} s"
                " (limits.message_seconds_max)"
            ) from None
        finally:
            late.cancel()
            self._timeout = None
        if data is aio.EOF:
            raise InvalidField("message", "the request ended without one; send one message")
        if not self._receiver.recount(self._counted, len(data)):
            raise self._receiver.full()
        self._counted, self._data = len(data), data

    def take(self) -> bytes:
        """Returns the message and keeps it no longer; it is counted on."""
        data, self._data = self._data, b""
        return data

    def give_up(self, refusal: ConveyorError) -> None:
        """Ends the wait for the message with an error."""
        if self._timeout is not None and not self._timeout.expired():
            self._refusal = refusal
            self._timeout.reschedule(asyncio.get_running_loop().time())

    def release(self) -> None:
        """Ends the counting."""
        self._receiver.recount(self._counted, 0)
        self._receiver.let_go(self._counted)
        self._counted, self._data = 0, b""

    def _late(self) -> None:
        if self._receiver.recount(0, self._receiver.late_bytes):
            self._counted = self._receiver.late_bytes
        else:
            self.give_up(self._receiver.full())
