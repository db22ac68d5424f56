"""A base model that cannot be served is refused by `loraplex serve` before it starts anything, and by each service."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from loraplex_adapter_store.bases import KnownBases
from loraplex_adapter_store.config import StoreConfig
from loraplex_client.cli.serve_options import BaseOptions, EngineOptions
from loraplex_common import settings
from loraplex_common.base_model import BaseModelError
from loraplex_engine.build import read_base_model
from loraplex_engine.config import EngineConfig
from loraplex_gateway.config import GatewayConfig
from loraplex_gateway.text.fair_workers import FairWorkers
from loraplex_gateway.text.models import load_served_model
from support.base_models import TinyBase, write_base_model

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "yarn": ({"rope_scaling": {"rope_type": "yarn", "factor": None}}, "config.json: rope_scaling.factor is null"),
    "quantised": ({"quantization_config": {"quant_method": "hqq"}}, "quantised weights are not served"),
    "multimodal": (
        {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": {}},
        "Gemma3ForConditionalGeneration takes images",
    ),
    "architecture": ({"architectures": ["Qwen3MoeForCausalLM"]}, "Qwen3MoeForCausalLM"),
}


def bad_model(tmp_path: Path, changes: dict[str, Any]) -> Path:
    directory = write_base_model(tmp_path / "tiny", TinyBase())
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))
    return directory


def in_gateway(directory: Path) -> object:
    return load_served_model(directory, FairWorkers())


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize(
    "load",
    [
        in_gateway,
        lambda directory: KnownBases.load([directory], name=None, aliases=()),
        lambda directory: read_base_model(EngineConfig(model=directory)),
    ],
    ids=["gateway", "store", "engine"],
)
def test_each_service_alone_refuses_it(tmp_path: Path, kind: str, load: Callable[[Path], object]) -> None:
    changes, message = BAD[kind]

    with pytest.raises(BaseModelError, match=message):
        load(bad_model(tmp_path, changes))


def test_each_service_takes_the_text_part_of_a_multimodal_model_with_the_same_flag(tmp_path: Path) -> None:
    directory = write_base_model(tmp_path / "tiny", TinyBase(architecture="mistral"))
    config = json.loads((directory / "config.json").read_text())
    text = {key: value for key, value in config.items() if key != "architectures"}
    whole = {"architectures": ["Mistral3ForConditionalGeneration"], "text_config": text | {"model_type": "mistral"}}
    (directory / "config.json").write_text(json.dumps(whole | {"vision_config": {}, "tie_word_embeddings": False}))
    flags = ("--model", str(directory), *BaseOptions(model=directory, text_only=True).flags())
    urls = ("--redis-url", "redis://127.0.0.1:1")

    engine, _ = read_base_model(settings.load(EngineConfig, service="engine", argv=flags, environ={}))
    store = KnownBases.load(
        [directory],
        name=None,
        aliases=(),
        text_only=settings.load(StoreConfig, service="adapter_store", argv=(*flags, *urls), environ={}).text_only,
    )
    gateway = load_served_model(
        directory,
        FairWorkers(),
        text_only=settings.load(GatewayConfig, service="gateway", argv=(*flags, *urls), environ={}).text_only,
    )

    assert list(store.fingerprints) == [engine.fingerprint] == [gateway.fingerprint]
    with pytest.raises(BaseModelError, match="with --text-only its text part is"):
        read_base_model(EngineConfig(model=directory))


@pytest.mark.parametrize("kind", ["yarn", "quantised"])
def test_serve_starts_nothing(tmp_path: Path, kind: str) -> None:
    changes, message = BAD[kind]
    command = [
        sys.executable,
        "-m",
        "loraplex_client",
        "serve",
        "--base-port",
        "0",
        "--data-dir",
        str(tmp_path / "data"),
    ]

    ended = subprocess.run(
        [*command, "--model", str(bad_model(tmp_path, changes))],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert ended.returncode == 1
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.stdout == ""
    assert not (tmp_path / "data").exists()


def test_serve_hands_what_becomes_of_weights_on_to_the_engine(tmp_path: Path) -> None:
    flags = EngineOptions(quantization="fp8").flags()

    assert flags == ("--quantization", "fp8")
    argv = (*flags, "--model", str(tmp_path), "--redis-url", "unix:///nowhere")
    assert settings.load(EngineConfig, service="engine", argv=argv, environ={}).quantization == "fp8"
