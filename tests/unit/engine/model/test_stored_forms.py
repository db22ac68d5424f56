"""Quantised checkpoints are unpacked to the weights that they stand for, and served with adapters as those are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from loraplex_common.base_model import BaseModelError, check_base_model
from loraplex_common.projections import Split
from loraplex_engine import build
from loraplex_engine.config import EngineConfig
from loraplex_engine.model import weights as module
from loraplex_engine.model.layers import Dense
from loraplex_engine.model.linear import LinearForms, StoredLinear
from loraplex_engine.model.weights import WeightLayout, WeightReader
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support.adapters import Recipe, write_adapter
from support.base_models import TinyBase, write_base_model
from support.decoder_shapes import PROJECTIONS
from support.oracle import Comparison, Oracle, make_rig
from support.quantised import awq, bnb_4bit, bnb_int8, compressed_tensors, fp8, gptq, mxfp4, write_quantised
from support.teacher_forcing import NUM_FORCED, add_sequences, compare

if TYPE_CHECKING:
    from support.quantised import Pack

CPU = torch.device("cpu")
BASE = TinyBase(hidden_size=160, intermediate_size=192, num_heads=5, num_kv_heads=1, head_dim=32)
"""No multiple of a block of 128, and rows that are no multiple of what is unpacked at once."""
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False, "damp_percent": 0.01}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}

BNB = {
    **{"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "_load_in_4bit": True},
    **{"_load_in_8bit": False, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    **{"bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_storage": "uint8", "llm_int8_skip_modules": None},
    **{"llm_int8_threshold": 6.0, "llm_int8_has_fp16_weight": False, "llm_int8_enable_fp32_cpu_offload": False},
}
"""What transformers writes."""
MXFP4: dict[str, Any] = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True}


def llm_compressor(stored_as: str, **weights: Any) -> dict[str, Any]:
    """Return what llm-compressor writes into config.json."""
    activations = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "output_activations": None}
    if stored_as == "pack-quantized":
        group["input_activations"] = None
    return {
        "quant_method": "compressed-tensors",
        "format": stored_as,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
        "global_compression_ratio": 1.5,
    }


def of_library(stored_as: str, scale_dtype: torch.dtype = torch.float32, **weights: Any) -> tuple[Pack, dict[str, Any]]:
    return compressed_tensors(stored_as, scale_dtype, **weights), llm_compressor(stored_as, **weights)


FLOAT: dict[str, Any] = {"num_bits": 8, "type": "float"}
FORMS: dict[str, tuple[Pack, dict[str, Any]]] = {
    "fp8-blocks": (fp8((128, 128), "weight_scale_inv"), FP8 | {"weight_block_size": [128, 128], "fmt": "e4m3"}),
    "fp8-tensor": (
        fp8(None, "weight_scale_inv", activation="activation_scale"),
        FP8 | {"activation_scheme": "static", "weight_block_size": None, "dequantize": False},
    ),
    "fp8-autofp8": (fp8(None, "weight_scale", activation="input_scale"), FP8 | {"ignored_layers": ["lm_head"]}),
    "ct-fp8-tensor": of_library("float-quantized", **FLOAT, strategy="tensor"),
    "ct-fp8-channel": of_library("float-quantized", torch.bfloat16, **FLOAT, strategy="channel"),
    "ct-fp8-block": of_library("float-quantized", **FLOAT, strategy="block", block_structure=[128, 128]),
    "ct-int8-channel": of_library("int-quantized", num_bits=8, type="int", strategy="channel"),
    "ct-w4-group": of_library("pack-quantized", torch.bfloat16, num_bits=4, strategy="group", group_size=32),
    "ct-w4-channel": of_library("pack-quantized", num_bits=4, strategy="channel"),
    "ct-w4-asym": of_library("pack-quantized", num_bits=4, strategy="group", group_size=32, symmetric=False),
    "ct-w8-asym-channel": of_library("pack-quantized", num_bits=8, strategy="channel", symmetric=False),
    "ct-w8-group": of_library("pack-quantized", num_bits=8, strategy="group", group_size=32),
    "gptq-4": (gptq(4, 32), GPTQ),
    "gptq-8-all-inputs": (gptq(8, -1, index=False), GPTQ | {"bits": 8, "group_size": -1}),
    "gptq-desc-act": (gptq(4, 32, shuffled=True), GPTQ | {"desc_act": True}),
    "gptq-v2": (gptq(4, 32, zero_offset=0), GPTQ | {"checkpoint_format": "gptq_v2"}),
    "awq": (awq(32), AWQ | {"modules_to_not_convert": None}),
    "ct-mxfp4": (mxfp4, llm_compressor("mxfp4-pack-quantized", **MXFP4)),
    "bnb-nf4": (bnb_4bit("nf4", is_nested=True), BNB),
    "bnb-nf4-flat": (bnb_4bit("nf4", is_nested=False, block=128), BNB | {"bnb_4bit_use_double_quant": False}),
    "bnb-fp4": (bnb_4bit("fp4", is_nested=True), BNB | {"bnb_4bit_quant_type": "fp4"}),
    "bnb-int8": (bnb_int8, BNB | {"load_in_4bit": False, "_load_in_4bit": False, "load_in_8bit": True}),
}


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return write_base_model(tmp_path / "whole", BASE)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A LoRA, and a DoRA: its magnitudes are divided by norms of the base's weights."""
    folder = tmp_path_factory.mktemp("adapters")
    base_dir = write_base_model(folder / "base", BASE)
    lora = write_adapter(folder / "lora", base_dir, Recipe(rank=8, rank_pattern={"q_proj": 3}, seed=1))
    config = LoraConfig(r=3, lora_alpha=5, target_modules=list(PROJECTIONS), use_dora=True, task_type="CAUSAL_LM")
    model: Any = get_peft_model(Oracle(base_dir).model, config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = 0.1 * torch.randn(parameter.shape, generator=generator)
                parameter.copy_(parameter * (1 + noise) if "magnitude" in name else parameter + noise)
    model.save_pretrained(str(folder / "dora"))
    return {"lora": lora, "dora": folder / "dora"}


@pytest.mark.parametrize("form", FORMS)
def test_a_quantised_base_with_adapters_equals_its_whole_weights_in_transformers(
    tmp_path: Path, whole: Path, adapters: dict[str, Path], form: str
) -> None:
    pack, settings = FORMS[form]
    quantised = write_quantised(whole, tmp_path / "quantised", pack, settings)
    oracle, rig, tally = Oracle(whole, adapters), make_rig(quantised, adapters), Comparison()
    added = add_sequences(rig, oracle, np.random.default_rng(0), BASE.vocab_size)

    rig.harness.generate([sequence for _, sequence in added], NUM_FORCED + 1)

    compare(oracle, added, tally)
    tally.check()
    rig.runner.close()


def read_all(directory: Path, layer: int = 0, layout: WeightLayout | None = None) -> dict[str, torch.Tensor]:
    """Read a layer's projections with many inputs or outputs, two of them fused."""
    reader = WeightReader(directory, dtype=torch.float32, device=CPU, layout=layout)
    prefix, forms = f"model.layers.{layer}.", LinearForms(dense=Dense)
    gate, up, down, o = (
        StoredLinear(name=prefix + path, in_features=inputs, out_features=outputs, split=split)
        for path, inputs, outputs, split in (
            ("mlp.gate_proj", 160, 192, Split.OUTPUTS),
            ("mlp.up_proj", 160, 192, Split.OUTPUTS),
            ("mlp.down_proj", 192, 160, Split.INPUTS),
            ("self_attn.o_proj", 160, 160, Split.INPUTS),
        )
    )
    parts = {"gate_up": [gate, up], "down": [down], "o": [o]}
    return {name: reader.linear(each, forms).rows(0, 1 << 20) for name, each in parts.items()}


@pytest.mark.parametrize("form", FORMS)
def test_every_number_is_exact_however_many_rows_are_unpacked_at_once(
    tmp_path: Path, whole: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack, settings = FORMS[form]
    quantised = write_quantised(whole, tmp_path / "quantised", pack, settings)
    truth = read_all(whole)

    for rows in (1 << 20, 37):
        monkeypatch.setattr(module, "UNPACKED_ITEMS", rows * 192)
        found = read_all(quantised)
        assert all(torch.equal(found[name], truth[name]) for name in truth)


@pytest.mark.parametrize(
    "form", ["fp8-blocks", "ct-w4-asym", "gptq-desc-act", "awq", "ct-mxfp4", "bnb-nf4", "bnb-int8"]
)
def test_ranks_hold_parts_of_an_unpacked_weight(tmp_path: Path, whole: Path, form: str) -> None:
    pack, settings = FORMS[form]
    quantised = write_quantised(whole, tmp_path / "quantised", pack, settings)

    for rank in range(2):
        layout = WeightLayout(tp_degree=2, tp_rank=rank)
        found, truth = read_all(quantised, layout=layout), read_all(whole, layout=layout)
        assert all(torch.equal(found[name], truth[name]) for name in truth)


def with_scheme(settings: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Change the scheme of the weights in what llm-compressor writes."""
    changed: dict[str, Any] = json.loads(json.dumps(settings))
    changed["config_groups"]["group_0"]["weights"] |= changes
    return changed


W4 = llm_compressor("pack-quantized", num_bits=4, strategy="group", group_size=32)


def test_inputs_out_of_order_belong_to_the_groups_that_the_index_names(tmp_path: Path, whole: Path) -> None:
    ordered = compressed_tensors("pack-quantized", num_bits=4, strategy="group", group_size=32)

    def pack(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(3))
        parts, found = ordered(weight[:, order])
        parts["weight_packed"] = words_of(found, parts["weight_scale"], order)
        index = torch.empty(weight.shape[1], dtype=torch.int32)
        index[order] = (torch.arange(weight.shape[1]) // 32).to(torch.int32)
        back = torch.empty_like(found)
        back[:, order] = found
        return parts | {"weight_g_idx": index}, back

    quantised = write_quantised(whole, tmp_path / "quantised", pack, with_scheme(W4, actorder="group"))
    truth, found = read_all(whole), read_all(quantised)

    assert all(torch.equal(found[name], truth[name]) for name in truth)


def words_of(found: torch.Tensor, scale: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Pack numbers again, their columns where they belong."""
    numbers = torch.empty(found.shape, dtype=torch.int8)
    numbers[:, order] = (found / scale.repeat_interleave(32, 1)).round().to(torch.int8)
    packed: torch.Tensor = pack_to_int32(numbers, 4)
    return packed


@pytest.mark.parametrize(
    ("form", "settings"),
    [
        ("fp8-blocks", FORMS["fp8-blocks"][1] | {"modules_to_not_convert": ["lm_head", "o_proj", r"model.layers.1"]}),
        ("ct-w4-group", W4 | {"ignore": ["lm_head", r"re:.*\.o_proj$", r"re:model\.layers\.1\..*"]}),
        ("awq", AWQ | {"modules_to_not_convert": ["o_proj", "model.layers.1"]}),
    ],
)
def test_modules_that_are_kept_whole_are_read_whole(
    tmp_path: Path, whole: Path, form: str, settings: dict[str, Any]
) -> None:
    kept = ("o_proj", *(f"layers.1.{path}_proj" for path in ("mlp.gate", "mlp.up", "mlp.down", "self_attn.q")))
    kept += ("layers.1.self_attn.k_proj", "layers.1.self_attn.v_proj")
    quantised = write_quantised(whole, tmp_path / "quantised", FORMS[form][0], settings, kept=kept)
    oracle, rig = Oracle(whole), make_rig(quantised)
    tally, added = Comparison(), add_sequences(rig, oracle, np.random.default_rng(1), BASE.vocab_size)

    rig.harness.generate([sequence for _, sequence in added], NUM_FORCED + 1)

    compare(oracle, added, tally)
    tally.check()
    rig.runner.close()


def test_a_module_that_is_said_to_be_whole_and_is_not_is_refused(tmp_path: Path, whole: Path) -> None:
    settings = AWQ | {"modules_to_not_convert": ["o_proj"]}
    quantised = write_quantised(whole, tmp_path / "quantised", awq(32), settings)

    with pytest.raises(BaseModelError, match=r"o_proj.qweight is quantised, and quantization_config .* says"):
        make_rig(quantised)


@pytest.mark.parametrize("num_shards", [1, 3])
def test_a_zero_bias_of_a_layer_without_one_is_dropped_and_any_other_is_refused(
    tmp_path: Path, num_shards: int
) -> None:
    base = TinyBase(hidden_size=64, num_shards=num_shards)
    whole = write_base_model(tmp_path / "whole", base)
    quantised = write_quantised(whole, tmp_path / "quantised", gptq(4, 32), GPTQ)
    make_rig(quantised).runner.close()
    for file in quantised.glob("*.safetensors"):
        tensors = load_file(file)
        save_file({name: one + 1 if name.endswith(".bias") else one for name, one in tensors.items()}, file)

    with pytest.raises(BaseModelError, match=r"bias is not zero"):
        make_rig(quantised)


def test_one_file_is_mapped_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = write_base_model(tmp_path / "whole", TinyBase(num_shards=4))
    reader = WeightReader(whole, dtype=torch.float32, device=CPU)
    names = sorted(load_file(file).popitem()[0] for file in whole.glob("*.safetensors"))

    for name in names:
        stored = reader.slice_of(name)
        reader.read(name, tuple(stored.get_shape()))
        del stored
        maps = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if str(whole) in line}
        assert len(maps) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "hqq", "nbits": 4}, r"\(hqq\): quantised weights are not served in this form"),
        (BNB | {"load_in_4bit": False, "_load_in_4bit": False}, "sets neither of load_in_4bit and load_in_8bit"),
        (BNB | {"load_in_8bit": True}, "sets both of load_in_4bit and load_in_8bit"),
        (BNB | {"bnb_4bit_quant_storage": "bfloat16"}, "quantization_config.bnb_4bit_quant_storage 'bfloat16'"),
        (BNB | {"llm_int8_has_fp16_weight": True}, "quantization_config.llm_int8_has_fp16_weight True"),
        (GPTQ | {"rotation": "hadamard"}, "rotation 'hadamard' is not served: the key is not known"),
        (GPTQ | {"bits": 3}, "quantization_config.bits 3 is not served: served: 4, 8"),
        (GPTQ | {"dynamic": {"-:.*down.*": {}}}, "quantization_config.dynamic"),
        (GPTQ | {"group_size": None}, "quantization_config.group_size is null"),
        (AWQ | {"version": "gemv"}, "quantization_config.version 'gemv' is not served"),
        (AWQ | {"zero_point": False}, "quantization_config.zero_point False"),
        (FP8 | {"weight_block_size": [128]}, "weight_block_size is .*expected two positive integers"),
        (FP8 | {"scale_fmt": "ue8m0"}, "quantization_config.scale_fmt 'ue8m0'"),
        (FP8 | {"modules_to_not_convert": ["re:("]}, "modules_to_not_convert .*regular expressions"),
        (W4 | {"format": "nvfp4-pack-quantized"}, "format 'nvfp4-pack-quantized' of int weights is not served"),
        (W4 | {"transform_config": {"R1": {}}}, "quantization_config.transform_config"),
        (W4 | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "quantization_config.sparsity_config"),
        (with_scheme(W4, num_bits=3), "config_groups.group_0.weights.num_bits 3"),
        (with_scheme(W4, strategy="token"), "config_groups.group_0.weights.strategy 'token'"),
        (
            with_scheme(W4, codebook="x"),
            "config_groups.group_0.weights.codebook 'x' is not served: the key is not known",
        ),
        (
            llm_compressor("mxfp4-pack-quantized", **MXFP4 | {"group_size": 16}),
            "weights.group_size 16 is not served: MXFP4 has a scale for 32 inputs",
        ),
        (W4 | {"config_groups": {}}, "quantization_config.config_groups is {}"),
    ],
)
def test_what_is_not_served_is_refused_by_its_key(
    tmp_path: Path, whole: Path, settings: dict[str, Any], message: str
) -> None:
    quantised = write_quantised(whole, tmp_path / "quantised", awq(32), settings)

    with pytest.raises(BaseModelError, match=message):
        check_base_model(quantised)


