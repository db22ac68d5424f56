"""config.json is understood in every spelling that is served, and refused by name where it is not."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from loraplex_common.architectures.registry import model_config
from loraplex_common.base_model import BaseModelError, load_base_model
from loraplex_engine.model.rope import rope_table
from loraplex_engine.pool_geometry import choose_pool_geometry
from support.base_models import TinyBase, write_base_model

if TYPE_CHECKING:
    from pathlib import Path

    from loraplex_common.decoder_config import ModelConfig


def read(directory: Path, base: TinyBase, **changes: Any) -> ModelConfig:
    """Write a model, replace entries of config.json (None removes one), and read it."""
    write_base_model(directory, base)
    file = directory / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return model_config(load_base_model(directory).config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
        ({"rope_parameters": {"rope_type": "su", "rope_theta": 1e4}}, "su"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
)
def test_what_is_not_served_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BaseModelError, match=message):
        read(tmp_path, TinyBase(), **changes)


def test_a_rope_rule_without_its_parameters_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=r"config\.json: rope_scaling\.low_freq_factor is missing"):
        read(tmp_path, TinyBase(), rope_scaling={"rope_type": "llama3", "factor": 8.0})


def test_dynamic_rope_is_refused_beyond_the_trained_length(tmp_path: Path) -> None:
    config = read(tmp_path, TinyBase(), rope_scaling={"type": "dynamic", "factor": 2.0})

    assert rope_table(config, 512).shape == (512, 2, 8)
    with pytest.raises(BaseModelError, match="max-model-len"):
        rope_table(config, 513)


def test_mistral_s_window_defaults_like_transformers_and_null_turns_it_off(tmp_path: Path) -> None:
    base = TinyBase(architecture="mistral")

    missing = read(tmp_path / "missing", base)
    write_base_model(tmp_path / "null", base)

    assert missing.windows == (4096, 4096)  # `read` drops the null
    assert model_config(load_base_model(tmp_path / "null").config).windows == (None, None)


def test_llama_ignores_a_window_and_qwen_honours_use_sliding_window(tmp_path: Path) -> None:
    llama = read(tmp_path / "llama", TinyBase(), sliding_window=8)
    off = read(tmp_path / "off", TinyBase(architecture="qwen2", sliding_window=8), use_sliding_window=False)
    some = read(tmp_path / "some", TinyBase(architecture="qwen2", sliding_window=8), max_window_layers=1)

    assert llama.windows == off.windows == (None, None)
    assert some.windows == (None, 8)


@pytest.mark.parametrize(
    ("shape", "dtype", "block_tokens", "page_bytes"),
    [
        ((32, 8, 128), "bfloat16", 16, 2 * 1024 * 1024),  # Llama-3-8B
        ((32, 32, 128), "bfloat16", 4, 2 * 1024 * 1024),  # Llama-2-7B
        ((30, 3, 64), "float32", 16, 737_280),  # SmolLM2-135M
        ((80, 64, 128), "bfloat16", 1, 2_621_440),
    ],
)
def test_pages_reach_two_mebibytes_or_sixteen_tokens(
    tmp_path: Path, shape: tuple[int, int, int], dtype: str, block_tokens: int, page_bytes: int
) -> None:
    layers, kv_heads, head_dim = shape
    write_base_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"num_hidden_layers": layers, "num_key_value_heads": kv_heads, "head_dim": head_dim}
    config["num_attention_heads"] = kv_heads
    (tmp_path / "config.json").write_text(json.dumps(config))

    geometry = choose_pool_geometry(load_base_model(tmp_path), dtype=dtype)

    assert (geometry.block_tokens, geometry.page_bytes) == (block_tokens, page_bytes)
    assert geometry.num_blocks(block_tokens + 1) == 2
