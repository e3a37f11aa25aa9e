"""What the pages say of model.toml, tensors, sizes, traces and refusals is what the code does."""

from __future__ import annotations

import math
import re
import tomllib
from pathlib import Path
from typing import Any, Final

import pytest

from conveyor_models import ModelSpec, SpecError, parse_spec, scan
from conveyor_models.layers import KNOWN_CELLS
from tests.unit.docs.markdown import DOCS, REPOSITORY, Block, Rows, blocks, code, pages, tables

FAMILIES: Final = DOCS / "families"
BUNDLES: Final = [
    block for page in pages() for block in blocks(page, "toml") if "schema =" in block.text
]
IN_FULL: Final = [block for block in BUNDLES if block.page.parent == FAMILIES]
SHOWN: Final = re.compile(r"`([\d,]+ parameters, [\d,]+ bytes of carry for each session)`")
REFUSED: Final = [
    (page, row)
    for page in sorted(FAMILIES.glob("*.md"))
    for table in tables(page)
    if table.header == ["model.toml says", "answer"]
    for row in table.body
]


def _following(block: Block, *header: str) -> Rows:
    """The table with that header, after the block and before the next one."""
    after = [other.line for other in BUNDLES if other.page == block.page]
    end = min((line for line in after if line > block.line), default=10**9)
    for table in tables(block.page):
        if block.line < table.line < end and table.header[: len(header)] == list(header):
            return table
    raise AssertionError(f"{block}: no table {header} follows")


def test_there_is_a_page_for_every_family() -> None:
    specs = [parse_spec(block.text) for block in IN_FULL]
    assert {layer.cell for spec in specs for layer in spec.layers} == set(KNOWN_CELLS)
    assert any(spec.attention for spec in specs)
    for name in ("rnn", "lstm", "peepholes", "coupled", "gru", "attention", "networks"):
        assert (FAMILIES / f"{name}.md").exists()


@pytest.mark.parametrize("block", BUNDLES, ids=str)
def test_every_model_toml_is_a_model(block: Block) -> None:
    parse_spec(block.text, source=block.page)


@pytest.mark.parametrize("block", IN_FULL, ids=str)
def test_the_tensors_listed_are_those_of_the_model(block: Block) -> None:
    listed = {
        code(name): tuple(int(size) for size in shape.strip("[]").split(","))
        for name, shape, *_ in _following(block, "tensor", "shape").body
    }
    assert listed == parse_spec(block.text).weight_shapes


@pytest.mark.parametrize("block", IN_FULL, ids=str)
def test_sizes_and_traces_are_those_of_the_model(block: Block) -> None:
    spec = parse_spec(block.text)
    if not spec.streamable:  # it has no session, so neither carry nor trace
        return
    traced = {int(row[0]): row[1].split(", ") for row in _following(block, "layer", "traced").body}
    assert traced == {number: list(layer.traced) for number, layer in enumerate(spec.layers)}
    said = SHOWN.findall(block.page.read_text(encoding="utf-8"))
    assert said == [
        f"{spec.weight_values:,} parameters,"
        f" {4 * spec.carry_values:,} bytes of carry for each session"
    ]


def test_the_overview_lists_the_blocks_of_weights() -> None:
    overview = next(tables(FAMILIES / "index.md"))
    by_cell: dict[str, ModelSpec] = {
        block.page.stem: parse_spec(block.text) for block in reversed(IN_FULL)
    }
    for page, says, carry, gates in overview.body[:-1]:
        name = page.partition("(")[2].removesuffix(".md)")
        layer = by_cell[name].layers[0]
        assert code(says) == f'cell = "{layer.cell}"'
        assert carry == ", ".join(layer.carry_names)
        assert gates.split(", and ")[0] == ", ".join(layer.gates)


@pytest.mark.parametrize(("page", "row"), REFUSED, ids=lambda value: getattr(value, "stem", None))
def test_what_is_refused_is_refused_in_these_words(page: Path, row: list[str]) -> None:
    values = tomllib.loads(blocks(page, "toml")[0].text)
    _change(values, tomllib.loads(code(row[0])))
    with pytest.raises(SpecError) as raised:
        parse_spec(_to_toml(values))
    assert code(row[1]) in str(raised.value)


def _change(values: Any, change: dict[str, Any]) -> None:
    """Sets what ``layers.0.size = 1`` says, where 0 counts the layers."""
    for key, value in change.items():
        place: Any = int(key) if isinstance(values, list) else key
        if isinstance(value, dict) and (isinstance(values, list) or place in values):
            _change(values[place], value)
        else:
            values[place] = value


def _to_toml(values: dict[str, Any]) -> str:
    """Tables of plain values, and the list of layers."""
    lines: list[str] = []
    for name, value in values.items():
        for table in [value] if isinstance(value, dict) else value if name == "layers" else []:
            lines += [f"[[{name}]]" if name == "layers" else f"[{name}]"]
            lines += [f"{key} = {_text(each)}" for key, each in table.items()]
        if not isinstance(value, dict) and name != "layers":
            lines.insert(0, f"{name} = {_text(value)}")
    return "\n".join(lines)


def _text(value: Any) -> str:
    # Python writes these few kinds as TOML does, but for booleans.
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _symbols(spec: ModelSpec, name: str) -> dict[str, int]:
    """What the letters of the guide mean for one tensor."""
    top = spec.layers[-1].output_size
    known = {"V": spec.input.size, "top": top, "R": spec.head_input_size, "O": spec.output_size}
    if spec.embedding is not None:
        known["E"] = spec.embedding.size
    if spec.attention is not None:
        known |= {"A": spec.attention.memory_size, "S": spec.attention.size}
    if name.startswith("layers."):
        number = int(name.split(".")[1])
        layer = spec.layers[number]
        known |= {"G": len(layer.gates), "H": layer.size, "P": layer.hidden_size}
        known["I"] = spec.layer_input_sizes[number]
    return known


@pytest.mark.parametrize("block", BUNDLES, ids=str)
def test_the_guide_tells_the_shape_of_every_tensor(block: Block) -> None:
    spec = parse_spec(block.text)
    guide = next(t for t in tables(DOCS / "guides" / "bundles.md") if t.header[0] == "tensor")
    written = {code(row[0]): row[1].strip("[]") for row in guide.body}
    for name, shape in spec.weight_shapes.items():
        symbols = _symbols(spec, name)
        general = re.sub(r"^layers\.\d+\.(reverse\.)?", "layers.K.", name)
        sizes = [
            math.prod(symbols.get(factor) or int(factor) for factor in size.split(" x "))
            for size in written[general].split(", ")
        ]
        assert tuple(sizes) == shape, name


SNIPPETS: Final = blocks(DOCS / "guides" / "bundles.md", "python")


@pytest.mark.parametrize("block", SNIPPETS, ids=str)
def test_code_on_the_pages_runs(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").symlink_to(REPOSITORY / "models")
    monkeypatch.chdir(tmp_path)
    exec(compile(block.text, str(block), "exec"), {"__name__": "__main__"})
    assert block.text.count("save_bundle(") == len(_made(tmp_path))


def _made(folder: Path) -> list[Path]:
    """Bundles that a snippet wrote, each of them sound."""
    made = folder / "my-models"
    if not made.exists():
        return []
    listing = scan(made)
    assert listing.problems == ()
    return [found.path for found in listing.bundles]
