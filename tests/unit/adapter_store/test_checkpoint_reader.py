"""What the checkpoint reader refuses, and that it says why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from loraplex_adapter_store.checkpoint import safetensors_file
from loraplex_adapter_store.checkpoint.canonical import canonicalise, read_canonical
from loraplex_adapter_store.checkpoint.patterns import PatternMatcher
from loraplex_adapter_store.checkpoint.reader import Checkpoint, read_checkpoint
from loraplex_common.base_model import BaseModelInfo, load_base_model
from loraplex_common.errors import AdapterCorruptError, AdapterCorruptUploadError, AdapterIncompatibleError
from loraplex_common.projections import gated_decoder_layer
from support.adapters import Recipe
from support.checkpoints import read
from support.store_rig import tiny_base_dir

PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"
DEMO = Path(__file__).parents[3] / "examples" / "demo" / "adapters"


@pytest.fixture(scope="module")
def base() -> BaseModelInfo:
    return load_base_model(tiny_base_dir())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("modules_to_save", ["score"]),
        ("trainable_token_indices", [3]),
        ("alora_invocation_tokens", []),
        ("target_parameters", ["x"]),
        ("megatron_config", {"a": 1}),
        ("layer_replication", [[0, 1]]),
        ("use_qalora", True),
        ("use_bdlora", {"n": 1}),
        ("velora_config", {"n": 1}),
        ("monteclora_config", {"n": 1}),
        ("arrow_config", {"n": 1}),
        ("kasa_config", {"n": 1}),
        ("bias", "vera_only"),
        ("peft_type", "LOHA"),
        ("peft_type", "some future type"),
        ("task_type", "SEQ_CLS"),
        ("init_lora_weights", "corda"),
        ("some_future_setting", "on"),
    ],
)
def test_an_unserved_setting_is_refused_by_name(base: BaseModelInfo, name: str, value: Any) -> None:
    with pytest.raises(AdapterIncompatibleError, match=name):
        read(base, **{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("r", 0),
        ("r", "8"),
        ("r", True),
        ("lora_alpha", float("inf")),
        ("lora_alpha", None),
        ("use_rslora", "yes"),
        ("use_rslora", 1),
        ("bias", False),
        ("task_type", 1),
        ("init_lora_weights", 0.5),
        ("exclude_modules", False),
        ("rank_pattern", {"q_proj": -1}),
        ("rank_pattern", [1]),
        ("alpha_pattern", {"q_proj": "x"}),
        ("target_modules", [1]),
        ("layers_to_transform", ["a"]),
        ("base_model_name_or_path", 5),
    ],
)
def test_a_setting_of_the_wrong_type_is_refused_by_name(base: BaseModelInfo, name: str, value: Any) -> None:
    with pytest.raises(AdapterCorruptUploadError, match=name):
        read(base, **{name: value})


def test_a_config_without_a_peft_type_is_told_what_peft_writes(base: BaseModelInfo) -> None:
    with pytest.raises(AdapterIncompatibleError, match=r'peft_type is missing: .*"LORA"'):
        read(base, peft_type=None)


@pytest.mark.parametrize("config", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_config_that_is_no_json_object_is_refused(base: BaseModelInfo, config: bytes) -> None:
    with pytest.raises(AdapterCorruptUploadError, match=r"adapter_config\.json"):
        read_checkpoint(config, b"", base)


def test_a_missing_tensor_is_named(base: BaseModelInfo) -> None:
    with pytest.raises(AdapterIncompatibleError, match=rf"{PREFIX}.lora_B.weight is missing"):
        read(base, change=lambda tensors: tensors.pop(f"{PREFIX}.lora_B.weight"))


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight", "not explained by target_modules"),
        ("base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight", "has 2 layers"),
        ("base_model.model.model.layers.0.mlp.q_proj.lora_A.weight", "no projection"),
        ("base_model.model.lm_head.lora_A.weight", "lm_head"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", "not explained by"),
        (f"{PREFIX}.lora_magnitude_vector.weight", "DoRA"),
        (f"{PREFIX}.lora_B.bias", "biases"),
        ("whatever", "no projection"),
        ("base_model.model.model.layers.00.self_attn.q_proj.lora_A.weight", "no projection"),
    ],
)
def test_an_unexpected_tensor_is_named(base: BaseModelInfo, name: str, match: str) -> None:
    def add(tensors: dict[str, Any]) -> None:
        tensors[name] = np.zeros((4, 64), dtype=np.float32)

    with pytest.raises(AdapterIncompatibleError, match=match):
        read(base, change=add)


def test_the_infix_of_a_named_adapter_is_read(base: BaseModelInfo) -> None:
    def rename(tensors: dict[str, Any]) -> None:
        for name in list(tensors):
            tensors[name.replace(".weight", ".default.weight")] = tensors.pop(name)

    assert canonicalise(read(base, change=rename)).revision == canonicalise(read(base)).revision


@pytest.mark.parametrize("shape", [(5, 64), (4, 63), (4,), (64, 4)])
def test_a_wrong_shape_is_named_with_what_was_expected(base: BaseModelInfo, shape: tuple[int, ...]) -> None:
    def change(tensors: dict[str, Any]) -> None:
        tensors[f"{PREFIX}.lora_A.weight"] = np.zeros(shape, dtype=np.float32)

    with pytest.raises(AdapterIncompatibleError, match=rf"{PREFIX}.lora_A.weight has shape .* expected \[4, 64\]"):
        read(base, change=change)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_nan_and_infinity_are_refused_by_name(base: BaseModelInfo, value: float, dtype: str) -> None:
    def change(tensors: dict[str, Any]) -> None:
        tensors[f"{PREFIX}.lora_A.weight"][2, 5] = value

    with pytest.raises(AdapterCorruptUploadError, match=rf"{PREFIX}.lora_A.weight"):
        read(base, Recipe(targets=("q_proj",), dtype=dtype), change=change)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_values_that_are_no_numbers_are_counted(
    base: BaseModelInfo, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors_file, "SLICE_ITEMS", 100)  # some of them in other slices than the first

    def change(tensors: dict[str, Any]) -> None:
        values = tensors[f"{PREFIX}.lora_A.weight"]
        values[0, 0] = values[1, 3] = values[3, -1] = float("nan")
        values[2, 5] = float("-inf")

    with pytest.raises(AdapterCorruptUploadError, match=r"lora_A.weight holds 3 NaN, 1 infinite of its 256 values"):
        read(base, Recipe(targets=("q_proj",), rank=4, dtype=dtype), change=change)


def test_a_value_that_bf16_cannot_hold_is_refused(base: BaseModelInfo) -> None:
    def change(tensors: dict[str, Any]) -> None:
        tensors[f"{PREFIX}.lora_A.weight"][0, 0] = 3.4e38

    with pytest.raises(AdapterCorruptUploadError, match="1 beyond bf16's range of its"):
        read(base, change=change)


def test_a_pattern_that_takes_exponential_time_is_refused_soon(base: BaseModelInfo) -> None:
    matcher = PatternMatcher(budget_s=0.2)
    with pytest.raises(AdapterIncompatibleError, match="too long"):
        matcher.fullmatch(r"(?:(?:.|..|...)+)+(?<!j)", "model.layers.14.self_attn.q_proj" * 4, setting="x")


@pytest.mark.parametrize("name", ["target_modules", "exclude_modules"])
def test_a_pattern_that_is_no_regular_expression_is_named(base: BaseModelInfo, name: str) -> None:
    with pytest.raises(AdapterIncompatibleError, match=name):
        read(base, None, **{name: "(["})


def test_equal_weights_have_equal_revisions_however_the_config_is_written(base: BaseModelInfo) -> None:
    first = read(base, Recipe(rank=4, alpha=8, targets=("q_proj", "v_proj")))
    second = read(
        base,
        Recipe(rank=4, alpha=8, targets=("q_proj", "v_proj")),
        target_modules=r".*\.(q|v)_proj",
        r=16,
        rank_pattern={"_proj|.*": 4},
        lora_dropout=0.1,
        peft_version="9.9",
    )

    assert canonicalise(first).revision == canonicalise(second).revision


def test_other_scaling_other_base_or_other_weights_make_another_revision(base: BaseModelInfo) -> None:
    revisions = {
        canonicalise(read(base)).revision,
        canonicalise(read(base, lora_alpha=17)).revision,
        canonicalise(read(base, use_rslora=True)).revision,
        canonicalise(read(base, Recipe(targets=("q_proj", "down_proj"), rank=4, seed=1))).revision,
        canonicalise(read(base, Recipe(targets=("q_proj", "down_proj"), rank=4, dtype="float16"))).revision,
        canonicalise(Checkpoint("0" * 64, read(base).modules)).revision,
    }

    assert len(revisions) == 6


def test_a_canonical_form_with_a_flipped_bit_is_refused(base: BaseModelInfo) -> None:
    form = canonicalise(read(base))
    data = bytearray(b"".join(form.chunks(1000)))
    assert len(data) == form.num_bytes
    data[-1] ^= 1

    with pytest.raises(AdapterCorruptError, match="import the adapter again"):
        read_canonical(data, form.revision)


@pytest.mark.parametrize(
    ("name", "rank", "scaling", "num_modules"),
    [
        ("json", 8, 2.0, 112),
        ("devil", 8, 2.0, 112),
        ("kjv", 8, 2.0, 112),
        ("upper", 4, 3.0, 60),
        ("sentiment", 16, 4.0, 210),
    ],
)
def test_the_demo_adapters_have_their_ranks_and_scalings(
    name: str, rank: int, scaling: float, num_modules: int
) -> None:
    smollm2 = BaseModelInfo(
        name="SmolLM2-135M-Instruct",
        fingerprint="0" * 64,
        aliases=(),
        num_layers=30,
        hidden_size=576,
        intermediate_size=1536,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        vocab_size=49152,
        max_position_embeddings=8192,
        config={},
        layers=(gated_decoder_layer(hidden_size=576, intermediate_size=1536, num_heads=9, num_kv_heads=3, head_dim=64),)
        * 30,
    )
    folder = DEMO / name

    checkpoint = read_checkpoint(
        (folder / "adapter_config.json").read_bytes(), (folder / "adapter_model.safetensors").read_bytes(), smollm2
    )

    assert {(module.rank, module.scaling) for module in checkpoint.modules} == {(rank, scaling)}
    assert len(checkpoint.modules) == num_modules
