"""Grafana's dashboards and how they get there."""

import itertools
import subprocess
import sys
from typing import Any, Final

import pytest

from tests.support.promql import DASHBOARDS, REPOSITORY, dashboards, load

EACH = pytest.mark.parametrize("dashboard", dashboards(), ids=lambda dashboard: dashboard["uid"])
GRAFANA: Final = load(REPOSITORY / "docker-compose.yml")["services"]["grafana"]
PROVISIONING: Final = REPOSITORY / "deploy" / "grafana" / "provisioning"
COLUMNS: Final = 24


def pictures(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def test_the_files_are_what_the_generator_writes() -> None:
    script = REPOSITORY / "scripts" / "dashboards.py"
    done = subprocess.run([sys.executable, str(script), "check"], timeout=60, check=False)
    assert done.returncode == 0


def test_the_dashboards_of_the_plan_are_there() -> None:
    assert {dashboard["uid"] for dashboard in dashboards()} == {
        "conveyor-overview", "conveyor-sessions", "conveyor-engine",
    }  # fmt: skip


@EACH
def test_no_panel_lies_on_another_or_beyond_the_edge(dashboard: dict[str, Any]) -> None:
    places = [panel["gridPos"] for panel in dashboard["panels"]]
    cells = [
        (x, y)
        for place in places
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert all(0 <= x < COLUMNS for x, _ in cells)
    numbers = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(numbers)) == len(numbers)


@EACH
def test_every_picture_is_explained_and_reads_the_provisioned_source(
    dashboard: dict[str, Any],
) -> None:
    (source,) = load(PROVISIONING / "datasources" / "prometheus.yml")["datasources"]
    for panel in pictures(dashboard):
        assert panel["description"].endswith("."), panel["title"]
        assert panel["targets"], panel["title"]
        for target in (panel, *panel["targets"]):
            assert target["datasource"] == {"type": source["type"], "uid": source["uid"]}


@EACH
def test_every_query_can_be_narrowed_to_one_server_or_one_model(dashboard: dict[str, Any]) -> None:
    variables = {each["name"] for each in dashboard["templating"]["list"]}
    assert variables == {"instance", "model"}
    targets = [panel["targets"] for panel in pictures(dashboard)]
    for target in itertools.chain.from_iterable(targets):
        narrowed = "$instance" in target["expr"] or "$model" in target["expr"]
        # How many answer, and which alerts fire, is asked of all.
        assert narrowed or "up{" in target["expr"] or "ALERTS{" in target["expr"]


def test_what_is_provisioned_is_mounted_where_grafana_looks() -> None:
    (provider,) = load(PROVISIONING / "dashboards" / "conveyor.yml")["providers"]
    mounts = {mount.split(":")[1]: mount.split(":")[0] for mount in GRAFANA["volumes"]}
    mounted = mounts[provider["options"]["path"]]
    assert (REPOSITORY / mounted).resolve() == DASHBOARDS.resolve()
    home = GRAFANA["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home.startswith(provider["options"]["path"])
    assert (DASHBOARDS / home.rpartition("/")[2]).exists()
    assert (REPOSITORY / mounts["/etc/grafana/provisioning"]).resolve() == PROVISIONING.resolve()


def test_the_source_is_the_composed_prometheus() -> None:
    (source,) = load(PROVISIONING / "datasources" / "prometheus.yml")["datasources"]
    port = load(REPOSITORY / "docker-compose.yml")["services"]["prometheus"]["ports"][0]
    assert source["url"] == f"http://prometheus:{port.rpartition(':')[2]}"
    scraped = load(REPOSITORY / "deploy" / "prometheus" / "prometheus.yml")["global"]
    assert source["jsonData"]["timeInterval"] == scraped["scrape_interval"]
