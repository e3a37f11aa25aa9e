"""Pictures and pages of known traces."""

import base64
import struct
from html.parser import HTMLParser

import numpy as np
import pytest

from conveyor.v1 import model_pb2
from conveyor_client.cli import _gates_picture
from conveyor_client.cli._gates_page import page
from conveyor_client.cli._gates_panels import alike_together, sections_of
from conveyor_client.cli._gates_picture import figure_of, png, section_pngs
from conveyor_client.cli._recording import Recording
from tests.unit.client.fake.models import attention_weights, gate_values
from tests.unit.client.recordings import COUNTER, LOOKER, SUMMARY, record, speller

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def size_of(data: bytes) -> tuple[int, int]:
    assert data.startswith(SIGNATURE)
    assert data.endswith(b"IEND\xaeB`\x82")
    width, height = struct.unpack(">II", data[16:24])
    return width, height


class Page(HTMLParser):
    """What a page is made of."""

    VOID = frozenset({"meta", "img"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data
        if "td" in self.open:
            self.cells[-1] += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_a_picture_is_as_high_as_it_has_gates() -> None:
    one = size_of(png(record(COUNTER, 10).whole(), "a title"))
    many = size_of(png(record(LOOKER, 10).whole(), "a title"))
    assert one[0] == many[0] > 1000
    assert many[1] > 2 * one[1]


@pytest.mark.parametrize("layers", [1, 40, 150])
def test_many_layers_stay_within_bounds(layers: int) -> None:
    span = record(COUNTER, 3).whole()
    sections = sections_of(span)
    figure = figure_of([*sections, *sections[-1:] * (layers - 1)], span, "deep")
    height = figure.get_size_inches()[1] * figure.dpi
    assert 140 * layers**0.8 < height <= 60_000


def test_many_steps_stay_within_bounds() -> None:
    spans = [record(COUNTER, steps).whole() for steps in (10, 120, 2000)]
    narrow, wide, widest = (
        figure_of(sections_of(span), span, "long").get_size_inches()[0] for span in spans
    )
    assert narrow < wide < widest < 20


@pytest.mark.parametrize(
    ("model", "mode", "steps"),
    [
        (COUNTER, 2, 1),
        (COUNTER, SUMMARY, 300),
        (LOOKER, 2, 2),
        (LOOKER, SUMMARY, 1),
        (speller(), 2, 300),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_everything_can_be_drawn(model: model_pb2.Model, mode: int, steps: int) -> None:
    gaps = (2, 3) if steps > 3 else ()
    size_of(png(record(model, steps, mode=mode, gaps=gaps).whole(), model.name))


def test_steps_without_any_trace_can_be_drawn() -> None:
    span = record(LOOKER, 2, gaps=(1, 2)).whole()
    assert [section.heading for section in sections_of(span)] == ["What goes in and what comes out"]
    size_of(png(span, "nothing"))
    assert "nothing" in Page(page(span, "nothing")).text


def test_sections_name_every_gate() -> None:
    sections = sections_of(record(LOOKER, 5).whole())
    assert [[panel.name for panel in section.panels] for section in sections] == [
        ["inputs", "outputs"], ["attention"], list("rznh"), list("ifgoch")
    ]  # fmt: skip
    assert [section.heading.split(",")[0] for section in sections[2:]] == [
        "Layer 0: gru", "Layer 1: lstm"
    ]  # fmt: skip
    (reading, _) = sections_of(record(speller(), 5).whole())
    assert reading.heading == "What it reads, and what it expects next"


def test_the_pixels_are_the_values() -> None:
    """The image of a gate holds its values, each unit once, in the order they are alike."""
    from matplotlib.figure import Figure

    span = record(LOOKER, 30).whole()
    layer = span.trace.layers[1]
    panel = next(p for p in sections_of(span)[-1].panels if p.name == "f")
    image = panel.draw(Figure().add_subplot())
    assert image is not None
    shown = np.asarray(image.get_array())
    assert image.get_clim() == (0, 1)
    hidden = layer["h"].values
    assert hidden is not None
    order = alike_together(hidden)
    assert sorted(order.tolist()) == list(range(5))
    np.testing.assert_array_equal(shown, gate_values(1, "f", 1, 30, 5).T[order])


def test_each_step_has_its_tile() -> None:
    from matplotlib.figure import Figure

    span = record(LOOKER, 4, gaps=(2,)).whole()
    tiles, _ = sections_of(span, (2, 3))[1].panels
    image = tiles.draw(Figure().add_subplot())
    assert image is not None
    shown = np.asarray(image.get_array())
    assert shown.shape == (2, 4 * (3 * 4 + 2))
    for step, tile in enumerate(np.split(shown, 4, axis=1)):
        assert np.isnan(tile[:, [0, -1]]).all()
        weights = attention_weights(step + 1, 1, 6).reshape(2, 3)
        expected = np.full((2, 3), np.nan) if step == 1 else weights
        np.testing.assert_array_equal(tile[:, 1:-1:4], expected)
        np.testing.assert_array_equal(tile[:, 4:-1:4], expected)
    for grid, steps in (((3, 3), 4), ((2, 3), 61)):
        assert len(sections_of(record(LOOKER, steps).whole(), grid)[1].panels) == 1


def test_units_that_act_alike_are_neighbours() -> None:
    at = np.linspace(0, 20, 200, dtype=np.float32)
    waves = np.stack([np.sin(at), np.cos(at), np.sin(at), np.cos(at), np.sin(at)], axis=1)
    order = alike_together(waves + np.float32([0, 1, 2, 3, 4])).tolist()
    ring = [order[n] % 2 for n in range(5)]
    assert sum(a != b for a, b in zip(ring, [*ring[1:], ring[0]], strict=True)) == 2
    gap = np.insert(waves, 3, np.nan, axis=0)
    np.testing.assert_array_equal(alike_together(gap), alike_together(waves))
    for plain in (waves[:2], np.ones((9, 4), np.float32), np.full((9, 4), np.nan, np.float32)):
        assert alike_together(plain).tolist() == list(range(plain.shape[1]))


HOSTILE = ['<script>alert("x")</script>', "$\\frac{$", "&amp;", "\x1b[31m", "\u4e16", "'\"><b>"]


@pytest.fixture
def hostile() -> Recording:
    return record(speller(HOSTILE), 12)


def test_a_page_stands_alone_and_names_every_gate() -> None:
    text = page(record(LOOKER, 5).whole(), "looker 1, session one")
    made = Page(text)
    assert "looker 1, session one" in made.text
    assert "steps 1 to 5, 5 with a trace" in made.text
    rows = [made.cells[n : n + 8] for n in range(0, len(made.cells), 8)]
    assert [row[1][0] for row in rows] == list("rznhifgoch")
    forget = gate_values(1, "f", 1, 5, 5)
    assert rows[5] == [
        "1 lstm", "f forget", "5", f"{forget.mean():.3f}", f"{forget.min():.3f}",
        f"{forget.max():.3f}", f"{(forget < 0.1).mean():.1%}", f"{(forget > 0.9).mean():.1%}",
    ]  # fmt: skip
    images = made.of("img")
    assert len(images) == 4
    for image in images:
        source = image["src"] or ""
        assert source.startswith("data:image/png;base64,")
        size_of(base64.b64decode(source.partition(",")[2], validate=True))
    words = " ".join(image["alt"] or "" for image in images)
    for gate in "rznhifgoch":
        assert f" {gate}" in words
    assert not {tag for tag, _ in made.tags} & {"script", "link", "iframe", "object"}
    assert "http" not in text.replace("http-equiv", "")
    (policy,) = [m["content"] for m in made.of("meta") if "content" in m]
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_labels_are_text_and_nothing_else(hostile: Recording) -> None:
    made = Page(page(hostile.whole(), 'title <script>alert("y")</script>'))
    tags = {tag for tag, _ in made.tags}
    assert not tags & {"script", "b"}
    assert 'title <script>alert("y")</script>' in made.text
    assert '<script>alert("x")</script>' in made.text
    assert "&amp;" in made.text
    assert "\x1b" not in made.text


def test_labels_are_never_formulas_and_may_be_missing_from_the_font(hostile: Recording) -> None:
    for words, data in section_pngs(hostile.whole()):  # a warning would be an error here
        size_of(data)
        assert words
    size_of(png(hostile.whole(), "$\\frac{$"))
    features = model_pb2.Model()
    features.CopyFrom(COUNTER)
    features.signature.input.labels[:] = ["$\\frac{", "$a$"]
    size_of(png(record(features, 5).whole(), "$x$"))


def test_features_of_very_different_ranges_are_each_scaled() -> None:
    from matplotlib.figure import Figure

    (section, *_) = sections_of(record(COUNTER, 10).whole())
    inputs, _ = section.panels
    assert inputs.note == "own ranges"
    ax = Figure().add_subplot()
    inputs.draw(ax)
    first, second = (np.asarray(line.get_ydata()) for line in ax.get_lines())
    np.testing.assert_allclose(first, np.linspace(0, 1, 10), atol=1e-6)
    np.testing.assert_allclose(second, np.linspace(1, 0, 10), atol=1e-5)


def test_nothing_of_matplotlib_is_changed_for_others() -> None:
    assert not hasattr(_gates_picture, "pyplot")
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    png(record(COUNTER, 3).whole(), "a title")
    assert dict(mpl.rcParams) == before
