"""A folder that is no PEFT adapter is named for what it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from loraplex_common.adapter_folder import check_present, explain_content, list_folder
from loraplex_common.errors import AdapterCorruptUploadError, AdapterIncompatibleError

if TYPE_CHECKING:
    from pathlib import Path

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KINDS = {
    "sharded": ([CONFIG, "adapter_model-00001-of-00002.safetensors"], "00001-of-00002.*sharded"),
    "sharded with an index": ([CONFIG, f"{WEIGHTS}.index.json"], "sharded"),
    "MLX in between": ([CONFIG, "0000100_adapters.safetensors"], "0000100.*MLX-LM.*rename"),
    "GGUF": ([CONFIG, "adapter-F16-LoRA.gguf"], "adapter-F16-LoRA.gguf: a GGUF"),
    "FSDP": ([CONFIG, "pytorch_model_fsdp_0/__0_0.distcp"], "FSDP.*merge-weights"),
    "DeepSpeed": (["zero_to_fp32.py", "global_step10/mp_rank_00_model_states.pt", "latest"], "DeepSpeed.*zero_to_fp32"),
    "diffusers": (["pytorch_lora_weights.safetensors"], "diffusion"),
    "LitGPT": (["lit_model.pth.lora", "hyperparameters.yaml"], "LitGPT"),
    "a pickle": ([CONFIG, "adapter_model.bin", "training_args.bin"], "adapter_model.bin: pickled"),
    "another pickle": ([CONFIG, "weights.pt"], "weights.pt: pickled"),
    "a whole model": (["config.json", "model-00001-of-00002.safetensors", "tokenizer.json"], "a whole model.*--model"),
    "a whole model as a pickle": (["config.json", "pytorch_model.bin"], "a whole model"),
    "an archive": (["adapter.tar.gz"], "adapter.tar.gz: an archive"),
}


@pytest.mark.parametrize(("names", "match"), KINDS.values(), ids=KINDS)
def test_a_folder_of_another_kind_is_named_for_what_it_is(names: list[str], match: str) -> None:
    with pytest.raises(AdapterIncompatibleError, match=match):
        check_present(names)


@pytest.mark.parametrize(
    ("names", "match"),
    [
        ([], f"no PEFT adapter: {CONFIG} and {WEIGHTS} are missing"),
        (["README.md", CONFIG], f"{WEIGHTS} is missing"),
        ([WEIGHTS, "adapter.gguf", "optimizer.pt"], f"{CONFIG} is missing"),
        ([f"mine/{CONFIG}", f"mine/{WEIGHTS}", "README.md"], "but in mine: import that folder"),
        (
            [f"{folder}/{file}" for folder in ("checkpoint-20", "checkpoint-10") for file in (CONFIG, WEIGHTS)],
            "in checkpoint-10, checkpoint-20: import",
        ),
        ([f"only-weights/{WEIGHTS}"], "are missing"),
    ],
)
def test_missing_files_are_named_and_found_in_a_folder_inside(names: list[str], match: str) -> None:
    with pytest.raises(AdapterCorruptUploadError, match=match):
        check_present(names)


def test_what_trainers_leave_beside_an_adapter_is_not_read() -> None:
    names = ["optimizer.pt", "adapter_model.bin", "trainer_state.json", "global_step10/x.pt", WEIGHTS, CONFIG]

    assert check_present([*names, "tokenizer.json"]) == [CONFIG, WEIGHTS, "tokenizer.json"]


def test_the_weights_of_mlx_are_read_if_pefts_are_not_there() -> None:
    names = [CONFIG, "adapters.safetensors", "0000100_adapters.safetensors"]

    assert check_present(names) == [CONFIG, "adapters.safetensors"]
    assert check_present([*names, WEIGHTS]) == [CONFIG, WEIGHTS]
    with pytest.raises(AdapterCorruptUploadError, match=f"no PEFT adapter: {CONFIG} is missing"):
        check_present(names[1:])
    with pytest.raises(AdapterCorruptUploadError, match="but in mine: import that folder"):
        check_present([f"mine/{name}" for name in names])


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git lfs pull"),
        (b"GGUF\x03", "GGUF"),
        (b"PK\x03\x04", "pickled"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"\xef\xbb\xbf\n<!doctype html>\n<html lang=en>", "web page"),
        (b"<HTML>", "web page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "web page"),
    ],
)
def test_a_file_of_another_kind_is_known_by_its_first_bytes(data: bytes, match: str) -> None:
    assert match in str(explain_content(data))
    assert explain_content(b"\x10\x00\x00\x00\x00\x00\x00\x00{") is None


def test_a_folder_is_listed_with_the_folders_inside_it(tmp_path: Path) -> None:
    for name in ("a", "in/b", "in/in/c", "in/in/in/d"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "loop").symlink_to(tmp_path)

    assert sorted(list_folder(tmp_path)) == ["a", "in/b", "in/in/c"]
