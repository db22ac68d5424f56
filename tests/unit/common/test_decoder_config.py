"""Every entry of config.json that is read is either understood or refused by file, key and remedy; never a traceback."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from loraplex_common.architectures.registry import model_config
from loraplex_common.base_model import BaseModelError, check_base_model
from support.base_models import TinyBase, write_base_model

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SLIDING = {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 16}
QWEN: dict[str, Any] = {"architectures": ["Qwen2ForCausalLM"], **SLIDING}
JUNK: tuple[Any, ...] = ("many", "", True, [], {}, -1, 0, 1.5, float("nan"), float("inf"), None)


def tiny_config(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((write_base_model(tmp_path, TinyBase()) / "config.json").read_text())
    return config | changes


def entries(config: dict[str, Any], path: tuple[str, ...] = ()) -> Iterable[tuple[str, ...]]:
    """Yield the path of every entry, nested ones too."""
    for key, value in config.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from entries(value, (*path, key))


def replaced(config: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """Return a copy with one entry replaced, or removed for `...`."""
    inner = value if len(path) == 1 else replaced(config[path[0]], path[1:], value)
    rest = {key: old for key, old in config.items() if key != path[0]}
    return rest if inner is ... else rest | {path[0]: inner}


def refusal_of(config: dict[str, Any]) -> str | None:
    """Return why a configuration is refused; None if it is understood."""
    try:
        model_config(config, "dir/config.json")
    except BaseModelError as error:
        return str(error)
    return None


@pytest.mark.parametrize("rope", [None, YARN, LLAMA3, YARN | {"beta_fast": 32, "mscale": 1.0, "truncate": True}])
@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("family", [{}, QWEN])
def test_an_entry_with_any_value_is_understood_or_named(
    tmp_path: Path, rope: dict[str, Any] | None, spelling: str, family: dict[str, Any]
) -> None:
    config = tiny_config(tmp_path, **{"rope_scaling": None, spelling: rope}, mlp_bias=False, **family)
    model_config(config)

    for path in entries(config):
        for value in (..., *JUNK):
            refusal = refusal_of(replaced(config, path, value))
            assert refusal is None or refusal.startswith("dir/config.json: ")
            assert refusal is None or any(
                key in refusal for key in (*path, "architecture ", "RoPE type", "head_dim", "layer_types")
            )


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("rope_scaling", "factor"), None, r"rope_scaling\.factor is null: expected a number greater than 0; mend"),
        (("rope_scaling", "factor"), ..., r"rope_scaling\.factor is missing"),
        (("rope_scaling", "factor"), "4", r"rope_scaling\.factor is '4'"),
        (("rope_scaling", "truncate"), "no", r"rope_scaling\.truncate is 'no': expected true or false"),
        (("rope_scaling",), [4.0], r"rope_scaling is \[4\.0\]: expected an object"),
        (("hidden_size",), None, "hidden_size is null: expected an integer"),
        (("hidden_size",), ..., "hidden_size is missing"),
        (("vocab_size",), True, "vocab_size is True"),
        (("rms_norm_eps",), None, "rms_norm_eps is null"),
        (("hidden_act",), None, "hidden_act is null: expected a string"),
        (("num_key_value_heads",), 3, "num_key_value_heads is 3: expected a divisor of num_attention_heads = 4"),
        (("head_dim",), 15, "head_dim is 15: expected an even number"),
        (("max_position_embeddings",), 0, "max_position_embeddings is 0"),
        (("attention_bias",), "yes", "attention_bias is 'yes'"),
        (("architectures",), None, "architecture None is not one of"),
    ],
)
def test_a_bad_entry_is_named_with_what_belongs_there(
    tmp_path: Path, path: tuple[str, ...], value: Any, message: str
) -> None:
    config = replaced(tiny_config(tmp_path, rope_scaling=YARN), path, value)
    (tmp_path / "config.json").write_text(json.dumps(config))

    with pytest.raises(BaseModelError, match=rf"{tmp_path}/config\.json: {message}"):
        check_base_model(tmp_path)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "GraniteMoeHybridForCausalLM"])
@pytest.mark.parametrize("num_layers", [4097, 2**70])
def test_more_layers_than_memory_holds_are_refused_before_they_are_made(
    tmp_path: Path, architecture: str, num_layers: int
) -> None:
    config = tiny_config(tmp_path, architectures=[architecture], num_hidden_layers=num_layers)

    with pytest.raises(
        BaseModelError, match=rf"num_hidden_layers is {num_layers}: expected an integer of at most 4096"
    ):
        model_config(config)


@pytest.mark.parametrize("key", ["num_key_value_heads", "head_dim", "attention_bias", "rope_scaling", "sliding_window"])
def test_null_is_what_transformers_takes_it_for(tmp_path: Path, key: str) -> None:
    config = tiny_config(tmp_path)

    assert model_config(config | {key: None}) == model_config(replaced(config | {key: None}, (key,), ...))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization_config": {"quant_method": "hqq"}}, r"quantization_config \(hqq\): quantised weights"),
        ({"quantization_config": {}}, "quantization_config: quantised weights"),
        ({"compression_config": {"format": "float"}}, "compression_config: quantised weights"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not served"),
        ({"architectures": ["MistralForCausalLM"], "layer_types": ["full_attention"] * 2}, "layer_types"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "high_freq_factor is 4.0: expected more"),
    ],
)
def test_what_is_sound_but_not_served_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BaseModelError, match=message):
        model_config(tiny_config(tmp_path) | changes)
