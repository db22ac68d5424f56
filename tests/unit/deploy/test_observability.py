"""Alert rules and dashboards: Prometheus takes every expression, and every metric and label in them exists."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from support.prometheus import tool

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[3]
ALERTS = ROOT / "deploy" / "prometheus" / "alerts.yaml"
DASHBOARDS = sorted((ROOT / "deploy" / "grafana").glob("*.json"))
SUFFIXES = {"histogram": ("_bucket", "_sum", "_count"), "summary": ("_sum", "_count")}
ALWAYS = {"job", "instance"}
NAME = re.compile(r"\b(?:vllm:|loraplex_|process_|python_|grpc_)\w+")
SELECTOR = re.compile(r"\b((?:vllm:|loraplex_|process_|python_|grpc_)\w+)\{([^}]*)\}")
VARIABLES = {"$__rate_interval": "5m", "$__range": "1h"}


def documented() -> dict[str, set[str]]:
    """Return each series' name -> its labels, as docs/metrics.md has them, which another test holds against the services."""
    series: dict[str, set[str]] = {}
    for line in (ROOT / "docs" / "metrics.md").read_text().splitlines():
        if not line.startswith("| `") or line.count("|") < 5:
            continue
        name, kind, labels, _ = (cell.strip() for cell in line.strip("|").split("|", 3))
        names = SUFFIXES.get(kind, ("",))
        for suffix in names:
            found = set(re.findall(r"`(\w+)`", labels)) | ALWAYS
            found |= {"model_name", "engine"} if name.startswith("`vllm:") else set()
            series.setdefault(name.strip("`") + suffix, set()).update(
                found | ({"le"} if suffix == "_bucket" else set())
            )
    return series


SERIES = documented()


def alerts() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]


def panels(path: Path) -> Iterator[dict[str, Any]]:
    for panel in json.loads(path.read_text())["panels"]:
        if panel["type"] != "row":
            yield panel


def expressions() -> dict[str, str]:
    """Return every expression by where it stands."""
    found = {f"alert {rule['alert']}": rule["expr"] for rule in alerts()}
    for path in DASHBOARDS:
        for panel in panels(path):
            for target in panel["targets"]:
                found[f"{path.stem}: {panel['title']} {target['refId']}"] = target["expr"]
    return found


def plain(expression: str) -> str:
    """Return an expression with Grafana's variables filled in."""
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    return re.sub(r"\$\w+", ".*", expression)


@pytest.mark.parametrize("where", expressions())
def test_every_metric_and_label_of_an_expression_exists(where: str) -> None:
    expression = expressions()[where]

    names = set(NAME.findall(expression))
    assert names, expression
    assert names <= set(SERIES), names - set(SERIES)
    for name, matchers in SELECTOR.findall(expression):
        used = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers))
        assert used <= SERIES[name], f"{name} has no {used - SERIES[name]}"
    known = set().union(*(SERIES[name] for name in names))
    grouped = re.findall(r"\bby \(([^)]*)\)", expression)
    assert {label.strip() for labels in grouped for label in labels.split(",")} <= known


def test_prometheus_takes_every_expression(tmp_path: Path) -> None:
    rules = [{"record": f"loraplex:n{n}", "expr": plain(text)} for n, text in enumerate(expressions().values())]
    queries = tmp_path / "rules.yaml"
    queries.write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": rules}]}))

    for path in (ALERTS, queries):
        result = subprocess.run(
            [tool("promtool"), "check", "rules", str(path)], capture_output=True, text=True, check=False, timeout=30
        )
        assert result.returncode == 0, result.stdout + result.stderr


def test_an_alert_says_what_is_wrong_and_how_bad_it_is() -> None:
    names = [rule["alert"] for rule in alerts()]

    assert len(set(names)) == len(names)
    for rule in alerts():
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert {"summary", "description"} <= set(rule["annotations"])
        label_names = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
        grouped = "".join(re.findall(r"by \(([^)]*)\)", rule["expr"]))
        is_raw = "by (" not in rule["expr"]
        assert is_raw or all(label in grouped for label in label_names), rule["alert"]


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_can_be_imported_as_it_is(path: Path) -> None:
    board = json.loads(path.read_text())

    assert board["uid"] == f"loraplex-{path.stem}"
    variables = {each["name"] for each in board["templating"]["list"]}
    text = json.dumps(board["panels"]) + "".join(each.get("definition", "") for each in board["templating"]["list"])
    used = set(re.findall(r"\$\{?(\w+)", text)) - {name.lstrip("$") for name in VARIABLES}
    assert used <= variables
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in board["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
    for panel in panels(path):
        assert panel["datasource"]["uid"] == "${datasource}"
        assert panel["targets"]
    for each in board["templating"]["list"]:
        assert set(NAME.findall(each.get("definition", ""))) <= set(SERIES)


def test_there_is_a_dashboard_for_service_engines_adapters_and_tenants() -> None:
    assert [path.stem for path in DASHBOARDS] == ["adapters", "engine", "service", "tenants"]
