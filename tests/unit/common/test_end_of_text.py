"""Which tokens end an output, by one rule for engine and gateway."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from loraplex_common.base_model import BaseModelError
from loraplex_common.end_of_text import read_eos_token_ids
from loraplex_gateway.text.generation_defaults import load_generation_defaults
from support.base_models import write_base_model

if TYPE_CHECKING:
    from pathlib import Path

VOCAB_SIZE = 100
TOKENIZER = {"model": {"vocab": {"</s>": 2, "a": 5}}, "added_tokens": [{"id": 7, "content": "<|im_end|>"}]}
UNIGRAM = {"model": {"vocab": [["<unk>", 0.0], ["</s>", -1.0], ["a", -2.0]]}}


def model(directory: Path, **files: Any) -> Path:
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (directory / f"{name}.json").write_text(text)
    return directory


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": 5}, {"eos_token_id": 1}, (5,)),
        ({"eos_token_id": [3, 1, 3]}, {}, (3, 1)),
        ({"eos_token_id": None}, {"eos_token_id": 1}, (1,)),
        ({}, {"eos_token_id": [1, 2]}, (1, 2)),
        (None, {"eos_token_id": 1}, (1,)),
        ({"eos_token_id": []}, {"eos_token_id": 1}, ()),
        (None, {"eos_token_id": None}, ()),
        (None, {}, ()),
        ({"eos_token_id": [0, -1, 99, 100]}, {}, (0, 99)),
    ],
)
def test_ids_are_the_generation_configs_else_the_configs(
    tmp_path: Path, generation: Any, config: Any, expected: tuple[int, ...]
) -> None:
    files = {"config": config} if generation is None else {"config": config, "generation_config": generation}
    model(tmp_path, **files)

    assert read_eos_token_ids(tmp_path, VOCAB_SIZE) == expected
    assert load_generation_defaults(tmp_path, VOCAB_SIZE).eos_token_ids == set(expected)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"tokenizer_config": {"eos_token": "<|im_end|>"}}, (1, 7)),
        ({"tokenizer_config": {"eos_token": {"content": "<|im_end|>", "special": True}}}, (1, 7)),
        ({"tokenizer_config": {}, "special_tokens_map": {"eos_token": "</s>"}}, (1, 2)),
        ({"tokenizer_config": {"eos_token": None}, "special_tokens_map": {"eos_token": {"content": "</s>"}}}, (1, 2)),
        ({"tokenizer_config": {"eos_token": "</s>"}, "special_tokens_map": {"eos_token": "a"}}, (1, 2)),
        ({"tokenizer_config": {"added_tokens_decoder": {}}, "special_tokens_map": {"eos_token": "</s>"}}, (1,)),
        ({"tokenizer_config": {"eos_token": "a"}, "tokenizer": UNIGRAM}, (1, 2)),
        ({"tokenizer_config": {"eos_token": "</s>"}, "tokenizer": UNIGRAM}, (1,)),
        ({"tokenizer_config": {"eos_token": "nowhere"}}, (1,)),
        ({"tokenizer_config": {}}, (1,)),
    ],
)
def test_the_tokenizers_own_end_of_text_ends_an_output_too(
    tmp_path: Path, files: dict[str, Any], expected: tuple[int, ...]
) -> None:
    model(tmp_path, **{"generation_config": {"eos_token_id": 1}, "tokenizer": TOKENIZER, **files})

    assert read_eos_token_ids(tmp_path, VOCAB_SIZE) == expected


@pytest.mark.parametrize(
    "bad", ['{"eos_token_id": ["a"]}', '{"eos_token_id": true}', '{"eos_token_id": 1.5}', "[]", "{"]
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, bad: str) -> None:
    model(tmp_path, generation_config=bad, config={"eos_token_id": 1})

    with pytest.raises(BaseModelError, match=r"generation_config\.json"):
        read_eos_token_ids(tmp_path, VOCAB_SIZE)


def test_transformers_reads_the_same_ids(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    write_base_model(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": "<|im_start|>"}))

    ids = {
        *GenerationConfig.from_pretrained(tmp_path).eos_token_id,
        AutoTokenizer.from_pretrained(tmp_path).eos_token_id,
    }

    assert set(read_eos_token_ids(tmp_path, 384)) == ids == {1, 2, 3}
