"""Prometheus' rules: without promtool, which `scripts/rules.py check` runs where there is one."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest

from conveyor_server.app import SERVER_LIMITS
from conveyor_server.errors import reasons
from tests.support.promql import REPOSITORY, Query, load, queries, rules, selectors

ALERTS: Final = [rule for rule in rules() if "alert" in rule]
RECORDED: Final = [rule for rule in rules() if "record" in rule]
UNIT_TESTS: Final = REPOSITORY / "deploy" / "prometheus" / "tests" / "alerts.yml"
EACH_ALERT = pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])


def headings(file: Path) -> list[str]:
    return re.findall(r"^## (.+)$", file.read_text(), re.MULTILINE)


def anchor(heading: str) -> str:
    """As GitHub and mkdocs make it of a heading of one word."""
    return heading.lower()


def run_script(*arguments: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(REPOSITORY / "scripts" / "rules.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=None if path is None else {"PATH": path},
    )


@pytest.mark.parametrize("query", queries(), ids=str)
def test_every_query_of_rules_and_dashboards_is_promql(query: Query) -> None:
    assert selectors(query) or query.text == "vector(0)"


def test_what_is_not_promql_is_refused() -> None:
    with pytest.raises(ValueError, match="unclosed"):
        selectors(Query("here", "sum by (model (rate(conveyor_steps_total[1m]))"))


@EACH_ALERT
def test_every_alert_leads_to_what_to_do(alert: dict[str, Any]) -> None:
    assert set(alert["annotations"]) == {"summary", "runbook"}
    page, _, target = alert["annotations"]["runbook"].partition("#")
    assert page == "docs/guides/alerts.md"
    assert target == anchor(alert["alert"])
    assert target in [anchor(heading) for heading in headings(REPOSITORY / page)]


def test_nothing_is_explained_that_is_no_alert() -> None:
    names = [alert["alert"] for alert in ALERTS]
    assert headings(REPOSITORY / "docs" / "guides" / "alerts.md") == names
    assert len(set(names)) == len(names)


@EACH_ALERT
def test_every_alert_says_how_bad_it_is(alert: dict[str, Any]) -> None:
    assert alert["labels"] in ({"severity": "critical"}, {"severity": "warning"})


@EACH_ALERT
def test_every_alert_has_a_unit_test_in_which_it_fires(alert: dict[str, Any]) -> None:
    tested = [each for test in load(UNIT_TESTS)["tests"] for each in test["alert_rule_test"]]
    fires = {each["alertname"] for each in tested if each.get("exp_alerts")}
    assert alert["alert"] in fires


@EACH_ALERT
def test_every_reason_is_one_of_the_contract(alert: dict[str, Any]) -> None:
    known = {*reasons(), "closed", "expired", "evicted"}
    for selector in selectors(Query(alert["alert"], alert["expr"])):
        for label, value in selector.labels:
            if label == "reason":
                assert set(value.split("|")) <= known, value


def test_every_limit_is_exported() -> None:
    (near,) = [alert for alert in ALERTS if alert["alert"] == "ConveyorNearLimit"]
    named = set(re.findall(r'"setting", "(\w+)"', near["expr"].replace("\n", " ")))
    assert named == set(SERVER_LIMITS) - {"held_results_total_bytes_max"}


@pytest.mark.parametrize("rule", RECORDED, ids=lambda rule: rule["record"])
def test_a_recorded_series_says_level_metric_and_operation(rule: dict[str, Any]) -> None:
    level, metric, operation = rule["record"].split(":")
    assert re.search(rf"by \({level}[,)]", rule["expr"])
    assert any(each.metric.startswith(metric) for each in selectors(Query("", rule["expr"])))
    assert operation


def test_the_rules_are_sound_to_promtool_where_it_is_installed() -> None:
    done = run_script("check")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "sound" in done.stdout or "promtool is not installed" in done.stdout


def test_without_promtool_it_is_said_and_can_be_insisted_on(tmp_path: Path) -> None:
    done = run_script("check", path=str(tmp_path))
    assert done.returncode == 0
    assert "not installed" in done.stdout
    done = run_script("check", "--require", path=str(tmp_path))
    assert done.returncode == 1
    assert "not installed" in done.stderr
