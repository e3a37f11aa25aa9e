"""The guides for operators say of errors, settings and sizes what the server does."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import grpc
import pytest

from conveyor.v1 import errors_pb2
from conveyor_models import Bundle, load_bundle
from conveyor_server import errors
from conveyor_server.config import Config
from conveyor_server.engine.packing import padded
from conveyor_server.rpc.status import code_of
from conveyor_server.sessions.held import ENTRY_BYTES
from conveyor_server.store.checkpoint import Checkpoint, Header, encode
from tests.unit.docs.markdown import CODE, DOCS, REPOSITORY, code, pages, tables

ERRORS: Final = DOCS / "guides" / "errors.md"
GUIDES: Final = sorted((DOCS / "guides").glob("*.md"))
OPERATIONS: Final = DOCS / "guides" / "operations.md"
SETTING: Final = re.compile(r"(?:listen|models|engine|limits|auth|shutdown|log)\.[a-z_]+\*?")
REASONS: Final = [
    name.removeprefix("ERROR_REASON_")
    for name in errors_pb2.ErrorReason.DESCRIPTOR.values_by_name
    if name != "ERROR_REASON_UNSPECIFIED"
]


ROWS: Final = [row for table in tables(ERRORS) for row in table.body]


def _leaves(kind: type[errors.ConveyorError]) -> Iterator[type[errors.ConveyorError]]:
    if "reason" in vars(kind):
        yield kind
    for each in kind.__subclasses__():
        yield from _leaves(each)


def test_every_reason_of_the_contract_is_explained_once() -> None:
    assert sorted(code(row[0]) for row in ROWS) == sorted(REASONS)
    assert all(all(row[3:]) for row in ROWS), "something to say to both sides"


def test_a_reason_that_is_named_anywhere_exists() -> None:
    families = {reason.partition("_")[0] for reason in REASONS if "_" in reason}
    known = {*REASONS, *(code.name for code in grpc.StatusCode)}
    named = {
        span
        for page in pages()
        for span in CODE.findall(page.read_text(encoding="utf-8"))
        if re.fullmatch(r"[A-Z]+(_[A-Z]+)+", span) and span.partition("_")[0] in families
    }
    assert len(named) >= len(REASONS) // 2
    assert named <= known


@pytest.mark.parametrize("row", ROWS, ids=lambda row: code(row[0]))
def test_status_and_wait_are_those_that_are_sent(row: list[str]) -> None:
    kind = next(each for each in _leaves(errors.ConveyorError) if each.reason == code(row[0]))
    error = kind.__new__(kind)  # the arguments differ from class to class and do not matter
    assert row[1] == code_of(error).name
    wait = kind.retry_after_seconds
    assert row[2] == ("" if wait is None else f"{wait:g} s")


def _settings() -> dict[str, object]:
    return {
        f"{section}.{key}": value
        for section, values in Config().model_dump().items()
        for key, value in values.items()
    }


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
def test_every_setting_that_is_named_exists(page: Path) -> None:
    known = _settings()
    for span in CODE.findall(page.read_text(encoding="utf-8")):
        if span.endswith("*") and SETTING.fullmatch(span):
            assert any(name.startswith(span[:-1]) for name in known), span
        elif SETTING.fullmatch(span):
            assert span in known, span


def test_defaults_are_those_of_the_server() -> None:
    known = _settings()
    listed = [
        row
        for table in tables(OPERATIONS)
        if table.header[:2] == ["setting", "default"]
        for row in table.body
    ]
    assert len(listed) > 20
    for name, default, *_ in listed:
        value = known[code(name)]
        said = default.replace(",", "").replace(" s", "")
        assert isinstance(value, int | float)
        sizes = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
        number, _, unit = said.partition(" ")
        assert float(number) * sizes.get(unit, 1) == value, name


MIB: Final = 2**20
SESSIONS: Final = 20_000
SLOTS: Final = 4_096


@pytest.fixture(scope="module")
def letters() -> Bundle:
    return load_bundle(REPOSITORY / "models" / "zoo" / "letters")


def _slot_bytes(bundle: Bundle) -> int:
    parts = (size for shapes in bundle.spec.carry_shapes for (size,) in shapes.values())
    return 4 * sum(padded(size) for size in parts)


def test_the_worked_example_of_memory(letters: Bundle) -> None:
    spec, limits = letters.spec, Config().limits
    carry = 4 * spec.carry_values
    text = OPERATIONS.read_text(encoding="utf-8")
    assert f"# {spec.weight_values:,} parameters, {carry:,} bytes of carry" in text
    step = 4 * (spec.input_size + spec.output_size)
    assert f"are {step} bytes a step" in text
    assert f"hold {limits.held_results_bytes_max // (step + ENTRY_BYTES)} steps" in text
    whole = SESSIONS * limits.held_results_bytes_max
    assert f"would hold {whole / 2**30:.1f} GiB" in text
    assert f"they take {SESSIONS * 16 * (step + ENTRY_BYTES) / MIB:.1f} MiB," in text
    reckoned = {
        row[0]: row[2]
        for table in tables(OPERATIONS)
        if table.header == ["what", "reckoned", "MiB"]
        for row in table.body
    }
    assert {
        name: f"{size / MIB:.1f}"
        for name, size in {
            "state pool": (SLOTS + 1) * _slot_bytes(letters),
            "paged out": (SESSIONS - SLOTS) * (carry + 300),
            "held results": limits.held_results_total_bytes_max,
            "weights": 4 * spec.weight_values,
        }.items()
    } == reckoned


def test_the_slot_of_a_size_that_is_rounded_up() -> None:
    temperature = load_bundle(REPOSITORY / "models" / "zoo" / "temperature")
    said = f"has {4 * temperature.spec.carry_values} bytes and a slot {_slot_bytes(temperature)}"
    assert said in " ".join(OPERATIONS.read_text(encoding="utf-8").split())


def test_a_record_is_about_300_bytes_longer_than_its_carry(letters: Bundle) -> None:
    carry = bytes(4 * letters.spec.carry_values)
    header = Header(
        session_id="0" * 32,
        principal="anonymous",
        model=letters.spec.name,
        version=1,
        model_digest=letters.digest,
        epoch=1,
        step=1_000,
        carry_bytes=len(carry),
    )
    assert len(encode(Checkpoint(header, carry))) - len(carry) == pytest.approx(300, abs=20)


def test_the_worked_example_of_throughput_quotes_the_figures_that_were_measured() -> None:
    measured = (DOCS / "PERFORMANCE.md").read_text(encoding="utf-8")
    text = " ".join(OPERATIONS.read_text(encoding="utf-8").split())
    assert "| 256 streams, 1 step a frame | 12,546 |" in measured
    assert "| 1 stream of 256 sessions, 1 step each | 52,992 |" in measured
    assert f"made 12,546 steps a second: a share of {5_000 / 12_546:.2f}" in text
    assert f"made 52,992: a share of {5_000 / 52_992:.2f}" in text
