"""A tensor that PEFT would ignore and no dialect knows is refused with the name that PEFT loads, or named for what it is."""

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


@pytest.fixture(scope="module")
def base() -> BaseModelInfo:
    return load_base_model(tiny_base_dir())


@pytest.mark.parametrize(
    "renamed",
    [
        f"x.{NAME}",
        f"base_model.model.{NAME}",
        NAME.replace("layers.0.", "layers.0.block."),
        NAME.replace(".lora_A", ".inner.lora_A"),
    ],
)
def test_a_projection_under_another_name_is_refused_with_the_name_that_peft_loads(
    base: BaseModelInfo, renamed: str
) -> None:
    def rename(tensors: dict[str, Any]) -> None:
        tensors[renamed] = tensors.pop(NAME)

    with pytest.raises(AdapterIncompatibleError, match="PEFT would ignore it") as caught:
        read(base, change=rename)

    assert caught.value.message.startswith(f"tensor {renamed}: ")
    assert f"it loads {NAME}. Save with save_pretrained" in caught.value.message


@pytest.mark.parametrize(
    ("name", "match"),
    [
        (f"{PREFIX}.base_layer.weight", "a weight of the base model"),
        ("base_model.model.model.layers.0.input_layernorm.weight", "a weight of the base model"),
        ("base_model.model.model.layers.0.mlp.experts.0.up_proj.lora_A.weight", "experts"),
    ],
)
def test_a_tensor_of_another_tool_is_named_for_what_it_is(base: BaseModelInfo, name: str, match: str) -> None:
    with pytest.raises(AdapterIncompatibleError, match=match):
        read(base, change=lambda tensors: tensors.update({name: np.zeros((4, 64), dtype=np.float32)}))
