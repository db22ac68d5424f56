from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from loraplex_common import settings
from loraplex_common.base_model import load_base_model
from loraplex_engine.build import engine_limits, scheduling_policy, step_sizes
from loraplex_engine.config import ConfigError, EngineConfig
from loraplex_engine.limits import QueuePolicy, SchedulingPolicy
from support.base_models import TinyBase, write_base_model


def load(*argv: str, environ: dict[str, str] | None = None) -> EngineConfig:
    return settings.load(EngineConfig, service="engine", argv=["--model", "/models/base", *argv], environ=environ or {})


def test_flags_that_users_of_other_engines_know_are_understood() -> None:
    config = load(
        *("--max-model-len", "2048", "--max-num-seqs", "8", "--max-num-batched-tokens", "256", "--dtype", "float32"),
        *("--pool-bytes", "512MiB", "--arena-bytes", "2GiB", "--host", "0.0.0.0", "--allow-anonymous", "--port", "0"),
    )

    assert config.model == Path("/models/base")
    assert (config.max_model_len, config.max_num_seqs, config.max_num_batched_tokens) == (2048, 8, 256)
    assert (config.pool_bytes, config.arena_bytes) == (512 * 2**20, 2 * 2**30)
    assert (config.host, config.port, config.dtype) == ("0.0.0.0", 0, "float32")


def test_aliases_repeat_on_the_command_line_and_are_separated_by_commas_in_the_environment() -> None:
    assert load("--model-alias", "a/b", "--model-alias", "c").model_alias == ("a/b", "c")
    assert load(environ={"LORAPLEX_ENGINE_MODEL_ALIAS": "a/b,c"}).model_alias == ("a/b", "c")


def test_a_flag_beats_the_environment() -> None:
    environ = {"LORAPLEX_ENGINE_PORT": "1", "LORAPLEX_ENGINE_STORE_TARGET": "store:8510"}

    config = load("--port", "2", environ=environ)

    assert (config.port, config.store_target) == (2, "store:8510")


def test_loopback_is_the_default() -> None:
    assert load().host == "127.0.0.1"


@pytest.mark.parametrize(
    ("setting", "flag"),
    [
        ({"max_num_seqs": 0}, "--max-num-seqs"),
        ({"max_num_batched_tokens": -1}, "--max-num-batched-tokens"),
        ({"pool_bytes": 0}, "--pool-bytes"),
        ({"max_added_tokens": -1}, "--max-added-tokens"),
        ({"max_added_tokens": 65537}, "--max-added-tokens"),
        ({"max_model_len": -1}, "--max-model-len"),
        ({"port": 65536}, "--port"),
        ({"drain_grace_s": -1.0}, "--drain-grace-s"),
        ({"load_report_s": 0.0}, "--load-report-s"),
        ({"half_life_s": 0.0}, "--half-life-s"),
        ({"promote_after_s": 0.0}, "--promote-after-s"),
        ({"growth_quantile": 1.5}, "--growth-quantile"),
        ({"max_running_per_key": 0}, "--max-running-per-key"),
        ({"ttft_slo_s": 0.0}, "--ttft-slo-s"),
        ({"queue_policy": "lottery"}, "--queue-policy"),
        ({"queue_policy": "newest-first"}, "needs --ttft-slo-s"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_by_the_name_of_its_flag(setting: dict[str, object], flag: str) -> None:
    with pytest.raises(ConfigError, match=flag):
        EngineConfig(model=Path("/models/base"), **setting)  # type: ignore[arg-type]


def test_the_policy_flags_become_the_schedulers_policy() -> None:
    flags = ("--queue-policy", "slo-abort", "--ttft-slo-s", "2.5", "--max-running-per-key", "3", "--half-life-s", "30")

    policy = scheduling_policy(load(*flags, "--no-prefix-cache", "--no-warm-adapters", "--growth-quantile", "0.5"))

    assert policy == SchedulingPolicy(
        enable_prefix_cache=False,
        enable_warming=False,
        half_life_s=30.0,
        growth_quantile=0.5,
        queue_policy=QueuePolicy.SLO_ABORT,
        ttft_slo_s=2.5,
        max_running_per_key=3,
    )


def test_a_password_in_the_redis_url_is_taken_from_the_environment_alone_and_never_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        load("--redis-url", "redis://:hunter2@host:6379/0")
    said = capsys.readouterr().err
    monkeypatch.setenv("LORAPLEX_ENGINE_REDIS_URL", "redis://me:hunter2@host:6379/0")

    config = settings.load(EngineConfig, service="engine", argv=["--model", "m"])

    assert "--redis-password-file" in said
    assert config.redis_url == "redis://me:hunter2@host:6379/0"
    assert settings.describe(config)["redis_url"] == "redis://me:********@host:6379/0"
    assert "hunter2" not in said


@pytest.mark.parametrize(
    ("host", "flags"), [("127.0.0.1", ()), ("::1", ()), ("localhost", ()), ("0.0.0.0", ("--allow-anonymous",))]
)
def test_an_engine_that_asks_nobody_listens_on_the_loopback_unless_somebody_means_it(
    host: str, flags: tuple[str, ...]
) -> None:
    assert load("--host", host, *flags).host == host


@pytest.mark.parametrize("host", ["0.0.0.0", "10.0.0.1", "::", "engine-1"])
def test_an_engine_that_asks_nobody_does_not_listen_on_a_network(host: str) -> None:
    with pytest.raises(ConfigError, match=r"--api-keys-file, or, .* --allow-anonymous"):
        EngineConfig(model=Path(), host=host)


def test_a_step_on_a_gpu_is_larger_unless_somebody_says_otherwise() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")

    assert [step_sizes(load(), device) for device in (cpu, gpu)] == [(64, 1024), (512, 8192)]
    assert step_sizes(load("--max-num-seqs", "8"), gpu) == (8, 8192)
    assert step_sizes(load("--max-num-batched-tokens", "512"), cpu) == (64, 512)


@pytest.mark.parametrize(
    ("flags", "device"), [(["--max-num-seqs", "2000"], "cpu"), (["--max-num-batched-tokens", "255"], "cuda")]
)
def test_a_step_needs_a_token_for_each_sequence(flags: list[str], device: str) -> None:
    with pytest.raises(ConfigError, match=r"--max-num-seqs [0-9]+: each running sequence"):
        step_sizes(load(*flags), torch.device(device))


def test_the_help_shows_sizes_as_people_write_them(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load("--help")

    text = " ".join(capsys.readouterr().out.split())
    assert "page pool (default: 1GiB on a CPU" in text
    assert "adapter images (default: 512MiB)" in text
    assert re.search(r"default: \d{7,}|1024MiB", text) is None


def test_the_pool_leaves_room_for_tokens_that_adapters_add(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = 8 * 2**30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (memory, memory))
    info = load_base_model(write_base_model(tmp_path, TinyBase()))

    def pool_bytes(*argv: str) -> int:
        config = settings.load(
            EngineConfig, service="engine", argv=["--model", str(tmp_path), "--max-num-seqs", "128", *argv], environ={}
        )
        limits = engine_limits(config, info, torch.device("cuda"))
        return limits.num_pages * limits.page_bytes

    less = pool_bytes("--max-added-tokens", "0") - pool_bytes("--max-added-tokens", "65536")

    assert less == pytest.approx(0.85 * 128 * 65536 * 6, rel=0.01)
