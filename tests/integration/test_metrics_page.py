"""A running server's metrics against what is said of them and what is made of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import numpy.typing as npt
import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from tests.integration.process import ServerProcess
from tests.integration.wire import Wire, refused
from tests.support.promql import REPOSITORY, Query, queries, rules, selectors

PAGE: Final = REPOSITORY / "docs" / "METRICS.md"
BY_PROMETHEUS: Final = {"up", "ALERTS"}
"""What Prometheus itself makes, of every target and of every alert."""
ADDED_BY_A_SCRAPE: Final = {"job", "instance"}
Rows = Callable[..., npt.NDArray[Any]]


class Described(NamedTuple):
    kind: str
    unit: str
    labels: set[str]
    meaning: str


def described() -> dict[str, Described]:
    """The rows of the tables with five columns."""
    found: dict[str, Described] = {}
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 5 and cells[0].startswith("`"):
            name, kind, unit, labels, meaning = cells
            assert name.strip("`") not in found, name
            listed = set(filter(None, re.split(r",\s*", labels)))
            found[name.strip("`")] = Described(kind, unit, listed, meaning)
    return found


def described_records() -> set[str]:
    return set(re.findall(r"^\| `(\w+:\w+:\w+)` \|", PAGE.read_text(), re.MULTILINE))


def name_of(family: Metric) -> str:
    return family.name + ("_total" if family.type == "counter" else "")


def series_of(name: str, kind: str) -> set[str]:
    if kind == "histogram":
        return {f"{name}_bucket", f"{name}_sum", f"{name}_count"}
    return {name}


@pytest.fixture
async def families(wire: Wire, server: ServerProcess, rows: Rows) -> dict[str, Metric]:
    """What the server exports once it has done something, by name."""
    session_id = await wire.new_session("tiny")
    await wire.step(session_id, 1, rows(3))
    await refused(wire.step(session_id, 9, rows(3)))
    await wire.open("tiny", session_id=session_id)
    await wire.close(session_id)
    return {name_of(family): family for family in text_string_to_metric_families(server.scrape())}


async def test_every_metric_is_described_and_every_described_one_exported(
    families: dict[str, Metric],
) -> None:
    assert set(described()) == set(families)


async def test_type_and_labels_are_as_described(families: dict[str, Metric]) -> None:
    for name, (kind, unit, labels, meaning) in described().items():
        assert families[name].type == kind, name
        assert unit, name
        assert meaning, name
        for sample in families[name].samples:
            assert set(sample.labels) - {"le"} == labels, name


async def test_the_described_unit_is_the_one_in_the_name(families: dict[str, Metric]) -> None:
    for name, metric in described().items():
        for unit in ("seconds", "bytes"):
            assert (unit in name.split("_")) == (metric.unit == unit), name
    assert families


@pytest.mark.parametrize("query", queries(), ids=str)
async def test_what_a_query_names_is_exported(query: Query, families: dict[str, Metric]) -> None:
    exported = {
        series: described()[name].labels | ({"le"} if series.endswith("_bucket") else set())
        for name, family in families.items()
        for series in series_of(name, family.type)
    }
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    for selector in selectors(query):
        assert selector.metric in exported.keys() | recorded | BY_PROMETHEUS
        if selector.metric in exported:
            chosen_by = {label for label, _ in selector.labels}
            assert chosen_by <= exported[selector.metric] | ADDED_BY_A_SCRAPE


def test_every_recorded_series_is_described_and_the_other_way_round() -> None:
    assert described_records() == {rule["record"] for rule in rules() if "record" in rule}


async def test_a_reason_that_was_never_given_is_there_with_0(server: ServerProcess) -> None:
    assert 'conveyor_rejected_total{reason="STORE_LOST_WRITES"} 0.0' in server.scrape()
    assert 'conveyor_sessions_ended_total{reason="evicted"} 0.0' in server.scrape()


async def test_limits_and_what_runs_are_told(server: ServerProcess) -> None:
    assert server.metric("conveyor_limit", setting="sessions_max") == 100_000
    assert server.metric("conveyor_limit", setting="streams_max") == 4_096
    assert server.metric("conveyor_info", device="cpu") == 1
