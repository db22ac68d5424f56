"""The Helm chart renders, for every set of values below ci/, what Kubernetes takes and our services read."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import helm_python as helm
import kubernetes_validate
import pytest
import yaml
from loraplex_adapter_store.config import StoreConfig
from loraplex_common.settings import load
from loraplex_engine.config import EngineConfig
from loraplex_gateway.config import GatewayConfig

if TYPE_CHECKING:
    from loraplex_common.service_settings import ServiceSettings

CHART = Path(__file__).parents[3] / "deploy/helm/loraplex"
SETS = sorted(each.name for each in (CHART / "ci").glob("*.yaml"))
OLDEST, NEWEST = "1.29", "1.35"
OTHERS = ("cert-manager.io/", "keda.sh/", "monitoring.coreos.com/", "inference.networking.k8s.io/")
"""Resources whose schemas do not come with Kubernetes."""
CONFIGS: dict[str, tuple[str, type[ServiceSettings]]] = {
    "gateway": ("gateway", GatewayConfig),
    "store": ("adapter_store", StoreConfig),
    "engine": ("engine", EngineConfig),
}
LEAST: dict[str, dict[str, Any]] = {
    "model": {"path": "llama", "volume": {"persistentVolumeClaim": {"claimName": "models"}}},
    "valkey": {"external": {"host": "valkey.example"}},
}


def values_of(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((CHART / "ci" / name).read_text())
    return loaded


def render(values: dict[str, Any]) -> list[dict[str, Any]]:
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
def rendered(name: str) -> list[dict[str, Any]]:
    return render(values_of(name))


def pods(resources: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the pod templates by the names of their workloads."""
    kinds = ("Deployment", "StatefulSet")
    return {each["metadata"]["name"]: each["spec"]["template"] for each in resources if each["kind"] in kinds}


def part_of(labels: dict[str, str]) -> str:
    return labels["app.kubernetes.io/component"]


@pytest.mark.parametrize("name", SETS)
def test_the_chart_passes_helms_own_lint_and_the_schemas_of_kubernetes(name: str) -> None:
    findings = helm.lint(CHART, values_of(name), strict=True)

    assert [each for each in findings["messages"] if "icon" not in each["error"]] == []
    for resource in rendered(name):
        if resource["apiVersion"].startswith(OTHERS):
            continue
        volumes = pods([resource]) if name == "mesh.yaml" else {}
        for version in (NEWEST,) if volumes else (OLDEST, NEWEST):  # volumes of images came with 1.33
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
        ({"engines": {"a": {"autoscaling": {"enabled": True}}}}, "autoscaling.prometheus is empty"),
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
