"""The chart's autoscaling: KEDA is sent to the gateways, in the way that they let it in."""

from __future__ import annotations

from typing import Any

import helm_python as helm
import pytest
from loraplex_gateway.scaling.settings import ScalerSettings
from support.helm_chart import LEAST, SETS, of_kind, pods, render, rendered

SCALED = {"enabled": True}


def scaled(changes: dict[str, Any], **gateway: Any) -> list[dict[str, Any]]:
    return render(LEAST | {"gateway": gateway, "engines": {"a": {"autoscaling": SCALED | changes}}})


def trigger_of(resources: list[dict[str, Any]], name: str) -> dict[str, Any]:
    trigger: dict[str, Any] = of_kind(resources, "ScaledObject")[name]["spec"]["triggers"][0]
    return trigger


def ports_for(resources: list[dict[str, Any]], namespace: str) -> set[int]:
    """Return the gateways' ports that the namespace's pods reach by a rule of their own."""
    peer = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}}}
    rules = of_kind(resources, "NetworkPolicy")["loraplex-gateway"]["spec"]["ingress"]
    return {port["port"] for rule in rules if peer in rule.get("from", []) for port in rule["ports"]}


@pytest.mark.parametrize("name", SETS)
def test_a_scaled_object_is_of_a_workload_that_leaves_its_replicas_to_it(name: str) -> None:
    resources = rendered(name)

    for each in of_kind(resources, "ScaledObject").values():
        target = each["spec"]["scaleTargetRef"]
        workload = of_kind(resources, target["kind"])[target["name"]]
        assert workload["apiVersion"] == target["apiVersion"]
        assert "replicas" not in workload["spec"]


def test_the_gateways_read_what_their_trigger_says() -> None:
    trigger = trigger_of(rendered("from-zero.yaml"), "loraplex-engine-ranks")

    assert trigger["type"] == "external"
    assert ScalerSettings.read(trigger["metadata"]) == ScalerSettings(
        model="gemma", queue_tokens=4096.0, page_usage=0.9
    )
    service = of_kind(rendered("from-zero.yaml"), "Service")["loraplex-gateway"]
    assert trigger["metadata"]["scalerAddress"] == f"loraplex-gateway.serving.svc:{service['spec']['ports'][0]['port']}"


def test_from_zero_the_gateways_wait_for_the_first_engine() -> None:
    resources = rendered("from-zero.yaml")

    assert of_kind(resources, "ScaledObject")["loraplex-engine-ranks"]["spec"]["minReplicaCount"] == 0
    environ = {
        each["name"]: each.get("value") for each in pods(resources)["loraplex-gateway"]["spec"]["containers"][0]["env"]
    }
    assert environ["LORAPLEX_GATEWAY_SCALE_FROM_ZERO_S"] == "600"


def test_tensor_parallel_ranks_are_processes_of_one_pod_of_a_leader_worker_set() -> None:
    resources = rendered("from-zero.yaml")
    engine = of_kind(resources, "LeaderWorkerSet")["loraplex-engine-ranks"]["spec"]["leaderWorkerTemplate"]

    (container,) = engine["workerTemplate"]["spec"]["containers"]
    assert engine["size"] == 1
    assert {"name": "LORAPLEX_ENGINE_TENSOR_PARALLEL", "value": "2"} in container["env"]


def test_a_gateway_that_asks_for_certificates_is_shown_one_and_keda_reaches_nothing_else() -> None:
    resources = rendered("gpu-cert-manager.yaml")
    trigger = trigger_of(resources, "loraplex-engine-small")
    shown = of_kind(resources, "TriggerAuthentication")[trigger["authenticationRef"]["name"]]["spec"]["secretTargetRef"]

    assert trigger["type"] == "external-push"
    assert trigger["metadata"]["enableTLS"] == "true"
    assert {each["parameter"]: (each["name"], each["key"]) for each in shown} == {
        "caCert": ("keda-tls", "ca.crt"),
        "tlsClientCert": ("keda-tls", "tls.crt"),
        "tlsClientKey": ("keda-tls", "tls.key"),
    }
    assert ports_for(resources, "keda") == {8500}
    assert ports_for(resources, "monitoring") == {8502}


def test_a_gateway_with_tls_alone_is_trusted_and_shown_nothing() -> None:
    resources = render(
        LEAST
        | {
            "gateway": {"tlsSecret": "gateway-tls"},
            "keda": {"tlsSecret": "keda-ca", "scalerAddress": "llm.example:443"},
            "engineDefaults": {"autoscaling": SCALED},
        }
    )

    (auth,) = of_kind(resources, "TriggerAuthentication").values()
    assert [each["parameter"] for each in auth["spec"]["secretTargetRef"]] == ["caCert"]
    assert trigger_of(resources, "loraplex-engine-default")["metadata"]["scalerAddress"] == "llm.example:443"


@pytest.mark.parametrize(
    ("changes", "gateway", "message"),
    [
        ({"minReplicas": 0}, {}, "scaleFromZeroS"),
        ({}, {"tlsSecret": "tls"}, "keda.tlsSecret is empty"),
        ({}, {"apiKeysSecret": "keys"}, "has none to show"),
        ({"trigger": "prometheus"}, {}, "prometheus.address is empty"),
        ({"trigger": "cron"}, {}, "trigger"),
        ({"pageUsage": 1.5}, {}, "pageUsage"),
    ],
)
def test_a_scaler_that_could_not_work_is_refused_with_the_remedy(
    changes: dict[str, Any], gateway: dict[str, Any], message: str
) -> None:
    with pytest.raises(helm.HelmError, match=message):
        scaled(changes, **gateway)


def test_a_certificate_for_gateways_without_tls_is_refused() -> None:
    with pytest.raises(helm.HelmError, match=r"keda\.tlsSecret is set and the gateways speak no TLS"):
        render(LEAST | {"keda": {"tlsSecret": "a"}, "engineDefaults": {"autoscaling": SCALED}})


def test_one_group_that_keeps_an_engine_lets_others_go_to_zero() -> None:
    engines = {"a": {"autoscaling": SCALED | {"minReplicas": 0}}, "b": {"replicas": 1}}

    resources = render(LEAST | {"engines": engines})

    assert set(of_kind(resources, "ScaledObject")) == {"loraplex-engine-a"}
