"""The weights of a directory are those transformers would load, and what cannot be served is refused before any start."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
from loraplex_common.base_model import BaseModelError, check_base_model
from loraplex_common.weight_files import find_weights
from safetensors.numpy import load_file, save_file
from support.base_models import TinyBase, write_base_model
from support.safetensors_files import assemble

if TYPE_CHECKING:
    from pathlib import Path

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_base_model(tmp_path / "tiny", TinyBase())


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_base_model(tmp_path / "sharded", TinyBase(num_shards=2))


def test_one_whole_file_is_taken_before_an_index_and_whatever_lies_beside(model: Path, sharded: Path) -> None:
    for file in sharded.glob("model*"):
        file.rename(model / file.name)
    save_file({"layers.0.wq": np.zeros((2, 2), np.float32)}, model / "consolidated.safetensors")

    assert find_weights(model).shards() == (model / "model.safetensors",)


def test_the_index_decides_which_shard_a_tensor_comes_from(sharded: Path) -> None:
    first, second = sorted(sharded.glob("*.safetensors"))
    save_file(load_file(second) | load_file(first), second)
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]

    weights = find_weights(sharded)

    assert {name: file.name for name, file in weights.files.items()} == weight_map
    assert weights.shards() == (first, second)


def test_without_an_index_a_tensor_in_two_files_is_refused(sharded: Path) -> None:
    first, second = sorted(sharded.glob("*.safetensors"))
    (sharded / INDEX).unlink()
    assert find_weights(sharded).shards() == (first, second)
    save_file(load_file(second), sharded / "model-old.safetensors")

    with pytest.raises(
        BaseModelError, match=rf"{second.name} and model-old.safetensors both hold .*no {INDEX} says which"
    ):
        find_weights(sharded)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "unreadable"),
        ("[]", "unreadable"),
        ("{}", "unreadable"),
        ('{"weight_map": []}', "weight_map does not map"),
        ('{"weight_map": {"a": 1}}', "weight_map does not map"),
        ('{"weight_map": {"a": "../secret.safetensors"}}', "weight_map does not map"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "names files that are not there: gone"),
        ('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}', "a is not in model-00001"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(sharded: Path, text: str, message: str) -> None:
    (sharded / INDEX).write_text(text)

    with pytest.raises(BaseModelError, match=message):
        find_weights(sharded)


@pytest.mark.parametrize("dtype", ["I8", "U8", "I32", "F8_E4M3", "F8_E5M2", "F4", "I64"])
def test_weights_packed_in_another_type_are_refused_whatever_config_says(model: Path, dtype: str) -> None:
    entry = {"dtype": dtype, "shape": [1, 8], "data_offsets": [0, 8]}
    (model / "model.safetensors").write_bytes(assemble({Q_PROJ: entry}, bytes(8)))

    with pytest.raises(BaseModelError, match=rf"{Q_PROJ} is stored as {dtype}.*quantised weights are not served"):
        check_base_model(model)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model-q4_k_m.gguf", "GGUF files are there"),
        ("pytorch_model.bin", "PyTorch files are there"),
        ("weights.npz", "MLX files are there"),
        ("adapter_config.json", "this is an adapter"),
        ("README.md", "save the model as safetensors"),
    ],
)
def test_a_directory_of_another_format_is_named_for_what_it_is(model: Path, name: str, message: str) -> None:
    (model / "model.safetensors").unlink()
    (model / name).write_bytes(b"x")

    with pytest.raises(BaseModelError, match=message):
        check_base_model(model)


def test_an_adapter_in_place_of_a_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")

    with pytest.raises(BaseModelError, match="this is an adapter: serve its base model"):
        check_base_model(tmp_path)


def test_a_git_lfs_pointer_and_a_truncated_file_are_named(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(BaseModelError, match="bytes are there; fetch it again"):
        check_base_model(model)

    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(BaseModelError, match=r"git-lfs pointer.*git lfs pull"):
        check_base_model(model)
