"""Initialisations that change the base are refused as they are, and served once PEFT has converted them to plain LoRA."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from loraplex_common.adapter_image import LOW_RANK
from loraplex_common.errors import AdapterIncompatibleError
from peft import LoraConfig, get_peft_model
from support.peft_methods import base_info, base_model, peft_outputs, read_files

if TYPE_CHECKING:
    from pathlib import Path

NAME = "model.layers.1.self_attn.v_proj"


def trained(init: str, folder: Path, start: Path) -> Any:
    """Train a model from an initialisation that changes the base, and save where it started as PEFT says."""
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["v_proj"], task_type="CAUSAL_LM", init_lora_weights=init)  # type: ignore[arg-type]
    model: Any = get_peft_model(base_model("llama"), config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(str(start))
    model.peft_config["default"].init_lora_weights = init
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(
        str(folder), path_initial_model_for_weight_conversion=str(start) if folder.name == "to" else None
    )
    return model.base_model.model


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_converted_adapter_has_twice_the_rank_and_computes_what_was_trained(init: str, tmp_path: Path) -> None:
    model = trained(init, tmp_path / "to", tmp_path / "start")
    files = {each.name: each.read_bytes() for each in (tmp_path / "to").iterdir()}

    adapter = read_files(files, "llama")

    assert adapter.spec.max_rank == 6
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model.get_submodule(NAME)(x).numpy()
        base = base_model("llama").get_submodule(NAME)(x).numpy()
    a, b = adapter.tensors[1, "v_proj", LOW_RANK]
    ours = base + adapter.spec.modules[1].scaling * (x.numpy() @ a.T @ b.T)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(ours, peft_outputs(tmp_path / "to", "llama", {NAME: x})[NAME], rtol=1e-4, atol=1e-4)
    assert adapter.spec.modules[1].projection == base_info("llama").layers[1][2].name


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_unconverted_adapter_is_refused_with_the_remedy(init: str, tmp_path: Path) -> None:
    trained(init, tmp_path / "as is", tmp_path / "start")
    files = {each.name: each.read_bytes() for each in (tmp_path / "as is").iterdir()}

    with pytest.raises(AdapterIncompatibleError, match=rf'"{init}" changes the base .*path_initial_model_for_weight'):
        read_files(files, "llama")
