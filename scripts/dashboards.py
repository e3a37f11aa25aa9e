"""Writes Grafana's dashboards from the panels of dashboard_panels.py.

    python scripts/dashboards.py generate    rewrite deploy/grafana/dashboards/*.json
    python scripts/dashboards.py check       fail where a file is not what is generated

Change a dashboard there, not in Grafana: the JSON is long, and its diffs say little.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from dashboard_panels import DASHBOARDS, Dashboard, Panel

FOLDER: Final = Path(__file__).resolve().parent.parent / "deploy" / "grafana" / "dashboards"
DATASOURCE: Final = {"type": "prometheus", "uid": "prometheus"}
COLUMNS: Final = 24
"""Of Grafana's grid."""
SCHEMA_VERSION: Final = 39


def files() -> dict[Path, str]:
    """What every file has to hold."""
    return {
        FOLDER / f"{dashboard.uid.removeprefix('conveyor-')}.json": json.dumps(
            dashboard_json(dashboard), indent=2
        )
        + "\n"
        for dashboard in DASHBOARDS
    }


def dashboard_json(dashboard: Dashboard) -> dict[str, Any]:
    """As Grafana reads it."""
    return {
        "uid": dashboard.uid,
        "title": dashboard.title,
        "description": dashboard.about,
        "tags": ["conveyor"],
        "editable": False,
        "schemaVersion": SCHEMA_VERSION,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "links": [_links()],
        "templating": {
            "list": [
                _variable("instance", 'label_values(up{job="conveyor"}, instance)'),
                _variable("model", "label_values(conveyor_slots, model)"),
            ]
        },
        "panels": list(_panels(dashboard)),
    }


def _panels(dashboard: Dashboard) -> Iterator[dict[str, Any]]:
    number, top = 0, 0
    for row in dashboard.rows:
        number += 1
        place = {"x": 0, "y": top, "w": COLUMNS, "h": 1}
        yield {"id": number, "type": "row", "title": row.title, "gridPos": place, "panels": []}
        top += 1
        left, height = 0, 0
        for panel in row.panels:
            if left + panel.columns > COLUMNS:
                left, top, height = 0, top + height, 0
            number += 1
            place = {"x": left, "y": top, "w": panel.columns, "h": panel.rows}
            yield _panel_json(panel, number, place)
            left, height = left + panel.columns, max(height, panel.rows)
        top += height


def _panel_json(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    custom: dict[str, Any] = {}
    options: dict[str, Any] = {}
    if panel.kind == "timeseries":
        custom = {
            "fillOpacity": 30 if panel.stacked else 0,
            "showPoints": "never",
            "stacking": {"mode": "normal" if panel.stacked else "none"},
        }
        options = {
            "legend": {"displayMode": "list", "placement": "bottom"},
            "tooltip": {"mode": "multi", "sort": "desc"},
        }
    elif panel.kind == "heatmap":
        options = {"calculate": False, "yAxis": {"unit": panel.unit}}
    else:
        options = {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "value"}
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.about,
        "datasource": DATASOURCE,
        "gridPos": place,
        "fieldConfig": {
            "defaults": {"unit": panel.unit, "min": 0, "custom": custom},
            "overrides": [],
        },
        "options": options,
        "targets": [
            {
                "refId": chr(ord("A") + position),
                "datasource": DATASOURCE,
                "expr": query,
                "legendFormat": legend,
                "format": "heatmap" if panel.kind == "heatmap" else "time_series",
            }
            for position, (query, legend) in enumerate(panel.queries)
        ],
    }


def _variable(name: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "type": "query",
        "datasource": DATASOURCE,
        "query": query,
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def _links() -> dict[str, Any]:
    return {
        "type": "dashboards",
        "title": "Conveyor",
        "tags": ["conveyor"],
        "asDropdown": False,
        "keepTime": True,
        "includeVars": True,
    }


def main(action: str) -> None:
    """Carries out the action; exits with a message where `check` finds a difference."""
    wanted = files()
    if action == "generate":
        for file, text in wanted.items():
            file.write_text(text, encoding="utf-8")
        return
    there = {file: file.read_text(encoding="utf-8") for file in FOLDER.glob("*.json")}
    changed = [file.name for file in wanted | there if wanted.get(file) != there.get(file)]
    if changed:
        sys.exit(f"not what scripts/dashboards.py generates: {', '.join(sorted(changed))}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("action", choices=["generate", "check"])
    main(parser.parse_args().action)
