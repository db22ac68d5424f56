"""Rates fitted to measured steps: exact on made-up ones, and the built-in ones are those of the committed figures."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from loraplex_engine.decode_runs import MIN_DECODE_RUNS
from loraplex_engine.simulation.calibration import CalibrationError, MeasuredStep, Prior, errors, fit
from loraplex_engine.simulation.devices import DEVICES, H100, H100_PRIORS, H100_RESULTS
from loraplex_engine.simulation.measured import measured_step, measured_steps
from loraplex_engine.simulation.shapes import (
    ALL_TARGETS,
    KNOWN_SHAPES,
    ModelShape,
    ShapeError,
    base_model,
    base_model_from_config,
)
from loraplex_engine.simulation.step_cost import StepCost, StepRates

RESULTS = Path(__file__).resolve().parents[4] / "benchmarks" / "results"
CASES = [
    f"{shape}/{targets} r16/{kind}"
    for shape in ("llama2-7b", "llama3-8b")
    for targets in ("qkvo", "all")
    for kind in ("decode:1x320:0", "decode:64x320:64", "decode:256x900:200", "prefill:8x256:8", "prefill:2x2048:1")
]


def made_up_steps(rates: StepRates) -> list[MeasuredStep]:
    """Steps that take exactly what the rates say."""
    steps = [measured_step(case, 1.0) for case in CASES]
    return [replace(step, seconds=StepCost(step.shape, rates).seconds(step.load)) for step in steps]


def test_the_fit_finds_the_rates_that_made_the_steps() -> None:
    rates = H100.rates
    truth = StepRates(
        **{name: value * (1 + 0.2 * (i % 3 - 1)) for i, (name, value) in enumerate(asdict(rates).items())}
    )
    priors = {field.name: Prior(getattr(rates, field.name), 1.0) for field in fields(rates)}

    found = fit(made_up_steps(truth), priors, noise=1e-4)

    np.testing.assert_allclose(errors(made_up_steps(truth), found), 0.0, atol=1e-3)


def test_without_steps_the_priors_stand() -> None:
    found = fit([], H100_PRIORS)

    assert asdict(found) == pytest.approx({name: prior.value for name, prior in H100_PRIORS.items()})


def test_the_built_in_rates_are_the_committed_steps_rates() -> None:
    rows = [row for name in H100_RESULTS for row in json.loads((RESULTS / name).read_text())["rows"]]
    steps = measured_steps(rows)

    refitted = fit(steps, H100_PRIORS)

    assert asdict(H100.rates) == pytest.approx(asdict(refitted), rel=1e-3)
    wrong = np.abs(errors(steps, H100.rates))
    assert np.median(wrong) < 0.02
    assert wrong.max() < 0.1  # of prompts so short that latency, which the model does not have, is part of them
    assert len(steps) >= 50


def test_a_missing_prior_or_a_step_without_time_is_refused() -> None:
    with pytest.raises(CalibrationError, match="layer_s"):
        fit([], {name: prior for name, prior in H100_PRIORS.items() if name != "layer_s"})
    with pytest.raises(CalibrationError, match="no time"):
        fit([measured_step(CASES[0], 0.0)], H100_PRIORS)


@pytest.mark.parametrize(
    ("profiled", "named"),
    [
        ("decode, 64 x 320, 64 adapters", "decode:64x320:64"),
        ("decode, 1 x 320, 1 adapter", "decode:1x320:1"),
        ("decode, 256 x 320, no adapter", "decode:256x320:0"),
    ],
)
def test_a_profiled_step_is_the_load_its_name_says(profiled: str, named: str) -> None:
    step, other = (measured_step(f"llama2-7b/qkvo r16/{name}", 1.0) for name in (profiled, named))

    assert step.load == other.load


def test_a_mixed_step_is_its_decode_rows_and_its_prompts() -> None:
    mixed, decode, prompts = (
        measured_step(f"llama2-7b/qkvo r16/{name}", 1.0).load
        for name in ("mixed, 225 x 320 + 31 x 256, 200 adapters", "decode:225x320:200", "prefill:31x256:200")
    )

    sums = (
        "num_tokens",
        "num_sampled",
        "kv_tokens",
        "attention_pairs",
        "lora_bytes",
        "lora_row_bytes",
        "num_decode_rows",
    )
    for name in sums:
        assert getattr(mixed, name) == getattr(decode, name) + getattr(prompts, name), name
    assert mixed.adapter_beside_bytes == decode.adapter_bytes  # read by the decode kernels
    assert mixed.adapter_bytes == measured_step("llama2-7b/qkvo r16/prefill:31x256:31", 1.0).load.adapter_bytes
    assert (mixed.lora_ops, mixed.lora_prompt_ops, mixed.lora_runs) == (2, 2, 0)
    assert (decode.lora_ops, decode.lora_prompt_ops, decode.lora_runs) == (2, 0, 0)


@pytest.mark.parametrize(("rows", "adapters", "runs"), [(MIN_DECODE_RUNS - 1, 48, MIN_DECODE_RUNS - 1), (200, 1, 1)])
def test_decode_rows_of_few_runs_are_runs_of_the_prefill_kernel(rows: int, adapters: int, runs: int) -> None:
    name = f"mixed, {rows} x 320 + 2 x 256, {adapters} adapter{'s' if adapters > 1 else ''}"

    load = measured_step(f"llama2-7b/qkvo r16/{name}", 1.0).load

    assert (load.lora_ops, load.lora_prompt_ops, load.lora_runs) == (0, 2, runs * 4)
    assert load.adapter_bytes == measured_step(f"llama2-7b/qkvo r16/prefill:64x1:{adapters}", 1.0).load.adapter_bytes
    assert load.adapter_beside_bytes == 0


def test_what_lora_takes_is_read_off_differences() -> None:
    """A base that the model gets wrong by a tenth leaves LoRA's rates alone."""
    rates = {field.name: getattr(H100.rates, field.name) for field in fields(H100.rates)}
    of_lora = [name for name in rates if name.startswith(("lora", "adapter"))]
    priors = {name: Prior(value * (0.5 if name in of_lora else 1.0), 1.0) for name, value in rates.items()}
    kinds = ("decode:8x64", "decode:64x320", "decode:256x320", "prefill:8x256", "prefill:2x2048")
    cases = [f"llama2-7b/qkvo r16/{kind}:{adapters}" for kind in kinds for adapters in (0, 1, 2)]
    steps = []
    for case in cases:
        step = measured_step(case, 1.0)
        alone = measured_step(case.rpartition(":")[0] + ":0", 1.0)
        cost = StepCost(step.shape, H100.rates)
        steps.append(replace(step, seconds=cost.seconds(step.load) + 0.1 * cost.seconds(alone.load)))

    found = fit(steps, priors)

    for base, *adapted in zip(*[iter(steps)] * 3, strict=True):
        for step in adapted:
            cost = StepCost(step.shape, found)
            assert cost.seconds(step.load) - cost.seconds(base.load) == pytest.approx(
                step.seconds - base.seconds, rel=0.05, abs=2e-5
            )


