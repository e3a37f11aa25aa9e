"""What a picture of gates is made of: panels over time, each of which knows how to draw itself.

This module and `_gates_picture` are all that imports matplotlib, which is the extra `plot`.
"""

# pyright: reportUnknownMemberType=false
# The keyword arguments of matplotlib's functions have no types, so nearly all are partly unknown.

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.image import AxesImage

from conveyor_client._nouns import FloatArray
from conveyor_client._trace import GateTrace, LayerTrace
from conveyor_client.cli._recording import Span
from conveyor_client.cli._scales import LONG_NAMES, scale_of

PANEL_INCHES = 1.05
"""The height of a panel, where there are not very many."""
DRAWING_INCHES = 9.0
"""The least width of its drawing."""
INK, PALE = "#1f2430", "#7a8294"

_LEGEND_INCHES = 0.18
_LINES_MAX = 8
_NAME_MAX = 24
_RANGES_MAX = 5.0
_GUESSES_MAX = 14
_TILES_MAX = 60

_MISSING = "#d9dce3"
_SEQUENTIAL = LinearSegmentedColormap.from_list(
    "shut to open", ("#fbf7ea", "#c9e4c5", "#6bbcae", "#2a7f9e", "#173f6b")
)
_DIVERGING = LinearSegmentedColormap.from_list(
    "below to above", ("#1d4f91", "#6fa3d4", "#f7f5f2", "#e08e6d", "#a62b2f")
)
_COLOURS = ("#3b6fb6", "#d1622b", "#3d8f5f", "#a04a9b", "#b3942f", "#3fa7b5", "#7d5a4f", "#6b6f7b")

Grid = tuple[int, int]
IndexArray = npt.NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Panel:
    """One drawing over time.

    Attributes:
        name: What stands to the left of it, large.
        note: And below that, small.
        draw: Draws it; returns what the colour bar explains, if anything.
        share: Its height, in panels.
        above: Inches left free above it.
    """

    name: str
    note: str
    draw: Callable[[Axes], AxesImage | None]
    share: float = 1.0
    above: float = 0.0


@dataclass(frozen=True, slots=True)
class Section:
    """Panels under one heading and above one axis of time."""

    heading: str
    panels: Sequence[Panel]


def sections_of(span: Span, grid: Grid | None = None) -> list[Section]:
    """What there is to draw: inputs and outputs, the attention, and each layer."""
    heading = "What goes in and what comes out"
    if span.names.feeds_back and span.probabilities is not None:
        heading = "What it reads, and what it expects next"
    sections = [Section(heading, _in_and_out(span))]
    if span.trace.attention is not None:
        sections.append(Section("Where it looks", _attention(span.trace.attention, grid)))
    return sections + [_layer(layer) for layer in span.trace.layers]


# --- attention -----------------------------------------------------------------------------------


def _attention(weights: FloatArray, grid: Grid | None) -> list[Panel]:
    highest = float(np.nanmax(weights, initial=0.0)) or 1.0
    panel = Panel(
        "attention",
        f"{weights.shape[1]} rows",
        lambda ax: _units(ax, weights, _SEQUENTIAL, 0.0, highest),
        share=1.6,
    )
    steps = len(weights)
    if grid is None or grid[0] * grid[1] != weights.shape[1] or steps > _TILES_MAX:
        return [panel]
    wide = DRAWING_INCHES / steps  # of a step, in inches
    share = min(max(wide * grid[0] / grid[1] / PANEL_INCHES, 0.4), 1.6)
    draw = _tiles(weights, grid, highest)
    return [Panel("patches", f"{grid[0]} by {grid[1]}", draw, share), panel]


def _tiles(weights: FloatArray, grid: Grid, highest: float) -> Callable[[Axes], AxesImage]:
    """The weights as an image for each step, each above its place on the axis of time."""
    lines, columns = grid
    tiles = weights.reshape(-1, lines, columns)
    # Between tiles an empty column, made of four so that it is thinner than a patch.
    fine = np.repeat(tiles, 4, axis=2)
    spaced = np.pad(fine, ((0, 0), (0, 0), (1, 1)), constant_values=np.nan)
    image = spaced.transpose(1, 0, 2).reshape(lines, -1)

    def draw(ax: Axes) -> AxesImage:
        ends = (-0.5, len(weights) - 0.5, lines - 0.5, -0.5)
        shown = _SEQUENTIAL.with_extremes(bad="white")
        ax.set_yticks([])
        return ax.imshow(
            image, aspect="auto", cmap=shown, vmin=0.0, vmax=highest, extent=ends,
            interpolation="nearest",
        )  # fmt: skip

    return draw


