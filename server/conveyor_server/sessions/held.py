"""Results held for retries: a step that comes again is answered from here and never runs twice."""

from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import Final

from conveyor_server.core import OutputMode, SessionKey
from conveyor_server.errors import StepConflict, StepResultNotHeld

ENTRY_BYTES: Final = 176
"""What an entry takes beside its rows, which are often smaller.

In 64-bit CPython 3.11: the entry 72, its two byte strings 33 each, a number 28, its place 8.
"""


@dataclass(frozen=True, slots=True)
class _Held:
    """Consecutive steps that ran together."""

    first_step: int
    length: int
    inputs: bytes
    outputs: bytes
    """The output rows that were computed: of the last `outputs_length` steps."""
    outputs_length: int

    @property
    def last_step(self) -> int:
        return self.first_step + self.length - 1

    @property
    def size_bytes(self) -> int:
        return ENTRY_BYTES + len(self.inputs) + len(self.outputs)

    def newest(self, steps: int) -> "_Held":
        """The last so many steps of it alone."""
        assert 0 < steps <= self.length
        input_bytes = steps * (len(self.inputs) // self.length)
        outputs_length = min(steps, self.outputs_length)
        row_bytes = len(self.outputs) // self.outputs_length if self.outputs_length else 0
        return _Held(
            self.last_step - steps + 1,
            steps,
            self.inputs[-input_bytes:],
            self.outputs[len(self.outputs) - outputs_length * row_bytes :],
            outputs_length,
        )


class HeldResults:
    """The newest steps of one session: inputs, to tell a retry from a conflict, and results.

    Kept without gaps up to the applied step and bounded in steps and bytes; the oldest go first:
    one by one at the bound in steps, as they ran together at the bound in bytes.
    """

    def __init__(self, steps_max: int, bytes_max: int) -> None:
        """Bounds for one session."""
        self._steps_max = steps_max
        self._bytes_max = bytes_max
        self._entries: deque[_Held] = deque()
        self.steps = 0
        self.size_bytes = 0

    def add(
        self, first_step: int, length: int, inputs: bytes, outputs: bytes, outputs_length: int
    ) -> None:
        """Keeps steps that were just applied."""
        self._append(_Held(first_step, length, inputs, outputs, outputs_length))

    def take_newest(self, other: "HeldResults") -> None:
        """Keeps the last step of another session, of which this one is a copy."""
        assert not self._entries
        if other._entries:
            self._append(other._entries[-1].newest(1))

    def clear(self) -> None:
        """Forgets everything."""
        self._entries.clear()
        self.steps = 0
        self.size_bytes = 0

    def _append(self, entry: _Held) -> None:
        self._entries.append(entry)
        self.steps += entry.length
        self.size_bytes += entry.size_bytes
        while self.steps > self._steps_max or self.size_bytes > self._bytes_max:
            oldest = self._entries.popleft()
            self.steps -= oldest.length
            self.size_bytes -= oldest.size_bytes
            left = self._steps_max - self.steps
            if left > 0 and oldest.length > left:
                kept = oldest.newest(left)
                if self.size_bytes + kept.size_bytes <= self._bytes_max:
                    self._entries.appendleft(kept)
                    self.steps += kept.length
                    self.size_bytes += kept.size_bytes

    def newest_output(self) -> bytes | None:
        """The output row of the last applied step, if it was asked for and is held."""
        if not self._entries or not self._entries[-1].outputs_length:
            return None
        newest = self._entries[-1]
        return newest.outputs[-(len(newest.outputs) // newest.outputs_length) :]

    def recall(
        self, first_step: int, length: int, inputs: bytes, wanted: OutputMode
    ) -> tuple[bytes, int]:
        """Answers steps that were applied before.

        Args:
            first_step: Of the steps that came again.
            length: How many of them.
            inputs: Their input rows.
            wanted: `LAST` means the last of exactly these steps.

        Returns:
            The output rows, packed, and their number.

        Raises:
            StepConflict: A step came with another payload.
            StepResultNotHeld: A step, or an output row of it, is no longer (or never was) held.
        """
        last_step = first_step + length - 1
        entries = [
            entry
            for entry in self._entries
            if entry.last_step >= first_step and entry.first_step <= last_step
        ]
        row_bytes = len(inputs) // length
        for entry in entries:
            start, end = max(first_step, entry.first_step), min(last_step, entry.last_step)
            held = _slice(entry.inputs, row_bytes, start - entry.first_step, end - start + 1)
            if held != _slice(inputs, row_bytes, start - first_step, end - start + 1):
                raise StepConflict(
                    f"steps {start} to {end} ran earlier with different input; do two programs step"
                    " this session?",
                    first_step=start,
                )
        if not entries or entries[0].first_step > first_step:
            raise StepResultNotHeld(
                f"step {first_step} ran earlier and its result is no longer kept; go on with the"
                " next",
                first_step=first_step,
            )
        if wanted is OutputMode.NONE:
            return b"", 0
        first_wanted = last_step if wanted is OutputMode.LAST else first_step
        rows = [_outputs(entry, first_wanted, last_step) for entry in entries]
        return b"".join(rows), last_step - first_wanted + 1


def _slice(rows: bytes, row_bytes: int, start: int, length: int) -> bytes:
    return rows[start * row_bytes : (start + length) * row_bytes]


def _outputs(entry: _Held, first_step: int, last_step: int) -> bytes:
    """The output rows of an entry's steps between two steps."""
    start, end = max(first_step, entry.first_step), min(last_step, entry.last_step)
    if start > end:
        return b""
    first_output = entry.last_step - entry.outputs_length + 1
    if start < first_output:
        raise StepResultNotHeld(
            f"step {start} ran earlier without the output that is asked for now, so it was not"
            " kept",
            first_step=start,
        )
    row_bytes = len(entry.outputs) // entry.outputs_length
    return _slice(entry.outputs, row_bytes, start - first_output, end - start + 1)


class HeldBudget:
    """Bounds what all sessions hold together: beyond it, those stepped longest ago forget."""

    def __init__(self, bytes_max: int) -> None:
        """`bytes_max` for the whole server."""
        self._bytes_max = bytes_max
        self._recent: OrderedDict[SessionKey, HeldResults] = OrderedDict()
        self._sizes: dict[SessionKey, int] = {}
        self.size_bytes = 0

    def update(self, key: SessionKey, held: HeldResults) -> None:
        """Notes that a session's held results changed."""
        self.size_bytes += held.size_bytes - self._sizes.get(key, 0)
        self._sizes[key] = held.size_bytes
        self._recent[key] = held
        self._recent.move_to_end(key)
        while self.size_bytes > self._bytes_max:
            oldest, forgotten = next(iter(self._recent.items()))
            forgotten.clear()
            self.forget(oldest)

    def forget(self, key: SessionKey) -> None:
        """A session ended or was cleared."""
        self._recent.pop(key, None)
        self.size_bytes -= self._sizes.pop(key, 0)
