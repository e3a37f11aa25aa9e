"""Gates in a terminal: a strip of colour for each gate, a column for each step, the newest right.

There are more units than lines, so a few are shown, evenly spaced; the figures beside them are of
all. Two units share one character, the upper half block, whose two colours are theirs. Without
colours a character is one unit, and its shade the value, or its sign where it goes below 0.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from rich.cells import cell_len
from rich.color import Color
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.segment import Segment
from rich.style import Style

from conveyor_client._nouns import FloatArray
from conveyor_client._trace import GateTrace
from conveyor_client.cli._recording import Recording, Span
from conveyor_client.cli._scales import LONG_NAMES, Scale, scale_of

_SHADES, _SIGNS = " ░▒▓█", "=- +#"
_GAP = "·"
_LEVELS = 48
_ROWS_MAX = 4
_STRIP_COLUMNS_MIN = 4
# From shut to open, and from below 0 to above; each is (red, green, blue).
_SEQUENTIAL = ((13, 8, 45), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))
_DIVERGING = ((77, 171, 247), (24, 78, 140), (26, 26, 30), (156, 40, 40), (255, 135, 110))
_PLAIN, _DIM, _BOLD = Style(), Style(dim=True), Style(bold=True)


@dataclass(frozen=True, slots=True)
class _Columns:
    """How a line is divided."""

    label: int
    strip: int
    figures: bool


class GatesView:
    """What a session did lately, as wide and as high as the console is.

    Args:
        recording: What was watched; drawn anew each time.
        title: The first line.
    """

    def __init__(self, recording: Recording, title: str) -> None:
        self._recording = recording
        self._title = title

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(_STRIP_COLUMNS_MIN, options.max_width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in self._lines(console, options):
            yield from Segment.adjust_line_length(line, options.max_width)
            yield Segment.line()

    def _lines(self, console: Console, options: ConsoleOptions) -> Iterable[list[Segment]]:
        columns = _divide(options.max_width)
        yield [Segment(self._title, _BOLD)]
        if not len(self._recording):
            yield [Segment("waiting for the first step", _DIM)]
            return
        span = self._recording.last(columns.strip)
        coloured = console.color_system is not None and not console.no_color
        above = list(_in_and_out(span, columns))
        yield from above
        gates = sum(len(layer.gates) for layer in span.trace.layers)
        strips = gates + (span.trace.attention is not None)
        left = console.height - 3 - len(above) - len(span.trace.layers) - 2
        rows = max(1, min(_ROWS_MAX, left // max(strips, 1)))
        if span.trace.attention is not None:
            yield from _attention(span, columns, rows, coloured)
        for layer in span.trace.layers:
            units = max(gate.units for gate in layer)
            heading = f"layer {layer.layer}  {layer.cell}, {units} units"
            yield _heading(heading, columns)
            for gate in layer:
                yield from _gate(gate, columns, rows, coloured)


def _divide(width: int) -> _Columns:
    figures = width >= 60
    label = 12 if width >= 80 else 2
    strip = max(_STRIP_COLUMNS_MIN, width - label - (19 if figures else 0))
    return _Columns(label, strip, figures)


def _heading(text: str, columns: _Columns) -> list[Segment]:
    width = columns.label + columns.strip
    figures = f"{'mean':>7}{'<0.1':>6}{'>0.9':>6}" if columns.figures else ""
    return [Segment(f"{text[:width]:<{width}}{figures}", _BOLD)]


# --- inputs and outputs --------------------------------------------------------------------------


def _in_and_out(span: Span, columns: _Columns) -> Iterable[list[Segment]]:
    width = columns.label + columns.strip
    letters = span.letters
    if letters is not None:
        yield [_label("in", columns), *_symbols(letters, columns)]
    else:
        yield _listed("in", span.names.features(np.asarray(span.inputs[-1], np.float32)), columns)
    chances = span.probabilities
    if chances is None:
        yield _listed("out", span.names.values(span.outputs[-1]), columns)
        return
    likeliest = [span.names.output(int(n)) for n in np.argmax(chances, axis=1)]
    yield [_label("out", columns), *_symbols(likeliest, columns)]
    yield [Segment(" " * columns.label), Segment(_ranking(span, chances[-1])[:width], _DIM)]


def _ranking(span: Span, chances: FloatArray) -> str:
    best = np.argsort(chances)[::-1][:6]
    return "   ".join(f"{span.names.output(int(n))} {chances[n]:.0%}" for n in best)


def _listed(label: str, items: list[str], columns: _Columns) -> list[Segment]:
    text = "   ".join(items)
    return [_label(label, columns), Segment(text[: columns.strip])]


def _symbols(symbols: list[str], columns: _Columns) -> list[Segment]:
    """One character for each step, above its column of the strips."""
    single = "".join(
        s if cell_len(s) == 1 else (s[:1] if s[:1].isascii() else "□") for s in symbols
    )
    return [Segment(single.rjust(columns.strip))]


def _label(text: str, columns: _Columns) -> Segment:
    return Segment(f"{text[: columns.label - 1]:<{columns.label}}", _DIM)


# --- strips --------------------------------------------------------------------------------------


def _gate(gate: GateTrace, columns: _Columns, rows: int, coloured: bool) -> Iterable[list[Segment]]:
    name = f"{gate.name} {LONG_NAMES.get(gate.name, '')}" if columns.label > 2 else gate.name
    scale = scale_of(gate.name, gate.minimum, gate.maximum)
    if gate.values is None:
        bands, rows = gate.mean[None, :], 1
    else:
        bands = _some_units(gate.values, rows * (2 if coloured else 1))
    placed = scale.place(bands)
    drawn = _strip(placed, rows, scale, columns.strip, coloured)
    figures = f"{gate.mean[-1]:7.2f}{gate.share_low[-1]:6.0%}{gate.share_high[-1]:6.0%}"
    for number, line in enumerate(drawn):
        label = _label(name if number == 0 else "", columns)
        tail = [Segment(figures)] if columns.figures and number == 0 else []
        yield [label, *line, *tail]


def _attention(span: Span, columns: _Columns, rows: int, coloured: bool) -> Iterable[list[Segment]]:
    weights = span.trace.attention
    assert weights is not None, "only drawn where there is one"
    yield [Segment(f"attention over {weights.shape[1]} rows", _BOLD)]
    bands = _most_of_rows(weights, rows * (2 if coloured else 1))
    highest = float(np.nanmax(bands, initial=0.0)) or 1.0
    scale = Scale(0.0, highest, diverging=False)
    now = weights[-1]
    figures = "" if np.isnan(now).any() else f"   row {int(np.argmax(now))}: {now.max():.2f}"
    for number, line in enumerate(_strip(scale.place(bands), rows, scale, columns.strip, coloured)):
        label = _label("looks at" if number == 0 else "", columns)
        tail = [Segment(figures[:19])] if columns.figures and number == 0 else []
        yield [label, *line, *tail]


def _some_units(values: FloatArray, bands: int) -> FloatArray:
    """So many units, evenly spaced, first ones on top; (bands, K). Few units are repeated."""
    units = values.shape[1]
    middles = (2 * np.arange(bands) + 1) * units // (2 * bands)
    return values.T[middles]


def _most_of_rows(weights: FloatArray, bands: int) -> FloatArray:
    """A memory's rows in so many bands, of each the most; (bands, K). Few rows are repeated."""
    rows = weights.shape[1]
    made = min(bands, rows)
    edges = np.arange(made) * rows // made
    most: FloatArray = np.maximum.reduceat(weights, edges, axis=1)
    return most.T[np.arange(bands) * made // bands]


def _strip(
    placed: FloatArray, rows: int, scale: Scale, width: int, coloured: bool
) -> list[list[Segment]]:
    """Lines of segments, right-aligned, from (bands, K) values between 0 and 1."""
    pad = Segment(" " * (width - placed.shape[1]))
    if not coloured:
        scheme = _SIGNS if scale.diverging else _SHADES
        shades = ["".join(_shade(value, scheme) for value in band.tolist()) for band in placed]
        return [[pad, Segment(line)] for line in shades[:rows]]
    if len(placed) < 2 * rows:  # one band for a whole character
        placed = np.repeat(placed, 2, axis=0)
    levels = np.where(np.isnan(placed), -1, np.rint(placed * (_LEVELS - 1))).astype(int)
    lines: list[list[Segment]] = []
    for row in range(rows):
        pairs = zip(levels[2 * row].tolist(), levels[2 * row + 1].tolist(), strict=True)
        cells = [_cell(above, below, scale.diverging) for above, below in pairs]
        lines.append([pad, *cells])
    return lines


def _shade(value: float, scheme: str) -> str:
    return _GAP if np.isnan(value) else scheme[min(int(value * len(scheme)), len(scheme) - 1)]


@lru_cache(maxsize=2 * (_LEVELS + 1) ** 2)
def _cell(above: int, below: int, diverging: bool) -> Segment:
    if above < 0 or below < 0:
        return Segment(_GAP, _DIM)
    return Segment("▀", Style(color=_colour(above, diverging), bgcolor=_colour(below, diverging)))


@lru_cache(maxsize=2 * _LEVELS)
def _colour(level: int, diverging: bool) -> Color:
    stops = _DIVERGING if diverging else _SEQUENTIAL
    at = level / (_LEVELS - 1) * (len(stops) - 1)
    lower = min(int(at), len(stops) - 2)
    part = at - lower
    red, green, blue = (
        round(a + (b - a) * part) for a, b in zip(stops[lower], stops[lower + 1], strict=True)
    )
    return Color.from_rgb(red, green, blue)
