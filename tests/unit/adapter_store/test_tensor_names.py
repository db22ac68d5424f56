"""A tensor that PEFT would ignore is refused with the name that PEFT loads, or named for what it is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from loraplex_common.base_model import BaseModelInfo, load_base_model
from loraplex_common.errors import AdapterIncompatibleError
from support.checkpoints import read
from support.store_rig import tiny_base_dir

PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"
NAME = f"{PREFIX}.lora_A.weight"
BARE = NAME.removeprefix("base_model.model.")


@pytest.fixture(scope="module")
def base() -> BaseModelInfo:
    return load_base_model(tiny_base_dir())


@pytest.mark.parametrize(
    ("renamed", "match"),
    [
        (NAME.replace(".weight", ".mine.weight"), "'mine' is an adapter's name"),
        (NAME.replace(".weight", ""), "PEFT would ignore it"),
        (NAME.replace("base_model.model.", "base_model.model._orig_mod."), r"'_orig_mod.' comes from torch\.compile"),
        (f"_orig_mod.{NAME}", r"torch\.compile"),
        (NAME.replace("layers.0.", "layers.0._orig_mod."), r"torch\.compile"),
        (f"module.{NAME}", "DistributedDataParallel"),
        (NAME.replace("layers.0.", "layers.0._fsdp_wrapped_module."), "FSDP"),
        (NAME.replace("layers.0.", "layers.0._checkpoint_wrapped_module."), "activation checkpointing"),
        (NAME.replace("model.model.layers", "model.model.language_model.layers"), "'language_model.' comes from"),
        (NAME.replace("base_model.model.", "base_model.model.language_model."), "'language_model.' comes from"),
        (BARE, "'base_model.model.' is missing in front"),
        (NAME.replace("model.model.model.", "model.model."), "PEFT would ignore it"),
    ],
)
def test_a_projection_under_another_name_is_refused_with_the_name_that_peft_loads(
    base: BaseModelInfo, renamed: str, match: str
) -> None:
    def rename(tensors: dict[str, Any]) -> None:
        tensors[renamed] = tensors.pop(NAME)

    with pytest.raises(AdapterIncompatibleError, match=match) as caught:
        read(base, change=rename)

    assert caught.value.message.startswith(f"tensor {renamed}: ")
    assert f"it loads {NAME}. Save with save_pretrained" in caught.value.message


@pytest.mark.parametrize(
    ("name", "match"),
    [
        (BARE.replace("lora_A.weight", "lora_a"), "MLX"),
        (BARE.replace("lora_A.weight", "lora.down.weight"), "diffusers"),
        ("lora_unet_" + BARE.replace(".", "_").replace("_lora_A_weight", ".lora_down.weight"), "kohya"),
        (f"{PREFIX}.alpha", "alpha is read from"),
        (f"{PREFIX}.base_layer.weight", "a weight of the base model"),
        ("base_model.model.model.layers.0.input_layernorm.weight", "a weight of the base model"),
        ("base_model.model.model.layers.0.mlp.experts.0.up_proj.lora_A.weight", "experts"),
    ],
)
def test_a_tensor_of_another_tool_is_named_for_what_it_is(base: BaseModelInfo, name: str, match: str) -> None:
    with pytest.raises(AdapterIncompatibleError, match=match):
        read(base, change=lambda tensors: tensors.update({name: np.zeros((4, 64), dtype=np.float32)}))
