"""A quantised base served to clients: adapters of several kinds, alone and in one batch, answer as they do on its whole weights."""

from __future__ import annotations

import asyncio
import json
from contextlib import closing
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from loraplex_client import AsyncClient
from peft import IA3Config, LoraConfig, get_peft_model
from support.base_models import TinyBase, write_base_model
from support.decoder_shapes import PROJECTIONS
from support.oracle import Oracle
from support.quantised import compressed_tensors, gptq, write_quantised
from support.serve_process import SMALL, ServeProcess

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from support.quantised import Pack

pytestmark = pytest.mark.integration

BASE = TinyBase(hidden_size=128, intermediate_size=192)
NUM_TOKENS = 8
NAMES = (None, "pair", "magnitude", "scaling")
CHANNEL: dict[str, Any] = {"num_bits": 8, "type": "float", "strategy": "channel"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}
FP8 = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": CHANNEL}},
    "ignore": ["lm_head"],
}
FORMS: dict[str, tuple[Pack, dict[str, Any]]] = {
    "gptq": (gptq(4, 32, shuffled=True), GPTQ),
    "fp8": (compressed_tensors("float-quantized", **CHANNEL), FP8),
}


def write_adapters(folder: Path, whole: Path) -> dict[str, Path]:
    """Write adapters of three kinds that peft has made of random numbers."""
    lora: dict[str, Any] = {"lora_alpha": 8, "target_modules": list(PROJECTIONS), "task_type": "CAUSAL_LM"}
    ia3 = IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    )
    configs = {"pair": LoraConfig(r=8, **lora), "magnitude": LoraConfig(r=3, use_dora=True, **lora), "scaling": ia3}
    generator = torch.Generator().manual_seed(5)
    for name, config in configs.items():
        model: Any = get_peft_model(Oracle(whole).model, config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    noise = 0.2 * torch.randn(parameter.shape, generator=generator)
                    parameter.copy_(parameter * (1 + noise) if name == "scaling" else parameter + noise)
        model.save_pretrained(str(folder / name))
    return {name: folder / name for name in configs}


async def answers(client: AsyncClient, prompts: Sequence[list[int]], *, together: bool) -> list[list[int]]:
    """Return the tokens of each prompt with each adapter and without, one after another or in one batch."""

    async def one(prompt: list[int], adapter: str | None) -> list[int]:
        sampling: dict[str, Any] = {"max_new_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
        done = await client.generate_once(prompt_token_ids=prompt, adapter=adapter, **sampling)
        return list(done.token_ids)

    calls = [one(prompt, name) for name in NAMES for prompt in prompts]
    return list(await asyncio.gather(*calls)) if together else [await call for call in calls]


@pytest.mark.parametrize("form", FORMS)
async def test_adapters_on_a_quantised_base_answer_alone_and_together_as_on_its_whole_weights(
    tmp_path: Path, form: str
) -> None:
    whole = write_base_model(tmp_path / "whole", BASE)
    quantised = write_quantised(whole, tmp_path / "quantised", *FORMS[form])
    adapters = write_adapters(tmp_path / "adapters", whole)
    oracles = {name: Oracle(whole, {name: adapters[name]} if name else None) for name in NAMES}
    rng = np.random.default_rng(7)
    prompts = [rng.integers(4, BASE.vocab_size, 9).tolist() for _ in range(2)]
    truth = [oracles[name].greedy(prompt, NUM_TOKENS, name) for name in NAMES for prompt in prompts]

    with closing(ServeProcess(tmp_path / "data", "--model", str(quantised), "--dtype", "float32", *SMALL)) as served:
        async with AsyncClient(served.grpc, store_target=served.store) as client:
            for name, directory in adapters.items():
                await client.adapters.upload(name, directory)
            alone = await answers(client, prompts, together=False)
            together = await answers(client, prompts, together=True)

    assert alone == truth
    assert together == truth
    assert len({json.dumps(tokens) for tokens in truth}) > len(prompts)  # adapters change something
