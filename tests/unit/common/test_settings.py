"""Configuration from flags and variables: precedence, types, refusals, secrets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from loraplex_common.settings import HIDDEN, describe, load, setting, size


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """A service for tests."""

    model: Path = setting(help="model directory")
    model_alias: tuple[str, ...] = setting((), help="further names")
    redis_url: str | None = setting(None, help="where Valkey is", is_secret=True)
    port: int = setting(8520, help="100 % of the time")
    pool_bytes: int | None = size(None, help="pool")
    dtype: Literal["auto", "float32"] = setting("auto", help="compute dtype")
    grace_s: float = setting(30.0, help="seconds")
    is_strict: bool = setting(False, help="a switch")

    def __post_init__(self) -> None:
        if self.port < 0:
            raise ValueError("port must not be negative")


def read(*argv: str, **environ: str) -> Config:
    return load(Config, service="engine", argv=argv, environ=environ)


def test_defaults_apply_where_nobody_says_otherwise() -> None:
    assert read("--model", "/m") == Config(model=Path("/m"))


def test_flags_are_typed_by_their_fields() -> None:
    config = read(
        *("--model", "~/m", "--model-alias", "a", "--model-alias", "b", "--pool-bytes", "512MiB"),
        *("--dtype", "float32", "--grace-s", "1.5", "--is-strict", "--port", "0"),
    )

    assert config.model == Path("~/m").expanduser()
    assert config.model_alias == ("a", "b")
    assert (config.pool_bytes, config.dtype, config.grace_s) == (512 * 2**20, "float32", 1.5)
    assert (config.is_strict, config.port) == (True, 0)


def test_variables_fill_in_for_flags_and_flags_win() -> None:
    environ = {
        "LORAPLEX_ENGINE_MODEL": "/from-env",
        "LORAPLEX_ENGINE_MODEL_ALIAS": "a, b,",
        "LORAPLEX_ENGINE_IS_STRICT": "yes",
        "LORAPLEX_ENGINE_PORT": "1",
        "LORAPLEX_GATEWAY_PORT": "2",
    }

    config = read("--port", "3", "--no-is-strict", **environ)

    assert config == Config(model=Path("/from-env"), model_alias=("a", "b"), port=3)
    assert read(**environ).is_strict


@pytest.mark.parametrize(
    ("argv", "environ", "message"),
    [
        ((), {}, "--model (or LORAPLEX_ENGINE_MODEL) is required"),
        (("--model", "m", "--pool-bytes", "5 apples"), {}, "argument --pool-bytes: '5 apples' is no size"),
        (("--model", "m", "--dtype", "int8"), {}, "'int8' is not one of auto, float32"),
        (("--model", "m"), {"LORAPLEX_ENGINE_PORT": "http"}, "LORAPLEX_ENGINE_PORT: invalid literal"),
        (("--model", "m"), {"LORAPLEX_ENGINE_IS_STRICT": "maybe"}, "LORAPLEX_ENGINE_IS_STRICT: 'maybe' is neither"),
        (("--model", "m", "--port", "-1"), {}, "port must not be negative"),
        (("--model", "m", "--por", "1"), {}, "unrecognized arguments"),
    ],
)
def test_bad_settings_are_refused_by_name(
    capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], environ: dict[str, str], message: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        read(*argv, **environ)

    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_help_lists_every_flag_and_the_variables(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        read("--help")

    text = capsys.readouterr().out
    assert caught.value.code == 0
    assert all(flag in text for flag in ("--model-alias", "--pool-bytes SIZE", "{auto,float32}", "--no-is-strict"))
    assert "A service for tests." in text
    assert "LORAPLEX_ENGINE_" in text
    assert "100 % of the time (default: 8520)" in text


def test_the_printed_configuration_hides_secrets() -> None:
    config = read("--model", "/m", "--redis-url", "redis://user:password@host")

    assert describe(config)["redis_url"] == HIDDEN
    assert describe(config)["model"] == "/m"
    assert describe(read("--model", "/m"))["redis_url"] is None
