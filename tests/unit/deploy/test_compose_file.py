"""compose.yaml: what its services are started with is what they take."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from loraplex_adapter_store.config import StoreConfig
from loraplex_common import settings
from loraplex_engine.config import EngineConfig
from loraplex_gateway.config import GatewayConfig

ROOT = Path(__file__).parents[3]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
CONFIGS = {"engine": EngineConfig, "adapter_store": StoreConfig, "gateway": GatewayConfig}
ENGINES = [name for name in SERVICES if name.startswith("engine")]
VARIABLE = re.compile(r"\$\{\w+(?::-([^}]*))?\}")


def environment(name: str) -> dict[str, str]:
    """Return a service's variables as compose sets them where the shell sets none; left out: those that only pass on."""
    given = SERVICES[name]["environment"]
    return {key: VARIABLE.sub(r"\1", str(value)) for key, value in given.items() if value is not None}


def config_of(name: str, kind: str) -> Any:
    """Return the configuration that a service reads from its variables, without the files that only containers have."""
    config: Any = CONFIGS[kind]
    files = ("_FILE", "_TLS_CA", "_TLS_CERT", "_TLS_KEY", "_TLS_CLIENT_CA")
    known = {key: value for key, value in environment(name).items() if not key.endswith(files)}
    return settings.load(config, service=kind, argv=[], environ=known)


@pytest.mark.parametrize("name", [*ENGINES, "adapter_store", "gateway"])
def test_a_service_takes_every_variable_that_it_is_given(name: str) -> None:
    kind = "engine" if name in ENGINES else name
    prefix = f"LORAPLEX_{kind.upper()}_"

    names = {key.removeprefix(prefix).lower() for key in SERVICES[name]["environment"] if key.startswith(prefix)}

    assert names
    assert names <= {field.removesuffix("_file") for field in settings_of(kind)} | settings_of(kind)
    assert config_of(name, kind)


def settings_of(kind: str) -> set[str]:
    config: Any = CONFIGS[kind]
    fields = set(config.__dataclass_fields__)
    return fields | {f"{field}_file" for field in fields}


def test_the_profile_for_ranks_computes_one_model_with_two_processes_on_the_cpu() -> None:
    config = config_of("engine-ranks", "engine")

    assert SERVICES["engine-ranks"]["profiles"] == ["ranks"]
    assert (config.tensor_parallel, config.device) == (2, "cpu")


def test_every_engine_is_one_to_all_others_whatever_its_profile() -> None:
    plain = environment("engine")
    own = {"LORAPLEX_ENGINE_DEVICE", "LORAPLEX_ENGINE_TENSOR_PARALLEL"}
    hosts = " ".join(SERVICES["credentials"]["command"])
    scraped = (ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text()

    for name in ENGINES:
        assert {key: value for key, value in environment(name).items() if key not in own} == plain
        for key in ("pid", "entrypoint", "depends_on", "volumes", "read_only", "cap_drop"):
            assert SERVICES[name][key] == SERVICES["engine"][key], name
        assert re.search(rf"--engine-host {name}\b(?!-)", hosts), name
        assert re.search(rf"\b{name}\b(?!-)", scraped), name
