"""An adapter whose values or scalings would let the base model answer in its place is refused, or warned of."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from loraplex_adapter_store.checkpoint.canonical import canonicalise
from loraplex_adapter_store.checkpoint.exploding import exploding_of
from loraplex_common.base_model import BaseModelInfo, load_base_model
from loraplex_common.errors import AdapterCorruptUploadError, AdapterIncompatibleError
from support.adapters import Recipe
from support.checkpoints import read
from support.store_rig import tiny_base_dir

PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def base() -> BaseModelInfo:
    return load_base_model(tiny_base_dir())


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"lora_alpha": 0}, "lora_alpha = 0 makes the scaling of .* 0, .* often 4 or 8"),
        ({"lora_alpha": 1e-45}, "lora_alpha"),
        ({"lora_alpha": 1e-60, "use_rslora": True}, "lora_alpha"),
        ({"alpha_pattern": {"q_proj": 0}}, r"alpha_pattern\['q_proj'\] = 0 makes"),
        ({"alpha_pattern": {"layers.1.mlp.down_proj": 0.0}}, "model.layers.1.mlp.down_proj"),
    ],
)
def test_a_scaling_that_leaves_the_base_model_to_answer_is_refused(
    base: BaseModelInfo, config: dict[str, Any], match: str
) -> None:
    with pytest.raises(AdapterIncompatibleError, match=match):
        read(base, **config)


def test_an_alpha_of_zero_for_modules_that_there_are_not_makes_no_difference(base: BaseModelInfo) -> None:
    assert canonicalise(read(base, alpha_pattern={"k_proj": 0})).revision == canonicalise(read(base)).revision


@pytest.mark.parametrize("matrix", ["A", "B"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_an_adapter_that_changes_nothing_is_taken_with_a_warning(base: BaseModelInfo, matrix: str, dtype: str) -> None:
    def zero(tensors: dict[str, Any]) -> None:
        for name in tensors:
            if f"lora_{matrix}" in name:
                tensors[name] *= -0.0

    form = canonicalise(read(base, Recipe(targets=("q_proj",), dtype=dtype), change=zero))

    assert "the adapter answers as the base model does" in " ".join(form.warnings)


def test_modules_that_change_nothing_beside_others_are_counted_and_named(base: BaseModelInfo) -> None:
    def zero_all_but_one(tensors: dict[str, Any]) -> None:
        for name in tensors:
            if "lora_B" in name and "layers.1.mlp" not in name:
                tensors[name] *= 0

    (warning,) = read(base, change=zero_all_but_one).warnings
    assert re.match(r"the delta is zero in \d+ modules: model\.layers\.0\.self_attn\.q_proj, .* in all:", warning)
    assert "layers.1.mlp" not in warning


def test_a_delta_that_drowns_its_base_is_warned_of_by_its_modules_name(base: BaseModelInfo) -> None:
    checkpoint = read(base)
    first = checkpoint.modules[0]
    a, b = (each.values().astype(np.float64) for each in first.parts[0].tensors)
    norm = float(np.linalg.norm(first.scaling * b @ a))
    place = (first.layer, first.projection)

    (told,) = exploding_of(checkpoint.modules, {place: norm / 10.01})

    assert f"10 times as large as the base's weight in 1 module: {first.name}: " in told
    assert list(exploding_of(checkpoint.modules, {place: norm / 9.99})) == []
    assert list(exploding_of(checkpoint.modules, {})) == []


def test_a_delta_that_drowns_any_base_is_warned_of_without_the_weights_norms(base: BaseModelInfo) -> None:
    def explode(tensors: dict[str, Any]) -> None:
        for name in tensors:
            if "layers.1.self_attn.q_proj.lora_B" in name:
                tensors[name] *= 1e6

    (told,) = exploding_of(read(base, change=explode).modules, {})

    assert "outputs of more than 1000 in 1 module: model.layers.1.self_attn.q_proj: " in told


def test_values_whose_product_no_engine_can_hold_are_refused(base: BaseModelInfo) -> None:
    def change(tensors: dict[str, Any]) -> None:
        tensors[f"{PREFIX}.lora_A.weight"][0, 0] = 1e25
        tensors[f"{PREFIX}.lora_B.weight"][0, 0] = -1e25

    with pytest.raises(AdapterCorruptUploadError, match="beyond bf16's range"):
        read(base, change=change)


def test_tensors_of_shards_that_were_not_gathered_are_named(base: BaseModelInfo) -> None:
    def empty(tensors: dict[str, Any]) -> None:
        tensors[f"{PREFIX}.lora_A.weight"] = np.zeros((0,), dtype=np.float32)

    with pytest.raises(AdapterIncompatibleError, match=r"lora_A.weight has shape \[0\], expected \[4, 64\].*ZeRO-3"):
        read(base, change=empty)


def test_mica_and_fan_in_fan_out_are_plain_lora(base: BaseModelInfo) -> None:
    """MiCA trains A alone; PEFT turns fan_in_fan_out off for linear layers."""
    other = read(base, init_lora_weights="mica", fan_in_fan_out=True)

    assert canonicalise(other).revision == canonicalise(read(base)).revision