@pytest.mark.parametrize("case", ["llama2-7b/qkvo r16/burst:0:512", "decode:1x1:0", ""])
def test_a_case_that_is_no_step_is_refused(case: str) -> None:
    with pytest.raises(CalibrationError, match="is neither SHAPE"):
        measured_step(case, 1.0)


def test_sizes_are_those_of_the_published_models() -> None:
    shapes = {name: ModelShape(base_model(name)) for name in KNOWN_SHAPES}

    # parameters, embeddings counted once for the head; from the models' cards
    billions = {name: (s.layer_weights + 2 * s.head_weights) / 1e9 for name, s in shapes.items()}
    assert billions["llama2-7b"] == pytest.approx(6.74, rel=0.01)
    assert billions["llama2-13b"] == pytest.approx(13.02, rel=0.01)
    assert billions["llama3-8b"] == pytest.approx(8.03, rel=0.01)
    assert billions["llama3-70b"] == pytest.approx(70.55, rel=0.01)
    assert shapes["llama2-7b"].kv_bytes_per_token == 512 * 1024
    assert shapes["llama3-8b"].kv_bytes_per_token == 128 * 1024
    assert shapes["llama2-7b"].adapter(16).weight_bytes == 32 * 2**20
    assert shapes["llama3-8b"].adapter(16, ALL_TARGETS).weight_bytes == 80 * 2**20


def test_a_config_json_gives_the_same_sizes_as_the_name() -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 131072,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    }

    info = base_model_from_config("llama3-8b", config)

    assert replace(info, config={}) == base_model("llama3-8b")
    with pytest.raises(ShapeError, match="vocab_size"):
        base_model_from_config("x", {k: v for k, v in config.items() if k != "vocab_size"})
    with pytest.raises(ShapeError, match="gpt"):
        base_model("gpt")


SIZES: dict[str, Any] = {
    "num_hidden_layers": 3,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
}


def test_a_fused_module_is_one_module_of_an_adapter() -> None:
    phi = ModelShape(base_model_from_config("phi", SIZES | {"architectures": ["Phi3ForCausalLM"]}))
    llama = ModelShape(base_model_from_config("llama", SIZES | {"architectures": ["LlamaForCausalLM"]}))

    fused, apart = phi.adapter(16, ALL_TARGETS), llama.adapter(16, ALL_TARGETS)

    assert phi.layer_weights == llama.layer_weights
    assert (fused.num_projections, fused.num_ops) == (4, 4)
    assert (apart.num_projections, apart.num_ops) == (7, 4)
    # qkv_proj, o_proj, gate_up_proj and down_proj: A is as wide as the input, B as the output, in bf16
    assert fused.weight_bytes == 3 * 16 * (512 + 768 + 512 + 512 + 512 + 2048 + 1024 + 512) * 2
    assert phi.adapter(16).num_projections == 2


@pytest.mark.parametrize("architecture", ["Glm4ForCausalLM", "SeedOssForCausalLM"])
def test_an_omitted_head_size_is_what_the_architecture_takes_it_for(architecture: str) -> None:
    shape = ModelShape(base_model_from_config("x", SIZES | {"architectures": [architecture]}))

    assert shape.info.head_dim == 128
    assert shape.kv_bytes_per_token == 2 * 3 * 2 * 128 * 2


def test_a_multimodal_model_is_sized_by_its_text_part_if_that_is_asked_for() -> None:
    text = {"model_type": "gemma3_text", "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 3}
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text, "vision_config": {}}

    with pytest.raises(ShapeError, match=r"x: config.json: Gemma3ForConditionalGeneration takes images"):
        base_model_from_config("x", config)
    info = base_model_from_config("x", config, text_only=True)

    assert (info.num_layers, info.head_dim, info.vocab_size) == (3, 256, 262208)


def test_a_model_that_does_not_fit_is_refused_with_its_size() -> None:
    with pytest.raises(ShapeError, match=r"131\.\d GiB"):
        H100.pool_bytes(ModelShape(base_model("llama3-70b")))
    assert all(device.is_measured == (device is H100) for device in DEVICES.values())
