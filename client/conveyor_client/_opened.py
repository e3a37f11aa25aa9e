"""What is known of a session once it is open, and the bounds that follow from it."""

from dataclasses import dataclass

from conveyor.v1 import session_pb2
from conveyor_client._ledger import Ledger, Window
from conveyor_client._nouns import ModelInfo
from conveyor_client._policy import Options
from conveyor_client._rows import RowCodec

_FRAME_SLACK_BYTES = 1024  # what a steps frame of one entry holds beside its rows


@dataclass(frozen=True, slots=True)
class Opened:
    """An open session.

    Attributes:
        frame_bytes_max: Bytes of rows in a frame.
        part_steps_max: A longer chunk is sent in parts.
    """

    model: ModelInfo
    codec: RowCodec
    ledger: Ledger
    frame_bytes_max: int
    part_steps_max: int


def describe(options: Options, model: ModelInfo, answer: session_pb2.OpenSessionResponse) -> Opened:
    """Works out the bounds of a session that was just opened.

    Args:
        options: The client's own bounds.
        model: The session's model, with the server's limits.
        answer: What the server said on opening.

    Returns:
        What is known of it; the ledger begins behind the applied step.
    """
    limits = model.limits
    in_flight_steps_max = _least(options.replay_steps_max, limits.steps_in_flight_max)
    window = Window(
        steps_max=_least(options.replay_steps_max, answer.replay_window.steps_max),
        bytes_max=_least(options.replay_bytes_max, answer.replay_window.bytes_max),
        # No more than the server holds results of: a break then leaves no answer behind.
        in_flight_steps_max=_least(in_flight_steps_max, answer.held_results_steps),
    )
    frame_bytes_max = _least(
        min(options.frame_bytes_max, window.bytes_max),
        limits.message_bytes_max - _FRAME_SLACK_BYTES,
    )
    part_steps_max = min(
        _least(window.steps_max, limits.chunk_steps_max),
        (window.in_flight_steps_max + 1) // 2,  # so that the next part is under way in time
        max(1, frame_bytes_max // model.input.row_bytes),
    )
    ledger = Ledger(window, model.output.row_bytes)
    ledger.rebase(answer.session.applied_step, answer.session.durable_step)
    return Opened(model, RowCodec(model), ledger, frame_bytes_max, part_steps_max)


def _least(ours: int, theirs: int) -> int:
    """The lower limit, where the server names one at all."""
    return min(ours, theirs) if theirs > 0 else ours
