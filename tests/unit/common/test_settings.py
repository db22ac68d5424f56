"""Configuration from flags and variables: precedence, types, refusals, secrets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from loraplex_common.secret import Secret
from loraplex_common.settings import describe, load, secret, setting, size


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """A service for tests."""

    model: Path = setting(help="model directory")
    model_alias: tuple[str, ...] = setting((), help="further names")
    metrics_key: Secret | None = secret(help="the key of scrapers")
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
        (("--model", ""), {}, "argument --model: it is empty: name a path, or leave it out"),
        ((), {"LORAPLEX_ENGINE_MODEL": ""}, "LORAPLEX_ENGINE_MODEL: it is empty: name a path, or leave it out"),
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


def test_no_flag_takes_a_secret(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read("--model", "/m", "--metrics-key", "hunter2")

    assert "--metrics-key-file FILE" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["flag", "variable", "variable of the value"])
def test_a_secret_comes_from_a_file_or_from_the_environment(tmp_path: Path, where: str) -> None:
    file = tmp_path / "key"
    file.write_text("hunter2\n")
    flags = ("--metrics-key-file", str(file)) if where == "flag" else ()
    environ = {"variable": {"METRICS_KEY_FILE": str(file)}, "variable of the value": {"METRICS_KEY": "hunter2"}}

    config = read("--model", "/m", *flags, **{f"LORAPLEX_ENGINE_{k}": v for k, v in environ.get(where, {}).items()})

    assert config.metrics_key is not None
    assert config.metrics_key.reveal() == "hunter2"
    assert "hunter2" not in str(describe(config)) + repr(config)
    assert describe(read("--model", "/m"))["metrics_key"] is None


@pytest.mark.parametrize("text", ["", "one\ntwo\n"])
def test_a_file_without_just_one_secret_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    file = tmp_path / "key"
    file.write_text(text)

    with pytest.raises(SystemExit):
        read("--model", "/m", "--metrics-key-file", str(file))

    assert f"--metrics-key-file: {file}: it must hold one line" in capsys.readouterr().err


def test_a_secret_and_a_file_with_it_are_not_both_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = {"LORAPLEX_ENGINE_METRICS_KEY": "a", "LORAPLEX_ENGINE_METRICS_KEY_FILE": str(tmp_path / "key")}

    with pytest.raises(SystemExit):
        read("--model", "/m", **both)

    assert "are both set" in capsys.readouterr().err
