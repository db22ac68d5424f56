"""Checkpoints of PEFT's methods: their spellings, what is refused of them and why, and what is odd but served."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from loraplex_adapter_store.checkpoint.canonical import canonicalise, read_canonical
from loraplex_adapter_store.checkpoint.peft_methods import METHODS, REFUSED_METHODS
from loraplex_common.errors import AdapterCorruptUploadError, AdapterIncompatibleError
from loraplex_common.flora import FLORA
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftType
from support.method_files import SETTINGS, read_method
from support.peft_methods import base_dir, base_info

if TYPE_CHECKING:
    from loraplex_common.base_model import BaseModelInfo

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
V0 = "base_model.model.model.layers.0.self_attn.v_proj"
DOWN0 = "base_model.model.model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def base() -> BaseModelInfo:
    return base_info("llama")


def renamed(pattern: str, by: str) -> Any:
    def change(tensors: dict[str, Any]) -> None:
        for name in list(tensors):
            tensors[re.sub(pattern, by, name)] = tensors.pop(name)

    return change


def put(name: str, values: Any) -> Any:
    return lambda tensors: tensors.update({name: np.asarray(values, dtype=np.float32)})


def drop(name: str) -> Any:
    return lambda tensors: tensors.pop(name)


def scaled(end: str, by: float) -> Any:
    def change(tensors: dict[str, Any]) -> None:
        for name in tensors:
            if name.endswith(end):
                tensors[name] = (tensors[name] * by).astype(np.float32)

    return change


@pytest.mark.parametrize(
    ("method", "pattern", "by"),
    [
        ("dora", "lora_magnitude_vector$", "lora_magnitude_vector.weight"),
        ("dora", "lora_magnitude_vector$", "lora_magnitude_vector.default"),
        ("dora", "lora_magnitude_vector$", "lora_magnitude_vector.default.weight"),
        ("dora", r"\.weight$", ".default.weight"),
        ("lora_bias", r"lora_B\.", "lora_B.default."),
        *((method, "$", name) for method in ("adalora", "vera", "ia3", "shira") for name in (".default", ".math")),
    ],
)
def test_every_spelling_that_peft_had_makes_one_revision(
    base: BaseModelInfo, method: str, pattern: str, by: str
) -> None:
    expected = canonicalise(read_method(base, method)).revision

    assert canonicalise(read_method(base, method, change=renamed(pattern, by))).revision == expected


def test_two_spellings_of_one_tensor_are_refused(base: BaseModelInfo) -> None:
    with pytest.raises(AdapterCorruptUploadError, match=r"lora_magnitude_vector\.weight appears twice"):
        read_method(base, "dora", change=put(f"{Q0}.lora_magnitude_vector.weight", np.ones(64)))


@pytest.mark.parametrize(
    ("method", "change", "config", "match"),
    [
        ("dora", drop(f"{V0}.lora_magnitude_vector"), {}, f"{V0}.lora_magnitude_vector is missing.* use_dora"),
        ("dora", None, {"use_dora": False}, "lora_magnitude_vector: .* use_dora = true"),
        ("dora", None, {"lora_bias": True}, "lora_bias"),
        ("dora", put(f"{Q0}.lora_magnitude_vector", np.ones((64, 1))), {}, r"shape \[64, 1\], expected \[64\]"),
        ("lora_bias", drop(f"{V0}.lora_B.bias"), {}, f"{V0}.lora_B.bias is missing.* lora_bias"),
        ("lora_bias", None, {"lora_bias": False}, "lora_B.bias: .* lora_bias = true"),
        ("lora", put(f"{Q0}.base_layer.bias", np.ones(64)), {}, "base_layer.bias: biases are served only"),
        ("lora", put(f"{Q0}.ia3_l", np.ones((64, 1))), {}, "only peft_type IA3"),
        ("lora", put(f"{Q0}.lora_E", np.ones((4, 1))), {}, "only peft_type ADALORA"),
        ("lora", put("base_model.vera_A", np.ones((4, 64))), {}, "only peft_type VERA"),
        ("ia3", put(f"{Q0}.shira_weight", np.ones(3)), {}, "only peft_type SHIRA"),
        ("adalora", drop(f"{Q0}.lora_E"), {}, f"{Q0}.lora_E is missing"),
        ("adalora", None, {"init_r": 3}, r"expected \[3, .*init_r"),
        (
            "adalora",
            None,
            {"rank_pattern": {"model.layers.0.mlp.up_proj.lora_E": [True]}},
            "rank_pattern names .*up_proj",
        ),
        ("adalora", None, {"use_dora": True}, "use_dora"),
        ("vera", renamed("([AB]|lambda_[bd])$", r"\1.\1"), {}, "several adapters: tensor .*vera_A.A is of 'A'"),
        ("vera", drop("base_model.vera_A"), {}, r"base_model\.vera_A is missing: .* save_projection = true"),
        ("vera", None, {"save_projection": False}, "save_projection = false: .* convert_to_lora"),
        ("vera", put("base_model.vera_A", np.ones((4, 64))), {}, r"vera_A has shape \[4, 64\], expected \[4, 128\]"),
        ("vera", None, {"r": 5}, r"expected \[4?5"),
        ("ia3", None, {"feedforward_modules": None}, "feedforward_modules is missing"),
        ("ia3", None, {"feedforward_modules": []}, r"ia3_l has shape \[1, 128\], expected \[64, 1\]: .*feedforward"),
        ("shira", drop(f"{V0}.shira_indices"), {}, f"{V0}.shira_indices is missing.* random generator"),
        ("shira", None, {"r": 3}, "shira_weight has shape .* r = 3"),
        ("shira", put(f"{Q0}.shira_indices", np.full((2, 200), 64)), {}, "expected .2, 256"),
        ("flora", None, {"r": 9}, "rank 9 .* at most 8 are served: train with a smaller rank"),
        ("flora", None, {"lora_alpha": 4}, "lora_alpha"),
    ],
)
def test_a_file_and_a_configuration_that_disagree_are_refused_by_name(
    base: BaseModelInfo, method: str, change: Any, config: dict[str, Any], match: str
) -> None:
    with pytest.raises(AdapterIncompatibleError, match=match):
        read_method(base, method, change=change, **config)


@pytest.mark.parametrize("index", [[64, 0], [0, 64], [-1, 0], [0.5, 0], [float("nan"), 0]])
def test_an_index_outside_the_projection_is_refused(base: BaseModelInfo, index: list[float]) -> None:
    def change(tensors: dict[str, Any]) -> None:
        tensors[f"{Q0}.shira_indices"][:, 7] = index

    with pytest.raises(AdapterCorruptUploadError, match="shira_indices holds an index outside"):
        read_method(base, "shira", change=change)


def test_a_place_that_appears_twice_is_refused(base: BaseModelInfo) -> None:
    def change(tensors: dict[str, Any]) -> None:
        tensors[f"{Q0}.shira_indices"][:, 7] = tensors[f"{Q0}.shira_indices"][:, 11]

    with pytest.raises(AdapterCorruptUploadError, match="appears twice"):
        read_method(base, "shira", change=change)


@pytest.mark.parametrize("value", [np.nan, np.inf, 3.4e38])
@pytest.mark.parametrize(
    ("method", "end"),
    [
        ("dora", "lora_magnitude_vector"),
        ("lora_bias", "lora_B.bias"),
        ("adalora", "lora_E"),
        ("vera", "vera_B"),
        ("vera", "vera_lambda_d"),
        ("ia3", "ia3_l"),
        ("shira", "shira_weight"),
        ("flora", "lora_A.weight"),
    ],
)
def test_values_that_are_not_finite_are_refused_by_name(
    base: BaseModelInfo, method: str, end: str, value: float
) -> None:
    def change(tensors: dict[str, Any]) -> None:
        next(values for name, values in tensors.items() if name.endswith(end)).flat[2] = value

    with pytest.raises(AdapterCorruptUploadError, match=end):
        read_method(base, method, change=change)


@pytest.mark.parametrize(
    ("method", "end"),
    [
        ("dora", "lora_magnitude_vector"),
        ("dora", "lora_B.weight"),
        ("lora_bias", "lora_B.bias"),
        ("adalora", "lora_E"),
        ("vera", "vera_B"),
        ("ia3", "ia3_l"),
        ("shira", "shira_weight"),
        ("flora", "lora_A.weight"),
    ],
)
def test_values_that_would_leave_the_range_of_engines_are_refused(base: BaseModelInfo, method: str, end: str) -> None:
    read_method(base, method, change=scaled(end, 1e4))
    with pytest.raises(AdapterCorruptUploadError, match=r"a forward pass leaves the range|beyond bf16's range"):
        read_method(base, method, change=scaled(end, 1e30))


@pytest.mark.parametrize(
    ("method", "end"), [("dora", "magnitude_vector"), ("ia3", "ia3_l"), ("flora", "lora_A.weight")]
)
def test_factors_that_are_all_zero_are_taken_with_a_warning(base: BaseModelInfo, method: str, end: str) -> None:
    warnings = read_method(base, method, change=scaled(end, 0)).warnings

    assert len([each for each in warnings if "all its factors are 0" in each]) == 6


@pytest.mark.parametrize(
    ("method", "change"),
    [
        ("adalora", scaled("lora_E", 0)),
        ("vera", scaled("lambda_b", 0)),
        ("shira", scaled("shira_weight", 0)),
        ("ia3", lambda tensors: [values.fill(1) for values in tensors.values()]),
    ],
)
def test_an_untrained_adapter_is_taken_with_a_warning(base: BaseModelInfo, method: str, change: Any) -> None:
    assert any("answers as the base model does" in each for each in read_method(base, method, change=change).warnings)
    assert read_method(base, method).warnings == ()


@pytest.mark.parametrize("scaled_too", [False, True], ids=["others unscaled", "others scaled differently"])
def test_projections_of_one_input_that_scale_it_differently_are_refused_by_name(
    base: BaseModelInfo, scaled_too: bool
) -> None:
    names = ["q_proj", "k_proj", "v_proj"] if scaled_too else ["q_proj"]

    def change(tensors: dict[str, Any]) -> None:
        tensors.clear()
        for layer in range(2):
            for index, name in enumerate(names):
                tensors[f"base_model.model.model.layers.{layer}.self_attn.{name}.ia3_l"] = np.full(
                    (1, 64), 1 + index, dtype=np.float32
                )

    with pytest.raises(
        AdapterIncompatibleError, match="layer 0: q_proj, k_proj, v_proj are computed from one input, and k_"
    ):
        read_method(base, "ia3", change=change, target_modules=names, feedforward_modules=names)


def test_projections_of_one_input_that_scale_it_alike_are_served(base: BaseModelInfo) -> None:
    names = ["q_proj", "k_proj", "v_proj"]

    def change(tensors: dict[str, Any]) -> None:
        tensors.clear()
        for layer in range(2):
            for name in names:
                tensors[f"base_model.model.model.layers.{layer}.self_attn.{name}.ia3_l"] = np.full(
                    (1, 64), 2, dtype=np.float32
                )

    assert len(read_method(base, "ia3", change=change, target_modules=names, feedforward_modules=names).modules) == 6


def test_a_trained_bias_needs_the_base_models_own(base: BaseModelInfo) -> None:
    add = put(f"{Q0}.base_layer.bias", np.ones(64))
    with pytest.raises(
        AdapterIncompatibleError, match=f"{Q0}.base_layer.bias: the base model's own bias .* no directory"
    ):
        read_method(base_info("qwen2"), "lora", change=add, bias="all")
    with pytest.raises(AdapterIncompatibleError, match=r"model\.layers\.0\.self_attn\.q_proj of llama has no bias"):
        read_method(base, "lora", change=add, bias="all", base_dir=base_dir("llama"))
    with pytest.raises(AdapterIncompatibleError, match=r"PEFT ignores it.* it loads .*base_layer\.bias"):
        read_method(base, "lora", change=put(f"{Q0}.bias", np.ones(64)), bias="all")
    name = f"{Q0.replace('q_proj', 'k_proj')}.base_layer.bias"
    with pytest.raises(AdapterIncompatibleError, match="not explained by target_modules"):
        read_method(base, "lora", change=put(name, np.ones(32)), bias="all")


@pytest.mark.parametrize(
    ("name", "size"), [(f"{Q0}.base_layer.bias", 64), (f"{Q0.replace('q_proj', 'k_proj')}.bias", 32)]
)
def test_a_trained_bias_of_an_activated_adapter_is_refused(name: str, size: int) -> None:
    settings: dict[str, Any] = {"bias": "all", "base_dir": base_dir("qwen2"), "alora_invocation_tokens": [5, 6]}
    with pytest.raises(
        AdapterIncompatibleError, match=rf"tensor {name}: .*alora_invocation_tokens: PEFT adds it .*before"
    ):
        read_method(base_info("qwen2"), "lora", change=put(name, np.ones(size)), **settings)
    assert read_method(base_info("qwen2"), "lora_bias", alora_invocation_tokens=[5, 6]).invocation_token_ids == (5, 6)


def test_floras_factors_are_read_as_they_are_written(base: BaseModelInfo) -> None:
    checkpoint = read_method(base, "flora")
    form = canonicalise(checkpoint)
    a, b = read_canonical(b"".join(form.chunks()), form.revision).tensors[0, "down_proj", FLORA]

    assert (a.shape, b.shape) == ((2, 128), (64, 2))
    tensors: dict[str, Any] = {}
    read_method(base, "flora", change=lambda each: tensors.update(each))
    np.testing.assert_array_equal(a, tensors[f"{DOWN0}.lora_A.weight"])
    np.testing.assert_array_equal(b, tensors[f"{DOWN0}.lora_B.weight"])


def test_every_method_of_peft_is_served_or_refused_with_a_remedy(base: BaseModelInfo) -> None:
    for each in PeftType:
        assert (each.value in METHODS) is not (each.value in REFUSED_METHODS), each
        if each.value in REFUSED_METHODS:
            with pytest.raises(
                AdapterIncompatibleError, match=rf'peft_type "{each.value}" \(.+\) is not served, .*: \w+'
            ):
                read_method(base, "lora", peft_type=each.value)


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"FLORA"}))
def test_every_setting_that_peft_has_is_used_harmless_or_refused(method: str) -> None:
    config: Any = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method)]
    names = {field.name for field in dataclasses.fields(config)}

    assert not {name for name in names if not METHODS[method].knows(name) and name not in METHODS[method].refused}


@pytest.mark.parametrize("method", SETTINGS)
def test_an_unknown_setting_is_refused_by_name(base: BaseModelInfo, method: str) -> None:
    with pytest.raises(AdapterIncompatibleError, match="unknown setting some_future_setting"):
        read_method(base, method, some_future_setting="on")
