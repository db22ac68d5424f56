"""Names that several wrappers have touched, each tensor otherwise, are still one adapter; a stray tensor is named."""

from __future__ import annotations

import functools
import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex_adapter_store.checkpoint.canonical import canonicalise
from loraplex_adapter_store.checkpoint.reader import read_checkpoint
from loraplex_common.base_model import BaseModelInfo, load_base_model
from loraplex_common.errors import AdapterCorruptUploadError, AdapterIncompatibleError
from support.adapters import Recipe, adapter_config, adapter_tensors
from support.safetensors_files import safetensors_bytes
from support.store_rig import tiny_base_dir

if TYPE_CHECKING:
    from support.dialects import Values

RECIPE = Recipe(targets=("q_proj", "down_proj"), rank=2)
WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
PREFIXES = (
    "base_model.model.model.",
    "model.",
    "base_model.model.",
    "base_model.model.language_model.model.",
    "language_model.model.",
)
ENDS = ("lora_X.weight", "lora_X.default.weight", "lora_X")


@functools.cache
def base() -> BaseModelInfo:
    return load_base_model(tiny_base_dir())


def revision(values: Values) -> str:
    config = json.dumps(adapter_config(RECIPE)).encode()
    return canonicalise(read_checkpoint(config, safetensors_bytes(values, "float32"), base())).revision


@st.composite
def written(draw: st.DrawFn) -> Any:
    """Draw a prefix, an end and places of wrappers for each tensor of an adapter; the file's order too."""
    values: Values = {}
    for name, value in draw(st.permutations(list(adapter_tensors(base(), RECIPE).items()))):
        module, _, end = name.removeprefix("base_model.model.model.").partition(".lora_")
        other = draw(st.sampled_from(PREFIXES)) + f"{module}.{draw(st.sampled_from(ENDS)).replace('X', end[0])}"
        parts = other.split(".")
        for place in draw(st.lists(st.integers(0, parts.index("layers")), max_size=2)):
            parts.insert(place, draw(st.sampled_from(WRAPPERS)))
        values[".".join(parts)] = value
    return values


@settings(max_examples=30, deadline=None)
@given(values=written())
def test_names_that_wrappers_have_touched_are_those_of_one_adapter(values: Values) -> None:
    assert revision(values) == revision(adapter_tensors(base(), RECIPE))


@settings(max_examples=30, deadline=None)
@given(values=written(), stray=st.data())
def test_a_tensor_that_is_not_applied_is_refused_by_its_name(values: Values, stray: st.DataObject) -> None:
    """A name that is spoilt in one place, or comes to one that is there already."""
    known = stray.draw(st.sampled_from(sorted(values)))
    name = stray.draw(
        st.sampled_from(
            [
                f"module.{known}",
                f"other.{known}",
                known.replace("proj", "prof"),
                known.replace("lora_", "lore_"),
                f"{known}.x",
            ]
        )
    )

    with pytest.raises((AdapterIncompatibleError, AdapterCorruptUploadError)) as caught:
        revision(values | {name: values[known]})

    # `lora_B` and `lora_B.x` are both names of a tensor that PEFT would look for as `lora_B.weight`: either may be named.
    told = (name, known) if name == f"{known}.x" and not known.endswith(".weight") else (name,)
    assert any(each[:200] in caught.value.message for each in told)


@pytest.mark.parametrize("wrapper", ["", "_orig_mod."])
def test_of_two_names_that_lack_the_same_end_one_is_named_as_the_file_has_it(wrapper: str) -> None:
    values = adapter_tensors(base(), RECIPE)
    module = "base_model.model.model.layers.0.mlp.down_proj.lora_B"
    value, named = values.pop(f"{module}.weight"), f"{wrapper}{module}"

    with pytest.raises(AdapterIncompatibleError, match=f"tensor {named}"):
        revision(values | {named: value, f"{named}.x": value})
