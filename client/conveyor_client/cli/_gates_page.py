"""Gates as a page that stands alone: pictures inside it, a table, no script and nothing fetched."""

import base64
from collections.abc import Iterable
from html import escape

import numpy as np

from conveyor_client._trace import GateTrace
from conveyor_client.cli._gates_panels import Grid
from conveyor_client.cli._gates_picture import section_pngs
from conveyor_client.cli._recording import Span
from conveyor_client.cli._scales import LONG_NAMES

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
body { margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #1f2430; background: #fff;
       font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin-bottom: 0; overflow-wrap: anywhere; }
.note { color: #7a8294; margin-top: 0.2rem; }
pre { background: #f4f5f8; padding: 0.7rem 1rem; border-radius: 6px; white-space: pre-wrap;
      overflow-wrap: anywhere; }
img { width: 100%; height: auto; display: block; margin: 1rem 0; }
table { border-collapse: collapse; font-size: 0.9rem; }
th, td { padding: 0.25rem 0.9rem 0.25rem 0; border-bottom: 1px solid #e3e6ec; text-align: right; }
th { color: #7a8294; font-weight: 600; }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; }
"""


def page(span: Span, title: str, grid: Grid | None = None) -> str:
    """Writes the page.

    Args:
        span: What was watched, at least one step.
        title: Its title.
        grid: Lines and columns of the image whose patches are the memory's rows, if they are.

    Returns:
        HTML, self-contained.
    """
    traced = int(span.trace.covered.sum())
    note = f"steps {span.first_step} to {span.last_step}, {traced} with a trace"
    parts = [
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>",
        f'<h1>{escape(title)}</h1><p class="note">{escape(note)}</p>',
    ]
    if span.letters is not None:
        text = "".join(_as_read(span))
        parts.append(f"<h2>Read</h2><pre>{escape(text)}</pre>")
    for words, data in section_pngs(span, grid):
        source = base64.b64encode(data).decode("ascii")
        parts.append(f'<img alt="{escape(words)}" src="data:image/png;base64,{source}">')
    parts += ["<h2>Gates</h2>", _table(span), "</body></html>\n"]
    return "\n".join(parts)


def _as_read(span: Span) -> Iterable[str]:
    """The labels as they are, line ends among them; other control characters as symbols."""
    labels = span.model.input.labels
    tokens: list[int] = span.inputs.tolist()
    for token, letter in zip(tokens, span.letters or (), strict=True):
        label = labels[token] if token < len(labels) else ""
        yield label if label == "\n" or (label and label.isprintable()) else letter


def _table(span: Span) -> str:
    head = "".join(
        f"<th>{escape(name)}</th>"
        for name in ("layer", "gate", "units", "mean", "least", "greatest", "< 0.1", "> 0.9")
    )
    rows = [
        _row(f"{layer.layer} {layer.cell}", gate) for layer in span.trace.layers for gate in layer
    ]
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _row(layer: str, gate: GateTrace) -> str:
    known = gate.summary[~np.isnan(gate.mean)]
    mean, _, _, low, high = known.mean(axis=0).tolist()
    cells = (
        layer,
        f"{gate.name} {LONG_NAMES.get(gate.name, '')}",
        str(gate.units),
        f"{mean:.3f}",
        f"{known[:, 1].min():.3f}",
        f"{known[:, 2].max():.3f}",
        f"{low:.1%}",
        f"{high:.1%}",
    )
    return "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
