"""The text part of a multimodal checkpoint, with adapters, computes what the whole model computes of text in transformers and peft."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from loraplex_adapter_store.checkpoint.base_weights import BaseWeights
from loraplex_adapter_store.checkpoint.reader import read_checkpoint
from loraplex_common.architectures.registry import model_config
from loraplex_common.base_model import BaseModelError, load_base_model
from loraplex_common.errors import AdapterIncompatibleError
from loraplex_engine.model.layers import TORCH_LINEARS
from loraplex_engine.model.registry import read_model
from loraplex_engine.model.weights import WeightReader
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support.families import VOCAB_SIZE
from support.multimodal import IN_MEMORY, MULTIMODAL, WRITTEN, multimodal_dir
from support.oracle import Comparison, Oracle, make_rig
from support.quantised import fp8, write_quantised
from support.teacher_forcing import NUM_FORCED, add_sequences, compare
from transformers import AutoModelForImageTextToText

if TYPE_CHECKING:
    from pathlib import Path

    from loraplex_engine.model.decoder_model import DecoderModel

CPU = torch.device("cpu")
TEXT = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
VISION = r".*vision_tower.*\.(q_proj|fc1)"


def write_adapter(directory: Path, name: str, targets: str) -> Path:
    """Write a random adapter of the modules of a whole multimodal model that a regular expression names."""
    torch.manual_seed(3)
    model: Any = AutoModelForImageTextToText.from_pretrained(multimodal_dir(name, WRITTEN), dtype=torch.float32)
    adapted: Any = get_peft_model(model, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for path, weight in adapted.named_parameters():
            if "lora_" in path:
                weight.normal_(std=0.1)
    adapted.save_pretrained(directory)
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": ""}))
    return directory


@pytest.mark.parametrize("name", MULTIMODAL)
def test_the_text_part_equals_the_whole_model_on_text_in_either_spelling_of_its_tensors_and_adapters(
    tmp_path: Path, name: str
) -> None:
    adapter = write_adapter(tmp_path / "peft", name, TEXT)
    oracle = Oracle(multimodal_dir(name, WRITTEN), {"all": adapter}, auto_class=AutoModelForImageTextToText)
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert all(each.startswith("base_model.model.model.language_model.layers.") for each in tensors)
    respelled = {
        each.replace("model.model.language_model.", "model.language_model.model."): tensors[each] for each in tensors
    }
    for spelling, stored in ((WRITTEN, tensors), (IN_MEMORY, respelled)):
        save_file(stored, adapter / "adapter_model.safetensors")
        rig = make_rig(multimodal_dir(name, spelling), {"all": adapter}, num_pages=512, text_only=True)
        added = add_sequences(rig, oracle, np.random.default_rng(7), VOCAB_SIZE)
        tally = Comparison()

        rig.harness.generate([sequence for _, sequence in added], NUM_FORCED + 1)

        compare(oracle, added, tally)
        tally.check()
        rig.runner.close()


def test_a_multimodal_checkpoint_is_refused_by_name_without_the_flag() -> None:
    with pytest.raises(
        BaseModelError, match=r"Gemma3ForConditionalGeneration takes images.*with --text-only its text part"
    ):
        load_base_model(multimodal_dir("gemma3", WRITTEN))


def test_the_flag_changes_nothing_of_what_identifies_a_model(tmp_path: Path) -> None:
    whole = load_base_model(multimodal_dir("gemma3", WRITTEN), text_only=True)
    config = json.loads((multimodal_dir("gemma3", WRITTEN) / "config.json").read_text())
    folder = tmp_path / "other"
    folder.mkdir()
    for file in ("model.safetensors", "tokenizer.json"):
        (folder / file).symlink_to(multimodal_dir("gemma3", WRITTEN) / file)
    (folder / "config.json").write_text(json.dumps(config | {"vision_config": {}}))

    other = load_base_model(folder, text_only=True)

    assert other.fingerprint != whole.fingerprint, "config.json and all tensors identify it, those of images included"
    assert whole.config == other.config
    assert whole.config["architectures"] == ["Gemma3ForCausalLM"]


def test_an_adapter_of_the_encoder_of_images_is_refused_by_the_name_of_its_tensor(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path, "gemma3", VISION)
    info = load_base_model(multimodal_dir("gemma3", WRITTEN), text_only=True)

    with pytest.raises(AdapterIncompatibleError, match="vision_tower"):
        read_checkpoint(
            (adapter / "adapter_config.json").read_bytes(), (adapter / "adapter_model.safetensors").read_bytes(), info
        )


@pytest.mark.parametrize("spelling", [WRITTEN, IN_MEMORY])
def test_the_store_finds_the_base_s_tensors_by_the_text_part_s_names(spelling: str) -> None:
    directory = multimodal_dir("mistral3", spelling)

    for name in ("model.layers.1.self_attn.q_proj.weight", "lm_head.weight", "model.embed_tokens.weight"):
        found = BaseWeights(directory).find(name)
        assert found is not None
        assert found.shape == ((VOCAB_SIZE, 64) if "layers" not in name else (96, 64))
    assert BaseWeights(directory).find("vision_tower.ln_pre.weight") is None


def read_text_part(directory: Path) -> DecoderModel[Any]:
    config = model_config(load_base_model(directory, text_only=True).config)
    reader = WeightReader(directory, dtype=torch.float32, device=CPU)
    model = read_model(config, reader, TORCH_LINEARS, max_model_len=32, device=CPU)
    reader.close()
    return model


@pytest.mark.parametrize("spelling", [WRITTEN, IN_MEMORY])
def test_a_quantised_text_part_is_unpacked_in_either_spelling(tmp_path: Path, spelling: str) -> None:
    settings = {
        "quant_method": "fp8",
        "activation_scheme": "static",
        "weight_block_size": None,
        "modules_to_not_convert": ["model.vision_tower", "model.multi_modal_projector", "lm_head"],
    }
    whole = tmp_path / "whole"
    shutil.copytree(multimodal_dir("mistral3", spelling), whole)
    pack = fp8(None, "weight_scale_inv", activation="activation_scale")
    quantised = write_quantised(whole, tmp_path / "quantised", pack, settings)

    found, expected = read_text_part(quantised), read_text_part(whole)

    for layer, linears in enumerate(expected.linears):
        for op, linear in linears.items():
            torch.testing.assert_close(found.linears[layer][op].rows(0, 8), linear.rows(0, 8), rtol=1e-6, atol=0)
    assert torch.equal(found.embedding, expected.embedding)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_config": None}, "text_config is null: expected an object"),
        (
            {"text_config": {"model_type": "mistral4"}},
            "text_config.model_type 'mistral4' is not served: only gemma3_text is",
        ),
        (
            {"text_config": {"model_type": "gemma3_text", "final_logit_softcapping": 30.0}},
            "text_config.final_logit_softcapping",
        ),
        ({"audio_config": {"hidden_size": 8}}, "audio_config .* is not served"),
    ],
)
def test_what_surrounds_or_is_in_a_text_part_and_is_not_computed_is_refused_with_the_key(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    directory = multimodal_dir("gemma3", WRITTEN)
    config = json.loads((directory / "config.json").read_text()) | changes
    for file in ("model.safetensors", "tokenizer.json"):
        (tmp_path / file).symlink_to(directory / file)
    (tmp_path / "config.json").write_text(json.dumps(config))

    with pytest.raises(BaseModelError, match=message):
        load_base_model(tmp_path, text_only=True)
