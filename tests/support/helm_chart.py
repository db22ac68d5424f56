"""The Helm chart, rendered for sets of values."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, Final

import helm_python as helm
import yaml

CHART: Final = Path(__file__).parents[2] / "deploy/helm/loraplex"
SETS: Final = sorted(each.name for each in (CHART / "ci").glob("*.yaml"))
LEAST: Final[dict[str, dict[str, Any]]] = {
    "model": {"path": "llama", "volume": {"persistentVolumeClaim": {"claimName": "models"}}},
    "valkey": {"external": {"host": "valkey.example"}},
}
"""The values without which nothing is rendered."""
WORKLOADS: Final = ("Deployment", "StatefulSet", "LeaderWorkerSet")

Resource = dict[str, Any]


def values_of(name: str) -> dict[str, Any]:
    """Return a set of values below ``ci/``."""
    loaded: dict[str, Any] = yaml.safe_load((CHART / "ci" / name).read_text())
    return loaded


def render(values: dict[str, Any]) -> list[Resource]:
    """Return the chart's resources as the release ``loraplex`` in the namespace ``serving``.

    Raises:
        HelmError: If the chart refuses the values.
    """
    with helm.Chart.load(CHART) as chart:
        files = chart.render(values, name="loraplex", namespace="serving")
    return [
        each
        for path, text in files.items()
        if not path.endswith("NOTES.txt")
        for each in yaml.safe_load_all(text)
        if each is not None
    ]


@cache
def rendered(name: str) -> list[Resource]:
    """Return the resources of a set of values below ``ci/``."""
    return render(values_of(name))


def pod_of(workload: Resource) -> Resource:
    """Return the pod template of a workload."""
    spec = workload["spec"]
    template: Resource = (
        spec["leaderWorkerTemplate"]["workerTemplate"] if workload["kind"] == "LeaderWorkerSet" else spec["template"]
    )
    return template


def pods(resources: list[Resource]) -> dict[str, Resource]:
    """Return the pod templates by the names of their workloads."""
    return {each["metadata"]["name"]: pod_of(each) for each in resources if each["kind"] in WORKLOADS}


def of_kind(resources: list[Resource], kind: str) -> dict[str, Resource]:
    """Return the resources of one kind by their names."""
    return {each["metadata"]["name"]: each for each in resources if each["kind"] == kind}


def part_of(labels: dict[str, str]) -> str:
    """Return the part of the stack that labels name: gateway, store, engine or valkey."""
    return labels["app.kubernetes.io/component"]
