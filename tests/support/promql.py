"""The queries of the shipped rules and dashboards, and what they name."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import promql_parser
import yaml

REPOSITORY: Final = Path(__file__).parents[2]
RULES: Final = REPOSITORY / "deploy" / "prometheus" / "rules"
DASHBOARDS: Final = REPOSITORY / "deploy" / "grafana" / "dashboards"


@dataclass(frozen=True)
class Query:
    where: str
    text: str

    def __str__(self) -> str:
        return self.where


@dataclass(frozen=True)
class Selector:
    """What a query reads: a metric, and the labels it is chosen by with what they are held to."""

    metric: str
    labels: tuple[tuple[str, str], ...]


def rules() -> list[dict[str, Any]]:
    groups = [group for file in sorted(RULES.glob("*.yml")) for group in load(file)["groups"]]
    return [rule for group in groups for rule in group["rules"]]


def dashboards() -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted(DASHBOARDS.glob("*.json"))]


def load(file: Path) -> Any:
    return yaml.safe_load(file.read_text())


def queries() -> list[Query]:
    found = [Query(rule.get("record") or rule["alert"], rule["expr"]) for rule in rules()]
    for dashboard in dashboards():
        for panel in dashboard["panels"]:
            for target in panel.get("targets", ()):
                where = f"{dashboard['uid']}: {panel['title']}: {target['refId']}"
                found.append(Query(where, target["expr"].replace("$__rate_interval", "1m")))
    return found


def selectors(query: Query) -> list[Selector]:
    """Raises ValueError where the query is not PromQL."""
    return list(_selectors(promql_parser.parse(query.text)))


def _selectors(expression: Any) -> Iterator[Selector]:
    found: list[Any] = []

    def visit(node: Any) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            found.append(node)
        elif isinstance(node, promql_parser.MatrixSelector):
            found.append(node.vector_selector)

    promql_parser.walk(expression, visit)
    for selector in {str(each): each for each in found}.values():
        matchers = selector.matchers.matchers
        yield Selector(selector.name, tuple((each.name, each.value) for each in matchers))
