"""LoRA and rows of the embedding and of lm_head under the names of other programs are the same adapter."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from loraplex_adapter_store.checkpoint.canonical import canonicalise
from loraplex_adapter_store.checkpoint.reader import Checkpoint, read_checkpoint
from loraplex_common.errors import AdapterIncompatibleError
from support.adapters import Recipe, adapter_config, adapter_tensors
from support.peft_methods import base_dir, base_info
from support.safetensors_files import safetensors_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

Values = dict[str, "NDArray[np.float32]"]
PREFIX = "base_model.model."
EMBED, HEAD = f"{PREFIX}model.embed_tokens", f"{PREFIX}lm_head"
TARGETS = ["q_proj", "embed_tokens", "lm_head"]


def random(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(sum(shape)).standard_normal(shape, dtype=np.float32)


def pairs() -> Values:
    """Return an adapter of the two and q_proj under PEFT's names."""
    return adapter_tensors(base_info("llama"), Recipe(rank=2, targets=("q_proj",))) | {
        f"{EMBED}.lora_embedding_A": random(2, 384),
        f"{EMBED}.lora_embedding_B": random(64, 2),
        f"{HEAD}.lora_A.weight": random(2, 64),
        f"{HEAD}.lora_B.weight": random(384, 2),
    }


def rows() -> Values:
    """Return replaced rows of the embedding and a replaced lm_head."""
    return adapter_tensors(base_info("llama"), Recipe(rank=2, targets=("q_proj",))) | {
        f"{EMBED}.token_adapter.trainable_tokens_delta": random(2, 64),
        f"{HEAD}.weight": random(384, 64),
    }


def read(values: Values, base: str = "llama", fields: dict[str, Any] | None = None, **settings: Any) -> Checkpoint:
    fields = fields or adapter_config(Recipe(rank=2, targets=("q_proj",))) | settings
    data = json.dumps(fields).encode(), safetensors_bytes(values, "float32")
    return read_checkpoint(*data, base_info(base), base_dir=base_dir(base))


def revision(checkpoint: Checkpoint) -> str:
    return canonicalise(checkpoint).revision


NAMES: dict[str, Callable[[str], str]] = {
    "torch.compile": lambda name: name.replace(PREFIX, f"{PREFIX}_orig_mod."),
    "DistributedDataParallel": lambda name: f"module.{name}",
    "FSDP": lambda name: "_fsdp_wrapped_module." + name.replace("embed_tokens.", "embed_tokens._fsdp_wrapped_module."),
    "no prefix": lambda name: name.removeprefix(PREFIX),
    "language_model inside": lambda name: name.replace(f"{PREFIX}model.", f"{PREFIX}model.language_model."),
    "language_model outside": lambda name: name.replace(PREFIX, f"{PREFIX}language_model."),
}


@pytest.mark.parametrize("name", NAMES)
def test_wrappers_and_prefixes_are_read_of_them_too(name: str) -> None:
    rename = NAMES[name]
    expected = revision(read(pairs(), target_modules=TARGETS))
    settings: dict[str, Any] = {"modules_to_save": ["lm_head"], "trainable_token_indices": [7, 3]}
    expected_rows = revision(read(rows(), **settings))

    renamed = read({rename(each): value for each, value in pairs().items()}, target_modules=TARGETS)
    assert revision(renamed) == expected
    assert renamed.rules
    assert revision(read({rename(each): value for each, value in rows().items()}, **settings)) == expected_rows


def test_the_embedding_of_a_model_without_its_lm_head_is_the_models() -> None:
    values = {name: value for name, value in pairs().items() if "lm_head" not in name}
    headless = {name.replace("model.model.model.", "model.model."): value for name, value in values.items()}

    targets = ["q_proj", "embed_tokens"]
    assert revision(read(headless, target_modules=targets)) == revision(read(values, target_modules=targets))


def test_an_adapters_name_inside_is_left_out() -> None:
    named = {
        f"{EMBED}.lora_embedding_A": f"{EMBED}.lora_embedding_A.mine",
        f"{EMBED}.lora_embedding_B": f"{EMBED}.lora_embedding_B.mine",
        f"{HEAD}.lora_A.weight": f"{HEAD}.lora_A.mine.weight",
        f"{HEAD}.lora_B.weight": f"{HEAD}.lora_B.mine.weight",
    }
    other = {named.get(name, name): value for name, value in pairs().items()}
    assert revision(read(other, target_modules=TARGETS)) == revision(read(pairs(), target_modules=TARGETS))

    named = {
        f"{EMBED}.token_adapter.trainable_tokens_delta": f"{EMBED}.token_adapter.trainable_tokens_delta.mine",
        f"{HEAD}.weight": f"{HEAD}.modules_to_save.mine.weight",
    }
    settings: dict[str, Any] = {"modules_to_save": ["lm_head"], "trainable_token_indices": [7, 3]}
    other = {named.get(name, name): value for name, value in rows().items()}
    assert revision(read(other, **settings)) == revision(read(rows(), **settings))
    two = other | {f"{HEAD}.lora_A.yours.weight": random(2, 64)}
    with pytest.raises(AdapterIncompatibleError, match=r"several adapters: .*'mine'.*'yours'"):
        read(two, **settings)


def mlx(values: Values) -> Values:
    found = {}
    for name, value in values.items():
        ours = name.removeprefix(PREFIX).removesuffix(".weight").replace("lora_embedding_", "lora_")
        found[ours.replace("lora_A", "lora_a").replace("lora_B", "lora_b")] = value.T.copy()
    return found


def mlx_fields() -> dict[str, Any]:
    return {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": 2, "scale": 8.0}}


def test_mlx_holds_their_transposes() -> None:
    peft = read(pairs(), target_modules=TARGETS, lora_alpha=16)

    assert revision(read(mlx(pairs()), fields=mlx_fields())) == revision(peft)
    assert revision(read(mlx(pairs()), target_modules=TARGETS, lora_alpha=16)) == revision(peft)


def test_mlx_adapts_a_tied_matrix_where_it_is_the_head_too() -> None:
    values = {name: value for name, value in pairs().items() if "lm_head" not in name}
    targets = ["q_proj", "embed_tokens"]
    alike = read(values, "tied", target_modules=targets, lora_alpha=16, ensure_weight_tying=True)

    assert revision(read(mlx(values), "tied", fields=mlx_fields())) == revision(alike)
    assert {each.projection for each in alike.modules} == {"q_proj", "embed_tokens", "lm_head"}


def test_torchtune_calls_lm_head_output() -> None:
    values = {name: value for name, value in pairs().items() if "lm_head" in name}
    theirs = {f"output.lora_{'a' if '_A' in name else 'b'}.weight": value for name, value in values.items()}

    expected = revision(read(values, target_modules=["lm_head"]))
    assert revision(read(theirs, target_modules=["output"])) == expected
    assert revision(read(theirs, target_modules=["lm_head"])) == expected


@pytest.mark.parametrize("name", ["model.lm_head.lora_A.weight", "x.embed_tokens.weight", "lm_head.lora_down.weight"])
def test_a_name_that_no_rule_knows_is_refused(name: str) -> None:
    with pytest.raises(AdapterIncompatibleError, match=name):
        read(pairs() | {name: random(2, 64)}, target_modules=TARGETS)
