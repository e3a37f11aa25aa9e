"""Gates as a picture: a heat map for each gate over time, what went in and out, and the attention.

Nothing here touches matplotlib's global state: figures are made and drawn as objects.
"""

# pyright: reportUnknownMemberType=false
# The keyword arguments of matplotlib's functions have no types, so nearly all are partly unknown.

import io
import warnings
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from conveyor_client.cli._gates_panels import (
    DRAWING_INCHES,
    INK,
    PALE,
    PANEL_INCHES,
    Grid,
    Panel,
    Section,
    sections_of,
)
from conveyor_client.cli._recording import Span

_LETTERS_MAX = 160  # beyond it they are too small to read

# Inches.
_WIDTH_MAX, _WIDTH_OF_STEP = 18.0, 0.115
_LEFT, _RIGHT, _BAR, _BAR_GAP = 1.25, 0.75, 0.13, 0.12
_TOP, _BOTTOM = 0.75, 0.25
_HEADING, _GAP, _AXIS = 0.45, 0.09, 0.32
_PANEL_MIN, _PANELS_MAX = 0.45, 70.0

_DPI, _PIXELS_MAX = 150, 60_000


def png(span: Span, title: str, grid: Grid | None = None) -> bytes:
    """Draws everything into one picture.

    Args:
        span: What was watched, at least one step.
        title: Its title.
        grid: Lines and columns of the image whose patches are the memory's rows, if they are.

    Returns:
        The file.
    """
    return _render(figure_of(sections_of(span, grid), span, title))


def section_pngs(span: Span, grid: Grid | None = None) -> list[tuple[str, bytes]]:
    """Draws each section into a picture of its own.

    Args:
        span: What was watched, at least one step.
        grid: As for `png`.

    Returns:
        For each section what it shows, in words, and the file.
    """
    made: list[tuple[str, bytes]] = []
    for section in sections_of(span, grid):
        names = ", ".join(panel.name for panel in section.panels)
        made.append((f"{section.heading}: {names}", _render(figure_of([section], span, ""))))
    return made


def figure_of(sections: Sequence[Section], span: Span, title: str) -> Figure:
    """Lays panels out from the top, all of one width, in inches.

    Panels are lower where there are very many, and the picture coarser where it would be too large.

    Args:
        sections: Of `sections_of`.
        span: What they show.
        title: Above them; none if empty.

    Returns:
        The figure, drawn.
    """
    shares = sum(panel.share for section in sections for panel in section.panels)
    panel_inches = max(_PANEL_MIN, min(PANEL_INCHES, _PANELS_MAX / shares))
    gaps = sum(_GAP + panel.above for section in sections for panel in section.panels)
    top = _TOP if title else 0.1
    height = top + _BOTTOM + shares * panel_inches + gaps
    height += len(sections) * (_HEADING + _AXIS)
    width = min(_WIDTH_MAX, _LEFT + _RIGHT + max(DRAWING_INCHES, len(span) * _WIDTH_OF_STEP))
    dpi = min(_DPI, _PIXELS_MAX / max(width, height))
    figure = Figure(figsize=(width, height), dpi=dpi, facecolor="white")
    if title:
        _text(figure, 0.3, height - 0.36, title, size=14, weight="bold")
        _text(figure, 0.3, height - 0.60, _subtitle(span), size=9, color=PALE)
    at = height - top
    for section in sections:
        at -= _HEADING
        _text(figure, 0.3, at + 0.13, section.heading, size=10.5, weight="bold")
        for panel in section.panels:
            at -= panel.above + panel.share * panel_inches
            last = panel is section.panels[-1]
            _panel(figure, panel, span, (at, panel.share * panel_inches), last=last)
            at -= _GAP
        at -= _AXIS
    return figure


def _subtitle(span: Span) -> str:
    traced = int(span.trace.covered.sum())
    missing = "" if traced == len(span) else f"; {len(span) - traced} without a trace, grey"
    return f"steps {span.first_step} to {span.last_step}{missing}"


def _text(
    figure: Figure,
    x: float,
    y: float,
    text: str,
    *,
    size: float,
    weight: str = "normal",
    color: str = INK,
) -> None:
    """Text at a place in inches from the lower left; never read as a formula."""
    width, height = figure.get_size_inches()
    figure.text(
        x / width, y / height, text, fontsize=size, weight=weight, color=color, parse_math=False
    )


def _panel(
    figure: Figure, panel: Panel, span: Span, place: tuple[float, float], *, last: bool
) -> None:
    bottom, tall = place
    width, height = figure.get_size_inches()
    inner = width - _LEFT - _RIGHT
    ax = figure.add_axes((_LEFT / width, bottom / height, inner / width, tall / height))
    for spine in ax.spines.values():
        spine.set_color("#c3c8d2")
        spine.set_linewidth(0.6)
    ax.tick_params(axis="x", length=0, labelbottom=False)
    image = panel.draw(ax)
    middle = bottom + tall / 2
    _text(figure, 0.3, middle, panel.name, size=11 if len(panel.name) < 3 else 9, weight="bold")
    _text(figure, 0.3, middle - 0.16, panel.note, size=7, color=PALE)
    if image is not None:
        left = width - _RIGHT + _BAR_GAP
        bar = figure.add_axes((left / width, bottom / height, _BAR / width, tall / height))
        colours = figure.colorbar(image, cax=bar)
        low, high = image.get_clim()
        ticks = [low, 0.0, high] if low < 0 else [low, high]
        colours.set_ticks(
            ticks, labels=[f"{tick:.{2 if abs(tick) < 100 else 3}g}" for tick in ticks]
        )
        for label in bar.get_yticklabels():  # inside, lest they run into the next panel's
            at = label.get_position()[1]
            label.set_verticalalignment(
                "bottom" if at == low else "top" if at == high else "center"
            )
        colours.outline.set_visible(False)
        bar.tick_params(labelsize=6.5, length=2, colors=PALE)
    if last:
        _time_axis(ax, span, inner)


def _time_axis(ax: Axes, span: Span, inches: float) -> None:
    """Letters where there are any and they can be read, else numbers of steps."""
    letters = span.letters
    ax.tick_params(axis="x", labelbottom=True, colors=INK)
    if letters is not None and len(span) <= _LETTERS_MAX:
        size = max(3.5, min(9.0, inches * 72 / len(span) * 0.95))
        ax.set_xticks(
            range(len(span)), letters, fontsize=size, family="monospace", parse_math=False
        )
        return
    every = max(1, -(-len(span) // 12))
    at = range(0, len(span), every)
    ax.set_xticks(at, [str(span.first_step + n) for n in at], fontsize=7)
    ax.set_xlabel("step", fontsize=7.5, color=PALE)


def _render(figure: Figure) -> bytes:
    canvas = FigureCanvasAgg(figure)
    file = io.BytesIO()
    with warnings.catch_warnings():
        # A label may hold any character, the font not: an empty box is drawn, and that is enough.
        warnings.filterwarnings("ignore", message=".*Glyph.*missing from", category=UserWarning)
        canvas.print_png(file)
    return file.getvalue()