# --- inputs and outputs --------------------------------------------------------------------------


def _in_and_out(span: Span) -> list[Panel]:
    panels: list[Panel] = []
    if span.letters is None:
        names = span.names.inputs or [str(n) for n in range(span.inputs.shape[1])]
        inputs = np.asarray(span.inputs, np.float32)
        panels.append(_lines_panel("inputs", inputs, names))
    chances = span.probabilities
    if chances is None:
        names = span.names.outputs or [str(n) for n in range(span.outputs.shape[1])]
        panels.append(_lines_panel("outputs", span.outputs, names))
    else:
        panels.append(Panel("outputs", "likeliest", _guesses(span, chances), share=2.0))
    return panels


def _lines(rows: FloatArray, names: Sequence[str]) -> Callable[[Axes], None]:
    """Features over time, each scaled to its own range where the ranges differ much."""

    def draw(ax: Axes) -> None:
        shown = rows[:, :_LINES_MAX]
        if _ranges_differ(rows):
            low, high = shown.min(axis=0), shown.max(axis=0)
            shown = (shown - low) / np.where(high > low, high - low, 1)
        at = np.arange(len(rows))
        for n in range(shown.shape[1]):
            ax.plot(at, shown[:, n], color=_COLOURS[n], linewidth=1.3, label=_short(names[n]))
        legend = ax.legend(
            loc="lower left", bbox_to_anchor=(-0.005, 0.98), ncols=_LINES_MAX, frameon=False,
            fontsize=7, handlelength=1.1, handletextpad=0.4, columnspacing=1.4, borderaxespad=0,
        )  # fmt: skip
        for text in legend.get_texts():
            text.set_parse_math(False)
        ax.margins(x=0.0)
        ax.set_xlim(-0.5, len(rows) - 0.5)
        ax.tick_params(axis="y", labelsize=6.5, length=2, colors=PALE)

    return draw


def _short(name: str) -> str:
    return name if len(name) <= _NAME_MAX else name[: _NAME_MAX - 1] + "…"


def _ranges_differ(rows: FloatArray) -> bool:
    ranges = np.ptp(rows[:, :_LINES_MAX], axis=0)
    ranges = ranges[ranges > 0]
    return bool(len(ranges)) and float(ranges.max() / ranges.min()) > _RANGES_MAX


def _lines_panel(title: str, rows: FloatArray, names: Sequence[str]) -> Panel:
    more = f"first {_LINES_MAX} of {rows.shape[1]}" if rows.shape[1] > _LINES_MAX else ""
    note = more or ("own ranges" if _ranges_differ(rows) else "")
    return Panel(title, note, _lines(rows, names), above=_LEGEND_INCHES)


def _guesses(span: Span, chances: FloatArray) -> Callable[[Axes], AxesImage]:
    """The likeliest outputs over time, and where they name tokens, the one that came next."""
    rows = min(_GUESSES_MAX, chances.shape[1])
    chosen = np.sort(np.argsort(chances.max(axis=0))[::-1][:rows])

    def draw(ax: Axes) -> AxesImage:
        image = _heat(ax, chances[:, chosen], _SEQUENTIAL, 0.0, 1.0)
        size = min(7.0, 2.1 * PANEL_INCHES * 72 / rows * 0.8)
        ax.set_yticks(
            range(rows), [span.names.output(int(n)) for n in chosen], fontsize=size,
            family="monospace", parse_math=False,
        )  # fmt: skip
        if span.names.feeds_back:
            came = [
                (step, int(row))
                for step, token in enumerate(span.inputs[1:].tolist())
                for row in np.flatnonzero(chosen == token)
            ]
            if came:
                at = np.array(came)
                ax.scatter(at[:, 0], at[:, 1], s=9, facecolors="none", edgecolors="#d1622b")
                ax.text(
                    1.0, 1.03, "○ what came next", transform=ax.transAxes, fontsize=7,
                    color="#d1622b", ha="right", va="bottom",
                )  # fmt: skip
        return image

    return draw


