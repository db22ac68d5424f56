"""The Helm chart renders, for every set of values below ci/, what Kubernetes takes and our services read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import helm_python as helm
import jsonschema
import kubernetes_validate
import pytest
import typer.core
import typer.main
import yaml
from loraplex_adapter_store.config import StoreConfig
from loraplex_client.cli.app import app
from loraplex_common.settings import load
from loraplex_engine.config import EngineConfig
from loraplex_gateway.config import GatewayConfig
from support.helm_chart import CHART, LEAST, SETS, of_kind, part_of, pod_of, pods, render, rendered, values_of

if TYPE_CHECKING:
    from loraplex_common.service_settings import ServiceSettings

OLDEST, NEWEST = "1.29", "1.35"
CUSTOM: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "custom_resources.yaml").read_text())
CONFIGS: dict[str, tuple[str, type[ServiceSettings]]] = {
    "gateway": ("gateway", GatewayConfig),
    "store": ("adapter_store", StoreConfig),
    "engine": ("engine", EngineConfig),
}


@pytest.mark.parametrize("name", SETS)
def test_the_chart_passes_helms_own_lint_and_the_schemas_of_kubernetes(name: str) -> None:
    findings = helm.lint(CHART, values_of(name), strict=True)

    assert [each for each in findings["messages"] if "icon" not in each["error"]] == []
    for resource in rendered(name):
        kind = f"{resource['apiVersion']}/{resource['kind']}"
        if kind in CUSTOM["specs"]:
            schema = CUSTOM["specs"][kind] | {"definitions": CUSTOM["definitions"]}
            jsonschema.Draft7Validator(schema).validate(resource["spec"])
            if resource["kind"] != "LeaderWorkerSet":
                continue
            resource = {"apiVersion": "v1", "kind": "Pod", **pod_of(resource)}
        has_volumes_of_images = name == "mesh.yaml" and resource["kind"] == "Deployment"
        for version in (NEWEST,) if has_volumes_of_images else (OLDEST, NEWEST):  # they came with 1.33
            kubernetes_validate.validate(resource, version, strict=True)


@pytest.mark.parametrize("name", SETS)
def test_services_take_each_variable_and_option_that_they_are_given(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "secret"
    file.write_text("secret\n")
    for _, config in CONFIGS.values():
        monkeypatch.setattr(config, "__post_init__", lambda _: None)  # it looks for folders of models
    for pod in pods(rendered(name)).values():
        part = part_of(pod["metadata"]["labels"])
        if part == "valkey":
            continue
        service, config = CONFIGS[part]
        (container,) = pod["spec"]["containers"]
        prefix = f"LORAPLEX_{service.upper()}_"
        environ = {each["name"]: each.get("value", "") for each in container["env"]}
        environ = {key: str(file) if key.endswith("_FILE") else value for key, value in environ.items()}
        own = {key.removeprefix(prefix).lower() for key in environ if key.startswith(prefix)}

        loaded = load(config, service=service, argv=container.get("args", []), environ=environ)

        fields = set(loaded.__dataclass_fields__)
        assert {each for each in own if each not in fields and each.removesuffix("_file") not in fields} == set()
        assert all(key.startswith((prefix, "LORAPLEX_HEALTHCHECK_TLS_")) or key in ("POD_IP", "TZ") for key in environ)


def test_the_command_line_takes_what_fetches_the_model() -> None:
    containers = [
        each
        for pod in pods(rendered("gpu-cert-manager.yaml")).values()
        for each in pod["spec"].get("initContainers", [])
    ]

    assert len(containers) == 4
    for container in containers:
        name, *arguments = container["args"]
        command = typer.main.get_command(app)
        assert isinstance(command, typer.core.TyperGroup)
        with command.commands[name].make_context(name, arguments) as context:
            assert str(context.params["out"]) == "/models/llama"


@pytest.mark.parametrize("name", SETS)
def test_every_file_that_a_service_is_told_of_is_in_a_volume_that_it_mounts(name: str) -> None:
    for pod in pods(rendered(name)).values():
        volumes = {each["name"] for each in pod["spec"]["volumes"]}
        volumes |= {"data"} if part_of(pod["metadata"]["labels"]) == "valkey" else set()
        (container,) = pod["spec"]["containers"]
        mounts = {each["mountPath"]: each["name"] for each in container["volumeMounts"]}

        assert set(mounts.values()) == volumes
        for each in container.get("env", []):
            path = each.get("value", "")
            assert not path.startswith("/") or any(path.startswith(f"{mount}/") for mount in mounts), each


@pytest.mark.parametrize("name", SETS)
def test_no_pod_runs_as_root_or_writes_to_its_image_or_has_a_token(name: str) -> None:
    for pod in pods(rendered(name)).values():
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["automountServiceAccountToken"] is False
        for container in [*spec.get("initContainers", []), *spec["containers"]]:
            security = container["securityContext"]
            assert security["readOnlyRootFilesystem"] is True
            assert security["allowPrivilegeEscalation"] is False
            assert security["capabilities"] == {"drop": ["ALL"]}


def test_only_gateways_reach_engines_and_only_parts_and_administrators_the_store() -> None:
    policies = {
        each["metadata"]["name"].removeprefix("loraplex-"): each["spec"]
        for each in rendered("own-valkey.yaml")
        if each["kind"] == "NetworkPolicy"
    }

    def sources(part: str, port: int) -> set[str]:
        return {
            part_of(peer["podSelector"]["matchLabels"])
            for rule in policies[part]["ingress"]
            if {"port": port} in rule["ports"]
            for peer in rule["from"]
        }

    assert sources("engine", 8520) == {"gateway"}
    assert sources("store", 8510) == {"gateway", "engine"}
    assert sources("valkey", 6379) == {"gateway", "engine", "store", "valkey"}
    assert all(each["policyTypes"] == ["Ingress", "Egress"] for each in policies.values())
    for pod in pods(rendered("own-valkey.yaml")).values():
        assert part_of(pod["metadata"]["labels"]) in policies


def test_alerts_and_dashboards_are_those_that_prometheus_and_grafana_of_compose_have() -> None:
    resources = rendered("gpu-cert-manager.yaml")
    dashboards = {
        Path(name).name: json.loads(text)
        for config in of_kind(resources, "ConfigMap").values()
        if config["metadata"]["labels"].get("grafana_dashboard") == "1"
        for name, text in config["data"].items()
    }

    rules = of_kind(resources, "PrometheusRule")["loraplex"]["spec"]
    assert rules == yaml.safe_load((CHART.parents[1] / "prometheus/alerts.yaml").read_text())
    files = CHART.parents[1].glob("grafana/*.json")
    assert dashboards == {f"loraplex-{file.name}": json.loads(file.read_text()) for file in files}
    assert dashboards


def test_traces_go_to_the_collector_of_all_parts() -> None:
    resources = rendered("gpu-cert-manager.yaml")
    collector = [{"namespaceSelector": {"matchLabels": {"team": "observe"}}}]

    for pod in pods(resources).values():
        part = part_of(pod["metadata"]["labels"])
        if part == "valkey":
            continue
        environ = {each["name"]: each.get("value") for each in pod["spec"]["containers"][0]["env"]}
        prefix = f"LORAPLEX_{CONFIGS[part][0].upper()}"
        assert environ[f"{prefix}_OTLP_ENDPOINT"] == "http://otel.observe:4317"
        assert environ[f"{prefix}_TRACE_SAMPLE_RATIO"] == "0.1"
        egress = of_kind(resources, "NetworkPolicy")[f"loraplex-{part}"]["spec"]["egress"]
        assert {"ports": [{"port": 4317}], "to": collector} in egress


def test_a_gpu_engine_takes_one_gpu_and_goes_before_its_successor_comes() -> None:
    engines = {
        each["metadata"]["name"]: each["spec"]
        for each in rendered("gpu-cert-manager.yaml")
        if each["kind"] == "Deployment" and "engine" in each["metadata"]["name"]
    }

    assert set(engines) == {"loraplex-engine-large", "loraplex-engine-small"}
    for name, resource in (("large", "nvidia.com/gpu"), ("small", "nvidia.com/mig-3g.40gb")):
        spec = engines[f"loraplex-engine-{name}"]
        (container,) = spec["template"]["spec"]["containers"]
        assert container["resources"]["limits"][resource] == 1
        assert spec["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}
    assert "replicas" not in engines["loraplex-engine-small"], "a scaler sets it"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {}}, "no base model"),
        ({"model": {"volume": {"emptyDir": {}}}}, "model.path is empty"),
        ({"model": {**LEAST["model"], "hub": {"repo": f"a/b@{'0' * 40}"}}}, "keep one"),
        ({"model": {"hub": {"repo": "a/b"}}}, "names no commit"),
        ({"valkey": {}}, "no Valkey"),
        ({"valkey": {"enabled": True, "external": {"host": "a"}}}, "keep one"),
        ({"credentials": {"mode": "certManager"}}, "issuerName is empty"),
        ({"credentials": {"mode": "mesh"}, "valkey": {"enabled": True}}, "passwordsSecret is empty"),
        ({"gateway": {"requireClientCertificates": True}}, "needs gateway.tlsSecret"),
        ({"gateway": {"certificate": {"issuerName": "a", "dnsNames": ["b"]}}}, "gateway.tlsSecret is empty"),
        ({"gateway": {"tlsSecret": "a", "certificate": {"issuerName": "a"}}}, "dnsNames is empty"),
        ({"engines": {"a": {"device": "cuda", "tensorParallel": 2}}}, "CPUs only"),
        ({"inferencePool": {"rewrites": [{"targets": [{"model": "a"}]}]}}, "needs inferencePool.enabled"),
        ({"inferencePool": {"enabled": True}}, "endpointPicker.name is empty"),
        ({"tracing": {"endpoint": "otel:4317"}}, "endpoint"),
        ({"gatway": {}}, "gatway"),
        ({"engineDefaults": {"device": "tpu"}}, "device"),
        ({"engines": {"a": {"replica": 2}}}, "engines"),
    ],
)
def test_what_contradicts_itself_or_is_read_by_nothing_is_refused_by_name(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(helm.HelmError, match=message):
        render(LEAST | changes)
