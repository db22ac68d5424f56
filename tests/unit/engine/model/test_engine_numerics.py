"""What an engine says of its numbers follows from its flags and the checkpoint, before a weight is read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias

import pytest
import torch
from loraplex_engine import build
from loraplex_engine.config import ConfigError, EngineConfig
from support.base_models import write_base_model
from support.families import family_dir

if TYPE_CHECKING:
    from pathlib import Path

Dtype: TypeAlias = Literal["auto", "float32", "bfloat16"]
KvDtype: TypeAlias = Literal["auto", "fp8"]


def numerics(
    directory: Path, *, dtype: Dtype = "auto", kv_cache_dtype: KvDtype = "auto", max_model_len: int | None = None
) -> str:
    config = EngineConfig(
        model=directory,
        dtype=dtype,
        kv_cache_dtype=kv_cache_dtype,
        max_model_len=max_model_len,
        device="cpu",
        pool_bytes=2**24,
        arena_bytes=2**24,
    )
    info, _ = build.read_base_model(config)
    return build.engine_limits(config, info, torch.device("cpu")).numerics


@pytest.mark.parametrize(("dtype", "said"), [("auto", "fp32"), ("float32", "fp32"), ("bfloat16", "bf16")])
def test_the_type_computed_in_is_part_of_them(tmp_path: Path, dtype: Dtype, said: str) -> None:
    assert numerics(write_base_model(tmp_path), dtype=dtype) == said


def test_keys_and_values_of_fp8_are_part_of_them_and_another_type_is_refused(tmp_path: Path) -> None:
    assert numerics(write_base_model(tmp_path), dtype="bfloat16", kv_cache_dtype="fp8") == "bf16+kv:fp8"
    with pytest.raises(ConfigError, match="--kv-cache-dtype 'int8' is not one of"):
        EngineConfig(model=tmp_path, kv_cache_dtype="int8")  # type: ignore[arg-type]


@pytest.mark.parametrize(("split", "said"), [("auto", "fp32+tp:2"), ("divided", "fp32+tp:2+pairs:divided")])
def test_how_ranks_are_told_to_divide_adapters_is_part_of_them(
    tmp_path: Path, split: Literal["auto", "divided"], said: str
) -> None:
    config = EngineConfig(
        model=write_base_model(tmp_path), tensor_parallel=2, adapter_split=split, device="cpu", pool_bytes=2**24
    )
    info, _ = build.read_base_model(config)
    assert build.engine_limits(config, info, torch.device("cpu")).numerics == said


def test_a_split_of_adapters_needs_ranks_and_a_name_that_is_known(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--adapter-split whole needs --tensor-parallel 2 or more"):
        EngineConfig(model=tmp_path, adapter_split="whole")
    with pytest.raises(ConfigError, match="--adapter-split 'half' is not one of"):
        EngineConfig(model=tmp_path, tensor_parallel=2, adapter_split="half")  # type: ignore[arg-type]


@pytest.mark.parametrize(("max_model_len", "said"), [(256, "fp32"), (257, "fp32+rope:long")])
def test_the_factors_that_longrope_picks_by_the_longest_sequence_are_part_of_them(
    max_model_len: int, said: str
) -> None:
    assert numerics(family_dir("phi3 short"), max_model_len=max_model_len) == said