def test_files_that_do_not_fit_the_settings_are_refused_by_name(tmp_path: Path, whole: Path) -> None:
    packed = FORMS["gptq-4"][0]
    for number, (settings, message) in enumerate(
        [
            (GPTQ | {"bits": 8}, r"q_proj.qweight is I32 \[20, 160\].* imply I32 \[40, 160\]"),
            (GPTQ | {"group_size": 64}, r"q_proj.qzeros is I32 \[5, 20\].* imply I32 \[3, 20\]"),
            (W4, r"q_proj.weight_packed is missing"),
        ]
    ):
        quantised = write_quantised(whole, tmp_path / f"quantised-{number}", packed, settings)
        with pytest.raises(BaseModelError, match=message):
            make_rig(quantised)


def test_packed_files_without_their_settings_are_refused(tmp_path: Path, whole: Path) -> None:
    quantised = write_quantised(whole, tmp_path / "quantised", *FORMS["fp8-blocks"])
    (quantised / "config.json").write_text((whole / "config.json").read_text())

    with pytest.raises(
        BaseModelError, match=r"stored as F8_E4M3; .*quantised weights are not served without their quantization_config"
    ):
        check_base_model(quantised)


def test_a_quantised_lm_head_is_refused(tmp_path: Path, whole: Path) -> None:
    quantised = write_quantised(whole, tmp_path / "quantised", awq(32), AWQ)
    file = quantised / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"lm_head.qweight": torch.zeros(160, 48, dtype=torch.int32)}, file)

    with pytest.raises(BaseModelError, match=r"lm_head is quantised \(lm_head.qweight\)"):
        check_base_model(quantised)


def test_an_engine_says_once_what_it_unpacks_and_counts_the_unpacked_bytes(
    tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quantised = write_quantised(whole, tmp_path / "quantised", *FORMS["fp8-blocks"])
    config = EngineConfig(model=quantised, device="cpu", dtype="float32", pool_bytes=2**24, arena_bytes=2**24)
    info, files = build.read_base_model(config)
    limits = build.engine_limits(config, info, CPU)
    assert limits.numerics == "fp32+unpacked:fp8"

    build.runner_factory(config, info, CPU, files=files)(limits).close()

    said = capsys.readouterr()
    assert (said.out + said.err).count("unpacked to float32") == 1
    assert "activations are not quantised" in said.out + said.err
    matrices = [tensor for tensor in load_file(whole / "model.safetensors").values() if tensor.dim() == 2]
    assert build._weight_bytes(config, info, CPU) == sum(tensor.nbytes for tensor in matrices)  # no GPU here to ask
