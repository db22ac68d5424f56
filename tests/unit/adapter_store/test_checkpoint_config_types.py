"""Every key of adapter_config.json takes every kind of JSON: a typed refusal, or what PEFT makes of it; never a crash."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from loraplex_adapter_store.checkpoint.canonical import canonicalise
from loraplex_adapter_store.checkpoint.reader import read_checkpoint
from loraplex_common.base_model import load_base_model
from loraplex_common.error_status import to_status
from loraplex_common.errors import AdapterCorruptUploadError, AdapterIncompatibleError, LoraplexError
from peft import LoraConfig
from support.adapters import Recipe, adapter_config, adapter_tensors
from support.safetensors_files import safetensors_bytes
from support.store_rig import tiny_base_dir

RECIPE = Recipe(targets=("q_proj",), rank=2, alpha=4)
FIELDS = adapter_config(RECIPE)
KEYS = sorted({*(field.name for field in dataclasses.fields(LoraConfig)), *FIELDS, "some_future_setting"})
VALUES: dict[str, Any] = {
    "null": None,
    "true": True,
    "false": False,
    "zero": 0,
    "negative": -1,
    "float": 0.5,
    "huge": 10**400,
    "NaN": float("nan"),
    "infinity": float("inf"),
    "empty string": "",
    "string": "x",
    "surrogate": "a/\ud800",
    "pattern": "(((",
    "empty list": [],
    "list": [1, "x", None],
    "nested": [[[{}]]],
    "empty object": {},
    "object": {"q_proj": "x", "1": None},
    "surrogate key": {"\ud800": [0]},
}
# What PEFT reads as if the key were not there, or as its default.
SAME_AS_ABSENT = {
    *("use_rslora", "use_dora", "lora_bias", "rank_pattern", "alpha_pattern", "exclude_modules", "layers_to_transform"),
    *("layers_pattern", "modules_to_save", "bias", "task_type", "base_model_name_or_path", "init_lora_weights"),
}
SCALES = {"lora_alpha", "use_rslora"}


@pytest.fixture(scope="module")
def weights() -> bytes:
    return safetensors_bytes(adapter_tensors(load_base_model(tiny_base_dir()), RECIPE), RECIPE.dtype)


def outcome(fields: dict[str, Any], weights: bytes) -> str | LoraplexError:
    """Return an adapter's revision, or why there is none."""
    try:
        return canonicalise(
            read_checkpoint(json.dumps(fields).encode(), weights, load_base_model(tiny_base_dir()))
        ).revision
    except (AdapterCorruptUploadError, AdapterIncompatibleError) as error:
        return error


@pytest.mark.parametrize("key", KEYS)
def test_any_value_of_a_key_is_read_as_peft_does_or_refused_by_name(key: str, weights: bytes) -> None:
    revision = outcome(FIELDS, weights)
    assert isinstance(revision, str)

    for kind, value in VALUES.items():
        found = outcome(FIELDS | {key: value}, weights)
        if isinstance(found, LoraplexError):
            assert key in found.message or key == "r", (kind, found.message)
            assert not (value is None and key in SAME_AS_ABSENT), (kind, found.message)
            assert to_status(found).message  # whatever it quotes can travel
        elif key not in SCALES:
            assert found == revision, kind


@pytest.mark.parametrize("key", ["kasa_config", "velora_config", "monteclora_config", "arrow_config", "use_bdlora"])
def test_a_variants_empty_config_is_that_variant(key: str, weights: bytes) -> None:
    """PEFT fills it with the variant's defaults: KaSA's, for one, compute something else."""
    found = outcome(FIELDS | {key: {}}, weights)

    assert isinstance(found, AdapterIncompatibleError)
    assert key in found.message
