"""What the store reads of each of PEFT's methods computes in fp32 what PEFT computes with the same files."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from loraplex_common.adapter_image import LOW_RANK
from loraplex_common.sparse_delta import SPARSE_DELTA
from loraplex_common.vectors import BIAS, IN_VECTOR, OUT_VECTOR
from peft import AdaLoraConfig, IA3Config, LoraConfig, ShiraConfig, VeraConfig
from support.decoder_shapes import PROJECTIONS
from support.peft_methods import base_info, base_model, outputs_of, peft_outputs, read_files, save_trained

if TYPE_CHECKING:
    from pathlib import Path

ALL = list(PROJECTIONS)
QKV = ["q_proj", "k_proj", "v_proj"]


def shrink(model: Any) -> None:
    """Give AdaLoRA's modules the ranks that a budget could have left: of the first one none at all."""
    ranks = itertools.chain([0, 1], itertools.repeat(2))
    model.peft_config["default"].rank_pattern = {
        name.removeprefix("base_model.model."): [index < rank for index in range(4)]
        for (name, _), rank in zip(((n, p) for n, p in model.named_parameters() if "lora_E" in n), ranks, strict=False)
    }


CASES: dict[str, tuple[set[str], Any, dict[str, Any]]] = {
    "lora": ({LOW_RANK}, LoraConfig(r=3, lora_alpha=5, target_modules=ALL), {}),
    "dora": ({LOW_RANK, OUT_VECTOR}, LoraConfig(r=3, lora_alpha=5, target_modules=ALL, use_dora=True), {}),
    "dora, rslora, patterns": (
        {LOW_RANK, OUT_VECTOR},
        LoraConfig(
            r=3,
            use_rslora=True,
            target_modules=["q_proj", "o_proj"],
            use_dora=True,
            rank_pattern={"q_proj": 5},
            alpha_pattern={"layers.1.self_attn.o_proj": 2},
        ),
        {},
    ),
    "lora_bias": ({LOW_RANK, BIAS}, LoraConfig(r=3, lora_alpha=5, target_modules=ALL, lora_bias=True), {}),
    "bias lora_only": ({LOW_RANK, BIAS}, LoraConfig(r=3, target_modules=["q_proj", "up_proj"], bias="lora_only"), {}),
    "bias all": ({LOW_RANK, BIAS}, LoraConfig(r=3, target_modules=["q_proj"], bias="all"), {}),
    "dora, bias all": (
        {LOW_RANK, OUT_VECTOR, BIAS},
        LoraConfig(r=3, target_modules=["q_proj", "v_proj"], bias="all", use_dora=True),
        {},
    ),
    "lora_bias, bias all": (
        {LOW_RANK, BIAS},
        LoraConfig(r=3, target_modules=["k_proj"], lora_bias=True, bias="all"),
        {},
    ),
    "ia3": (
        {OUT_VECTOR, IN_VECTOR},
        IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
        {},
    ),
    "ia3 on outputs": ({OUT_VECTOR}, IA3Config(target_modules=ALL, feedforward_modules=[]), {}),
    "ia3 on inputs by pattern": (
        {OUT_VECTOR, IN_VECTOR},
        IA3Config(target_modules=["q_proj", "o_proj", "down_proj"], feedforward_modules=r".*(o|down)_proj"),
        {},
    ),
    "adalora": ({LOW_RANK}, AdaLoraConfig(init_r=4, lora_alpha=7, target_modules=ALL, total_step=10), {}),
    "adalora after its budget": (
        {LOW_RANK},
        AdaLoraConfig(init_r=4, lora_alpha=7, target_modules=["q_proj", "v_proj"], total_step=10),
        {"before_save": shrink},
    ),
    "vera": ({LOW_RANK}, VeraConfig(r=6, target_modules=ALL), {}),
    "vera, biases": ({LOW_RANK, BIAS}, VeraConfig(r=6, target_modules=["v_proj"], bias="vera_only"), {}),
    "shira": ({SPARSE_DELTA}, ShiraConfig(r=2, target_modules=ALL, random_seed=3), {}),
}


@pytest.mark.parametrize(
    ("case", "base", "dtype"),
    [
        *((case, "llama", torch.float32) for case in CASES),
        *((case, "qwen2", torch.bfloat16) for case in CASES),
        *((case, "bf16", torch.float32) for case in CASES if "bias" in case),
    ],
)
def test_a_method_computes_what_peft_computes(case: str, base: str, dtype: torch.dtype, tmp_path: Path) -> None:
    kinds, config, more = CASES[case]
    config.task_type, has_biases = "CAUSAL_LM", base != "llama"
    files = save_trained(tmp_path, base, config, dtype=dtype, **more)

    adapter = read_files(files, base)

    found = {kind for _, _, kind in adapter.tensors}
    assert found == (kinds if has_biases or "lora_bias" in case else kinds - {BIAS})
    model = base_model(base)
    generator = torch.Generator().manual_seed(1)
    inputs = {
        f"model.layers.{layer}.{each.path}": torch.randn(3, each.in_features, generator=generator)
        for layer, offered in enumerate(base_info(base).layers)
        for each in offered
    }
    expected = peft_outputs(tmp_path, base, inputs)
    parts: dict[str, dict[str, Any]] = {name: {} for name in inputs}
    for module in adapter.spec.modules:
        path = next(each.path for each in base_info(base).layers[0] if each.name == module.projection)
        for part in module.parts:
            values = adapter.tensors[module.layer, module.projection, part.kind]
            parts[f"model.layers.{module.layer}.{path}"][part.kind] = part, values
    for name, x in inputs.items():
        ours = outputs_of(parts[name], model.get_submodule(name), x.numpy().astype(np.float64))
        np.testing.assert_allclose(ours, expected[name], rtol=2e-5, atol=2e-5, err_msg=name)
