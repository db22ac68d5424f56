"""A base in FP8 with adapters, against transformers in fp32 on the weights that the FP8 ones stand for.

Two truths: whole activations, from which quantised ones differ by an error that is stated here, with adapters as without; and
activations that hooks quantise before the base's products only, from which little but the order of sums is left.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from loraplex_engine.model.weight_form import WeightForm
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from support.adapters import Recipe, write_adapter
from support.base_models import TinyBase, write_base_model
from support.decoder_shapes import PROJECTIONS
from support.oracle import Oracle, make_rig
from support.quantised import compressed_tensors, fp8, write_quantised
from support.teacher_forcing import NUM_FORCED, add_sequences

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from support.quantised import Pack
    from torch import Tensor

BASE = TinyBase(hidden_size=256, intermediate_size=384, num_heads=4, num_kv_heads=2, head_dim=64)
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
GROUP = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}
CHANNELS = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": GROUP}}
FORMS: dict[str, tuple[Pack, dict[str, Any]]] = {
    "blocks": (fp8((128, 128), "weight_scale_inv"), FP8 | {"weight_block_size": [128, 128]}),
    "channel": (compressed_tensors("float-quantized", num_bits=8, type="float", strategy="channel"), CHANNELS),
}
MEAN_ERROR, LARGEST_ERROR = 0.08, 0.2
"""What quantised activations add to log probabilities in two layers of random weights, over the largest logit of the row."""
LARGEST_RATIO = 1.4
"""Mean errors with an adapter and without differ by at most this factor."""
LEAST_ROUNDING, MEAN_ROUNDING = 1e-4, 0.02
"""What is left where the truth quantises activations, too: at the tenth of positions with the least, and at all on average.

Now and then a number falls on the other side of a tie, and all later positions of its sequence differ.
"""


def make_dora(folder: Path, base_dir: Path) -> Path:
    config = LoraConfig(r=3, lora_alpha=5, target_modules=list(PROJECTIONS), use_dora=True, task_type="CAUSAL_LM")
    model: Any = get_peft_model(Oracle(base_dir).model, config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = 0.1 * torch.randn(parameter.shape, generator=generator)
                parameter.copy_(parameter * (1 + noise) if "magnitude" in name else parameter + noise)
    model.save_pretrained(str(folder / "dora"))
    return folder / "dora"


class Case:
    """A checkpoint, its adapters, and what an engine in FP8 makes of some sequences."""

    def __init__(self, folder: Path, form: str) -> None:
        self.whole = write_base_model(folder / "whole", BASE)
        quantised = write_quantised(self.whole, folder / "quantised", *FORMS[form])
        self.is_blocked = form == "blocks"
        self.adapters = {
            "lora": write_adapter(folder / "lora", self.whole, Recipe(rank=8, rank_pattern={"q_proj": 3}, seed=1)),
            "dora": make_dora(folder, self.whole),
        }
        self.oracle = Oracle(self.whole, self.adapters)
        rig = make_rig(quantised, self.adapters, weight_form=WeightForm.FP8)
        rng = np.random.default_rng(0)
        self.added = add_sequences(rig, self.oracle, rng, BASE.vocab_size)
        rig.harness.generate([sequence for _, sequence in self.added], NUM_FORCED + 1)
        rig.runner.close()

    def errors(self) -> dict[str | None, list[float]]:
        """Each position's error, by adapter."""
        found: dict[str | None, list[float]] = {name: [] for name in (None, *self.adapters)}
        for name, sequence in self.added:
            truth = self.oracle.logits([*sequence.prompt, *sequence.forced[:NUM_FORCED]], name)
            entries = [*sequence.prompt_logprobs, *sequence.logprobs]
            for logits, entry in zip(truth, entries, strict=True):
                wide = logits.astype(np.float64)
                expected = wide - np.logaddexp.reduce(wide)
                own = np.empty_like(expected)
                own[entry.token_ids[1:]] = entry.logprobs[1:]
                found[name].append(float(np.abs(own - expected).max() / np.abs(logits).max()))
        return found


@pytest.fixture(scope="module", params=FORMS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp(request.param), request.param)


def test_the_error_of_quantised_activations_is_bounded_and_equal_with_and_without_adapters(case: Case) -> None:
    errors = case.errors()

    means = {name: float(np.mean(each)) for name, each in errors.items()}
    assert 1e-3 < means[None] < MEAN_ERROR
    assert max(max(each) for each in errors.values()) < LARGEST_ERROR
    for name in case.adapters:
        assert 1 / LARGEST_RATIO < means[name] / means[None] < LARGEST_RATIO, means


def test_adapters_read_activations_that_are_not_quantised(case: Case) -> None:
    bases = [module.get_base_layer() for module in case.oracle.model.modules() if isinstance(module, LoraLayer)]
    hooks = [base.register_forward_pre_hook(quantising_hook(is_blocked=case.is_blocked)) for base in bases]

    errors = case.errors()

    for hook in hooks:
        hook.remove()
    assert len(bases) == 7 * BASE.num_layers
    for name, each in errors.items():
        assert np.quantile(each, 0.1) < LEAST_ROUNDING, name
        assert np.mean(each) < MEAN_ROUNDING, name


def quantising_hook(*, is_blocked: bool) -> Callable[[Any, tuple[Tensor]], Tensor]:
    """Return what quantises a layer's input by the definition, for a token or for each 128 of its inputs."""

    def quantise(_: Any, inputs: tuple[Tensor]) -> Tensor:
        (x,) = inputs
        groups = torch.unflatten(x, -1, (-1, 128)) if is_blocked else x.unsqueeze(-2)
        scales = groups.abs().amax(-1, keepdim=True) / 448
        return ((groups / scales).to(torch.float8_e4m3fn).float() * scales).reshape(x.shape)

    return quantise
