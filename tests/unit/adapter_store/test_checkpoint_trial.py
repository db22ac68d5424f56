"""What an import accepts, a forward pass can finish with in either dtype of the engines: a trial product says so."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from loraplex_common.base_model import BaseModelInfo, load_base_model
from loraplex_common.errors import AdapterCorruptUploadError
from support.adapters import Recipe, write_adapter
from support.checkpoints import read
from support.decoder_shapes import PROJECTIONS
from support.oracle import Oracle
from support.store_rig import tiny_base_dir

if TYPE_CHECKING:
    from pathlib import Path

PROMPT = list(range(40, 60))


@pytest.fixture(scope="module")
def base() -> BaseModelInfo:
    return load_base_model(tiny_base_dir())


def is_accepted(base: BaseModelInfo, targets: tuple[str, ...], alpha: float) -> bool:
    try:
        read(base, Recipe(targets=targets, rank=4), lora_alpha=alpha)
    except AdapterCorruptUploadError as error:
        if "a forward pass leaves the range" not in error.message:
            raise
        return False
    return True


@pytest.mark.parametrize(
    "targets", [PROJECTIONS, ("gate_proj", "up_proj"), ("q_proj", "k_proj"), ("v_proj", "o_proj"), ("q_proj",)]
)
def test_the_largest_alpha_that_is_accepted_gives_finite_logits(
    base: BaseModelInfo, targets: tuple[str, ...], tmp_path: Path
) -> None:
    exponent = max(n for n in range(29) if is_accepted(base, targets, 10.0**n))
    assert exponent > 4  # no trained adapter comes near
    adapter = write_adapter(tmp_path / "a", tiny_base_dir(), Recipe(targets=targets, rank=4, alpha=10.0**exponent))
    oracle = Oracle(tiny_base_dir(), {"a": adapter})

    for dtype in (torch.float32, torch.bfloat16):
        oracle._model.to(dtype)
        assert np.isfinite(oracle.logits(PROMPT, "a")).all(), (dtype, exponent)


@pytest.mark.parametrize("projection", [name for name in PROJECTIONS if name not in ("q_proj", "k_proj")])
def test_an_alpha_of_1e29_is_refused_by_the_modules_name(base: BaseModelInfo, projection: str) -> None:
    with pytest.raises(AdapterCorruptUploadError, match=f"layer 0, {projection}: .* lora_alpha"):
        read(base, Recipe(targets=(projection,), rank=4), lora_alpha=9e29)


@pytest.mark.parametrize("matrix", ["A", "B"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_near_the_largest_float_are_refused(base: BaseModelInfo, matrix: str, dtype: str) -> None:
    def change(tensors: dict[str, Any]) -> None:
        tensors[f"base_model.model.model.layers.1.mlp.down_proj.lora_{matrix}.weight"][...] = 3e38

    with pytest.raises(AdapterCorruptUploadError, match=r"layer 1, down_proj|model.layers.1.mlp.down_proj"):
        read(base, Recipe(targets=("down_proj",), rank=4, alpha=0.01, dtype=dtype), change=change)


def test_a_sum_that_overflows_where_no_product_does_is_refused(base: BaseModelInfo) -> None:
    """Each value times each other is within fp32; the sum over a row is not."""

    def change(tensors: dict[str, Any]) -> None:
        tensors["base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight"][...] = 3e38
        tensors["base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight"][...] = 1e-30

    with pytest.raises(AdapterCorruptUploadError, match="layer 0, v_proj"):
        read(base, Recipe(targets=("v_proj",), rank=4), change=change)
