"""What services must agree on about a base model, and what they refuse to take for one."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from loraplex_common import weight_files
from loraplex_common.adapter_image import ImageError
from loraplex_common.base_model import BaseModelError, load_base_model
from loraplex_common.weight_files import read_safetensors_index
from safetensors.numpy import load_file, save_file
from support.base_models import TinyBase, write_base_model

if TYPE_CHECKING:
    from pathlib import Path


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in (config | changes).items() if v is not ...}))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_base_model(tmp_path / "tiny", TinyBase())


def test_the_facts_are_those_of_the_directory(model: Path) -> None:
    tiny, info = TinyBase(), load_base_model(model)

    assert info.name == "tiny"
    assert (info.num_layers, info.hidden_size, info.intermediate_size) == (2, tiny.hidden_size, tiny.intermediate_size)
    assert (info.num_heads, info.num_kv_heads, info.head_dim) == (tiny.num_heads, tiny.num_kv_heads, tiny.head_dim)
    assert (info.vocab_size, info.max_position_embeddings) == (tiny.vocab_size, tiny.max_position_embeddings)
    assert len(info.fingerprint) == 64
    geometry = info.geometry(dtype="bfloat16", page_bytes=4096, tp_degree=2)
    assert (geometry.num_layers, geometry.dtype, geometry.tp_degree) == (2, "bfloat16", 2)
    assert geometry.projection(1, "k_proj").shape == (tiny.hidden_size, tiny.num_kv_heads * 16)


@pytest.mark.parametrize(("tp_degree", "heads"), [(0, "num_heads 6"), (4, "num_heads 6"), (3, "num_kv_heads 2")])
def test_ranks_that_would_divide_a_head_are_refused(model: Path, tp_degree: int, heads: str) -> None:
    info = replace(load_base_model(model), num_heads=6, num_kv_heads=2)

    with pytest.raises(ImageError, match=f"{heads} can.* tp_degree {tp_degree}"):
        info.geometry(dtype="float32", page_bytes=4096, tp_degree=tp_degree)


@pytest.mark.parametrize(
    "changes",
    [
        {"transformers_version": "9.9"},
        {"_name_or_path": "acme/tiny"},
        {"use_cache": False},
        {"torch_dtype": "float16"},
        {"dtype": "float16"},
    ],
)
def test_the_fingerprint_ignores_what_does_not_change_the_model(model: Path, changes: dict[str, Any]) -> None:
    before = load_base_model(model).fingerprint

    edit_config(model, **changes)

    assert load_base_model(model, name="renamed", aliases=("x",)).fingerprint == before


def test_the_fingerprint_ignores_folder_names_of_files_and_how_to_talk_to_the_model(
    tmp_path: Path, model: Path
) -> None:
    other = write_base_model(tmp_path / "other", TinyBase(generation={"temperature": 0.5}))
    (other / "tokenizer_config.json").write_text('{"chat_template": "other"}')
    (other / "model.safetensors").rename(other / "weights.safetensors")

    assert load_base_model(other).fingerprint == load_base_model(model).fingerprint


def test_two_fine_tunes_of_one_shape_have_two_fingerprints(tmp_path: Path, model: Path) -> None:
    other = write_base_model(tmp_path / "other", TinyBase(seed=1))

    assert load_base_model(other).fingerprint != load_base_model(model).fingerprint


def test_one_changed_value_changes_the_fingerprint(model: Path) -> None:
    before, file = load_base_model(model).fingerprint, model / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"] = weights["model.norm.weight"] * 2

    save_file(weights, file, metadata={"format": "pt"})

    assert load_base_model(model).fingerprint != before


def test_the_fingerprint_covers_the_shards_that_the_index_names_and_no_other_file(tmp_path: Path) -> None:
    model = write_base_model(tmp_path / "sharded", TinyBase(num_shards=3))
    before, shards = load_base_model(model).fingerprint, sorted(model.glob("*.safetensors"))

    save_file(load_file(shards[0]), model / "consolidated.safetensors")
    unrelated = load_base_model(model).fingerprint
    save_file({name: value + 1 for name, value in load_file(shards[2]).items()}, shards[2])

    assert unrelated == before
    assert load_base_model(model).fingerprint != before


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 20000.0},
        {"rms_norm_eps": 1e-6},
        {"num_kv_heads": 4},
        {"vocab_size": 512},
        {"dtype": "bfloat16"},
        {"tie_word_embeddings": True},
        {"architecture": "qwen3"},
    ],
)
def test_the_fingerprint_changes_with_the_model(tmp_path: Path, model: Path, changes: dict[str, Any]) -> None:
    other = write_base_model(tmp_path / "other", replace(TinyBase(), **changes))

    assert load_base_model(other).fingerprint != load_base_model(model).fingerprint


def test_the_fingerprint_changes_with_the_tokenizer(model: Path) -> None:
    before = load_base_model(model).fingerprint
    tokenizer = model / "tokenizer.json"

    tokenizer.write_text(tokenizer.read_text() + "\n")

    assert load_base_model(model).fingerprint != before


def test_the_model_that_it_was_made_from_is_no_name_of_it(model: Path) -> None:
    edit_config(model, _name_or_path="acme/parent")

    assert load_base_model(model, aliases=("alias", "alias")).aliases == ("alias",)


def test_a_model_in_a_hub_cache_is_known_under_its_hub_id(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--acme--tiny-7b" / "snapshots" / ("0" * 40)
    write_base_model(snapshot, TinyBase())
    (tmp_path / "link").symlink_to(snapshot)

    for directory in (snapshot, tmp_path / "link"):
        info = load_base_model(directory, aliases=("alias",))
        assert (info.name, info.aliases) == ("tiny-7b", ("alias", "acme/tiny-7b"))
    assert load_base_model(snapshot, name="mine").aliases == ("acme/tiny-7b",)


def test_optional_config_entries_have_the_usual_defaults(model: Path) -> None:
    edit_config(model, num_key_value_heads=..., head_dim=..., max_position_embeddings=...)

    info = load_base_model(model)

    assert (info.num_kv_heads, info.head_dim, info.max_position_embeddings) == (4, 16, 2048)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM.* is not one of LlamaForCausalLM"),
        ({"architectures": ...}, "architecture None is not one of"),
        ({"architectures": "LlamaForCausalLM"}, "is not one of"),
        ({"hidden_size": ...}, "config.json: hidden_size is missing"),
        ({"num_hidden_layers": "many"}, "config.json: num_hidden_layers is 'many'"),
        ({"vocab_size": None}, "config.json: vocab_size is null"),
    ],
)
def test_a_config_we_cannot_serve_is_refused_by_entry(model: Path, changes: dict[str, Any], message: str) -> None:
    edit_config(model, **changes)

    with pytest.raises(BaseModelError, match=message):
        load_base_model(model)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_missing_file_is_named(model: Path, name: str) -> None:
    (model / name).unlink()

    with pytest.raises(BaseModelError, match=rf"{name}: No such file.*Hugging Face layout"):
        load_base_model(model)


def test_a_directory_without_safetensors_is_refused(model: Path) -> None:
    for path in model.glob("*.safetensors"):
        path.rename(path.with_suffix(".bin"))

    with pytest.raises(BaseModelError, match=r"no \*\.safetensors"):
        load_base_model(model)


@pytest.mark.parametrize("text", ["{", "[]", '"x"'])
def test_a_config_that_is_no_json_object_is_refused(model: Path, text: str) -> None:
    (model / "config.json").write_text(text)

    with pytest.raises(BaseModelError, match=r"config\.json: "):
        load_base_model(model)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"1234567",
        struct.pack("<Q", 10) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 11) + b'{"a": null}',
        struct.pack("<Q", 2) + b"\xff\xfe",
        struct.pack("<Q", 10**15),
    ],
)
def test_a_broken_safetensors_header_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)

    with pytest.raises(BaseModelError, match=r"model\.safetensors: "):
        read_safetensors_index(path)


def test_a_header_longer_than_the_cap_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_files, "MAX_HEADER_BYTES", 8)
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 9) + b"{       }")

    with pytest.raises(BaseModelError, match="header is too long"):
        read_safetensors_index(path)
