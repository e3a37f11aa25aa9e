"""Gates as plain lines, one for each step: for files, pipes and terminals without colours."""

import numpy as np

from conveyor_client._trace import GateTrace
from conveyor_client.cli._recording import Recording, Span
from conveyor_client.cli._scales import is_share

LEGEND = "# mean of each gate (share of its units below 0.1 / above 0.9)"


def line_of(recording: Recording) -> str:
    """Writes the newest step.

    Args:
        recording: With at least one step.

    Returns:
        Its number, what went in and came out, where the model looked, and the figures of each gate.
    """
    span = recording.last(1)
    parts = [f"step {span.last_step}", f"in {_input(span)}", f"out {_output(span)}"]
    weights = span.trace.attention
    if weights is not None and not np.isnan(weights[0]).any():
        row = int(np.argmax(weights[0]))
        parts.append(f"looks at row {row} ({weights[0, row]:.2f})")
    for layer in span.trace.layers:
        figures = " ".join(map(_figures, layer))
        parts.append(f"layer {layer.layer} {layer.cell}: {figures}")
    if not span.trace.layers:
        parts.append("no trace: answered from the server's memory")
    return "  ".join(parts)


def _input(span: Span) -> str:
    letters = span.letters
    if letters is not None:
        return letters[0]
    return ", ".join(span.names.features(np.asarray(span.inputs[0], np.float32)))


def _output(span: Span) -> str:
    chances = span.probabilities
    if chances is None:
        return ", ".join(span.names.values(span.outputs[0]))
    best = int(np.argmax(chances[0]))
    return f"{span.names.output(best)} {chances[0, best]:.0%}"


def _figures(gate: GateTrace) -> str:
    mean = f"{gate.name} {gate.mean[0]:.2f}"
    if not is_share(gate.name):
        return mean
    return f"{mean} ({gate.share_low[0]:.0%}/{gate.share_high[0]:.0%})"