# --- gates ---------------------------------------------------------------------------------------


def _layer(layer: LayerTrace) -> Section:
    units = max(gate.units for gate in layer)
    heading = f"Layer {layer.layer}: {layer.cell}, {units} units"
    # One order for all gates of a size, so that a unit is in the same line in each of them.
    orders = {gate.units: alike_together(gate.values) for gate in layer if gate.values is not None}
    if orders:
        heading += ", those that act alike next to each other"
    return Section(heading, [_gate(gate, orders.get(gate.units)) for gate in layer])


def _gate(gate: GateTrace, order: IndexArray | None) -> Panel:
    note = LONG_NAMES.get(gate.name, "")
    if gate.values is None or order is None:
        return Panel(gate.name, note, lambda ax: _spread(ax, gate))
    values = gate.values[:, order]
    scale = scale_of(gate.name, gate.minimum, gate.maximum)
    colours = _DIVERGING if scale.diverging else _SEQUENTIAL
    return Panel(gate.name, note, lambda ax: _units(ax, values, colours, scale.low, scale.high))


def alike_together(values: FloatArray) -> IndexArray:
    """Orders units so that those whose activations go up and down together are neighbours.

    Each unit is a direction in the plane of the two strongest common movements; they are ordered by
    its angle.

    Args:
        values: (K, units); steps with a NaN are left out.

    Returns:
        The units, each once.
    """
    known = values[~np.isnan(values).any(axis=1)].astype(np.float64)
    moved = known - known.mean(axis=0) if len(known) else known
    size = np.sqrt((moved**2).sum(axis=0)) if len(known) else np.zeros(values.shape[1])
    if len(known) < 3 or values.shape[1] < 3 or not size.any():
        return np.arange(values.shape[1], dtype=np.intp)
    _, strength, axes = np.linalg.svd(moved / np.where(size > 0, size, 1), full_matrices=False)
    plane = strength[:2, None] * axes[:2]
    order: IndexArray = np.argsort(np.arctan2(plane[1], plane[0]), kind="stable")
    return order


def _heat(ax: Axes, values: FloatArray, colours: Colormap, low: float, high: float) -> AxesImage:
    """(K, units) as a heat map, time to the right."""
    shown = colours.with_extremes(bad=_MISSING)
    return ax.imshow(values.T, aspect="auto", cmap=shown, vmin=low, vmax=high)


def _units(ax: Axes, values: FloatArray, colours: Colormap, low: float, high: float) -> AxesImage:
    """A heat map whose axis counts units, or rows of a memory, from 1."""
    image = _heat(ax, values, colours, low, high)
    units = values.shape[1]
    ticks = ax.set_yticks([0, units - 1], ["1", str(units)])
    for tick, inside in zip(ticks, ("top", "bottom"), strict=True):
        tick.label1.set_verticalalignment(inside if units > 1 else "center")
    ax.tick_params(axis="y", labelsize=6.5, length=0, colors=PALE)
    return image


def _spread(ax: Axes, gate: GateTrace) -> None:
    """A summary over time: from the least to the greatest, the mean, and the shares at the ends."""
    at = np.arange(len(gate.mean))
    scale = scale_of(gate.name, gate.minimum, gate.maximum)
    ax.fill_between(at, gate.minimum, gate.maximum, step="mid", color=_COLOURS[0], alpha=0.18, lw=0)
    ax.plot(at, gate.mean, color=_COLOURS[0], linewidth=1.5, label="mean")
    if not scale.diverging:
        ax.plot(at, gate.share_low, color=_COLOURS[7], linewidth=0.9, ls=":", label="share < 0.1")
        ax.plot(at, gate.share_high, color=_COLOURS[1], linewidth=0.9, ls="--", label="share > 0.9")
    ax.legend(
        loc="upper left", bbox_to_anchor=(1.005, 1.02), frameon=False, fontsize=6,
        handlelength=1.2, handletextpad=0.4, labelspacing=0.25, borderaxespad=0,
    )  # fmt: skip
    ax.set_xlim(-0.5, len(at) - 0.5)
    ax.set_ylim(scale.low, scale.high)
    ax.tick_params(axis="y", labelsize=6.5, length=2, colors=PALE)
