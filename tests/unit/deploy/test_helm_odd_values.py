"""Values at the edge of what the chart takes: refused by name, or rendered as the services read them."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import helm_python as helm
import pytest
import yaml
from support.helm_chart import CHART, LEAST, of_kind, pods, render, values_of


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    result = deepcopy(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else value
    return result


SECTIONS = (
    "image",
    "model.hub",
    "credentials",
    "valkey.external",
    "gateway",
    "gateway.pod",
    "store",
    "engineDefaults",
    "networkPolicies.admins",
    "networkPolicies.egress",
    "monitoring.dashboards.labels",
    "tracing",
    "keda",
)


@pytest.mark.parametrize("path", SECTIONS)
def test_a_section_that_is_null_is_refused_by_its_name(path: str) -> None:
    changes: dict[str, Any] | None = None
    for word in reversed(path.split(".")):
        changes = {word: changes}

    with pytest.raises(helm.HelmError, match=rf"{path} is null: leave it out"):
        render(merged(LEAST, changes or {}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gateway": {"options": {"port": 9}}}, r"gateway\.options\.port is the chart's own"),
        ({"store": {"options": {"redis-url": "redis://a"}}}, r"store\.options\.redis-url is the chart's own"),
        ({"engines": {"a": {"options": {"device": "cpu"}}}}, r"engines\.a\.options\.device is the chart's own"),
        ({"gateway": {"pod": {"labels": {"app.kubernetes.io/name": "x"}}}}, "choose another label"),
        ({"engines": {"a": {"pod": {"labels": {"loraplex/engines": "x"}}}}}, "choose another label"),
        ({"gateway": {"service": {"grpcPort": 8501}}}, "are equal"),
        ({"gateway": {"podDisruptionBudget": {"maxUnavailable": "x"}}}, "maxUnavailable"),
        ({"engines": {"a": {"autoscaling": {"enabled": True, "minReplicas": 5}}}}, "is more than maxReplicas 4"),
        ({"credentials": {"secrets": {"engine": ""}}}, r"credentials\.secrets\.engine is empty"),
        ({"engines": {"a": {"autoscaling": {"queueTokens": 1e19}}}}, "queueTokens"),
        ({"model": {"path": "../llama"}}, "model/path"),
        ({"model": {"path": "a: b"}}, "model/path"),
        ({"model": {"aliases": ["a,b"]}}, "model/aliases"),
        ({"valkey": {"external": {"host": "valkey.example:6379"}}}, "valkey/external/host"),
        ({"tracing": {"endpoint": "http://otel:99999"}}, "beyond 65535"),
        ({"monitoring": {"interval": "often"}}, "monitoring/interval"),
        ({"extraEnv": ["TZ=UTC"]}, "extraEnv"),
        ({"networkPolicies": {"egressPorts": []}}, "egressPorts"),
        ({"networkPolicies": {"egressPorts": [0]}}, "egressPorts"),
    ],
)
def test_what_would_break_a_pod_later_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(helm.HelmError, match=message):
        render(merged(LEAST, changes))


def test_large_numbers_reach_services_as_whole_numbers() -> None:
    changes = {
        "gateway": {"options": {"max-queued-requests": 2000000}},
        "engines": {"a": {"poolBytes": 64424509440, "autoscaling": {"enabled": True, "queueTokens": 3000000}}},
    }

    resources = render(merged(LEAST, changes))

    found = pods(resources)
    (gateway,) = found["loraplex-gateway"]["spec"]["containers"]
    (engine,) = found["loraplex-engine-a"]["spec"]["containers"]
    assert gateway["args"] == ["--max-queued-requests=2000000"]
    assert {"name": "LORAPLEX_ENGINE_POOL_BYTES", "value": "64424509440"} in engine["env"]
    (scaled,) = of_kind(resources, "ScaledObject").values()
    assert scaled["spec"]["triggers"][0]["metadata"]["queueTokens"] == "3000000"


def test_a_store_reaches_object_storage_on_a_port_of_its_own_and_a_gateway_does_not() -> None:
    bucket = [{"ipBlock": {"cidr": "10.0.0.9/32"}}]
    changes = {"networkPolicies": {"egress": bucket, "egressPorts": [443, 9000]}}

    policies = of_kind(render(merged(LEAST, changes)), "NetworkPolicy")

    rule = {"ports": [{"port": 443}, {"port": 9000}], "to": bucket}
    assert rule in policies["loraplex-store"]["spec"]["egress"]
    assert rule not in policies["loraplex-gateway"]["spec"]["egress"]


@pytest.mark.parametrize("release", ["loraplex", "my-loraplex", "1a", "a.b", "a" * 53])
def test_names_fit_kubernetes_whatever_the_release_is_called(release: str) -> None:
    engines: dict[str, Any] = {"engines": {"e" * 20: {}}}
    with helm.Chart.load(CHART) as chart:
        files = chart.render(merged(values_of("own-valkey.yaml"), engines), name=release, namespace="serving")
    names = [
        each["metadata"]["name"]
        for path, text in files.items()
        if path.endswith(".yaml")
        for each in yaml.safe_load_all(text)
        if each
    ]

    assert len(names) > 10
    for name in names:
        assert "." not in name
        assert len(name) <= 63
