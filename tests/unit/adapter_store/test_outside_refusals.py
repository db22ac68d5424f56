"""What PEFT could not load as it was trained, and what is not served outside of the layers, is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from loraplex_adapter_store.checkpoint.reader import Checkpoint, read_checkpoint
from loraplex_common.errors import AdapterCorruptUploadError, AdapterIncompatibleError, LoraplexError
from loraplex_common.token_rows import ROWS
from safetensors.numpy import load_file
from support.adapters import Recipe, adapter_config, adapter_tensors
from support.peft_methods import base_dir, base_info
from support.safetensors_files import safetensors_bytes

if TYPE_CHECKING:
    from numpy.typing import NDArray

EMBED, HEAD = "base_model.model.model.embed_tokens", "base_model.model.lm_head"
VOCAB, HIDDEN = 384, 64


def matrix(rows: int = VOCAB, columns: int = HIDDEN, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((rows, columns), dtype=np.float32)


def read(
    base: str = "llama", *, base_files: bool = True, config: dict[str, Any] | None = None, **tensors: Any
) -> Checkpoint:
    """Read an adapter on q_proj with more settings and more tensors: ``head_weight`` is `HEAD`'s ``weight``."""
    recipe = Recipe(rank=2, targets=("q_proj",))
    is_targeted = "q_proj" in (config or {}).get("target_modules", ("q_proj",))
    values: dict[str, Any] = dict(adapter_tensors(base_info(base), recipe)) if is_targeted else {}
    for name, value in tensors.items():
        module, slot = name.split("_", 1)
        values[f"{EMBED if module == 'embed' else HEAD}.{slot.replace('__', '.')}"] = value
    fields = adapter_config(recipe) | (config or {})
    return read_checkpoint(
        json.dumps(fields).encode(),
        safetensors_bytes(values, "float32"),
        base_info(base),
        base_dir=base_dir(base) if base_files else None,
    )


def pair(rows: int = VOCAB) -> dict[str, Any]:
    return {"head_lora_A__weight": matrix(2, HIDDEN), "head_lora_B__weight": matrix(rows, 2)}


def embed_pair(rows: int = VOCAB) -> dict[str, Any]:
    return {"embed_lora_embedding_A": matrix(2, rows), "embed_lora_embedding_B": matrix(HIDDEN, 2)}


TARGETS = ["q_proj", "lm_head"]
DELTA = "token_adapter__trainable_tokens_delta"
REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    # base, settings, tensors, what the message has
    "another module saved": ("llama", {"modules_to_save": ["norm"]}, {}, "modules_to_save names 'norm'"),
    "another module's tokens": ("llama", {"trainable_token_indices": {"wte": [1]}}, {}, "trainable_token_indices names 'wte'"),
    "a token twice": ("llama", {"trainable_token_indices": [1, 1]}, {f"embed_{DELTA}": matrix(2)}, "a token twice"),
    "a negative token": ("llama", {"trainable_token_indices": [-1]}, {f"embed_{DELTA}": matrix(1)}, "a negative one"),
    "no ids": ("llama", {"trainable_token_indices": ["a"]}, {}, "no list of token ids"),
    "no list": ("llama", {"modules_to_save": [7]}, {}, "modules_to_save is no list of names"),
    "no flag": ("llama", {"ensure_weight_tying": "yes"}, {}, "ensure_weight_tying is not true or false"),
    "saved and missing": ("llama", {"modules_to_save": ["lm_head"]}, {}, f"tensor {HEAD}.weight is missing.*modules_to_save"),
    "targeted and missing": ("llama", {"target_modules": TARGETS}, {}, rf"tensor {HEAD}.lora_A.weight is missing.*target_modules"),
    "tokens and missing": (
        "llama",
        {"trainable_token_indices": [3]},
        {},
        f"{EMBED}.token_adapter.trainable_tokens_delta is missing.*trainable_token_indices",
    ),
    "a pair without target": ("llama", {}, pair(), f"tensor {HEAD}.lora_A.weight is not explained by"),
    "rows without indices": ("llama", {}, {f"head_{DELTA}": matrix(1)}, "is not explained by"),
    "fewer rows": ("llama", {"modules_to_save": ["lm_head"]}, {"head_weight": matrix(380)}, f"{HEAD}.weight has 380 rows, fewer than the 384"),
    "a cut copy": ("llama", {}, {"embed_weight": matrix(380)}, f"{EMBED}.weight has 380 rows, fewer"),
    "another width": ("llama", {"modules_to_save": ["lm_head"]}, {"head_weight": matrix(VOCAB, 32)}, r"shape \[384, 32\], expected \[384, 64\]"),
    "a shard": ("llama", {"modules_to_save": ["lm_head"]}, {"head_weight": np.zeros(0, np.float32)}, r"shape \[0\], expected"),
    "rows of other ids": ("llama", {"trainable_token_indices": [3]}, {f"embed_{DELTA}": matrix(2)}, r"shape \[2, 64\], expected \[1, 64\]"),
    "added columns without their rows": (
        "llama",
        {"target_modules": ["q_proj", "embed_tokens"]},
        embed_pair(390),
        r"lora_embedding_A has shape \[2, 390\], expected \[2, 384\].*rows of added tokens in the file",
    ),
    "a pair of Linear on the embedding": (
        "llama",
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"embed_lora_A__weight": matrix(2, VOCAB)},
        "PEFT loads of embed_tokens its weight.*lora_embedding_A",
    ),
    "dora of lm_head": ("llama", {"target_modules": TARGETS, "use_dora": True}, pair(), "use_dora"),
    "magnitudes of lm_head": ("llama", {"target_modules": TARGETS}, pair() | {"head_lora_magnitude_vector": np.ones(VOCAB, np.float32)}, "DoRA of the embedding or of lm_head"),
    "a bias of lm_head": ("llama", {"target_modules": TARGETS}, pair() | {"head_lora_B__bias": np.ones(VOCAB, np.float32)}, "a bias of lm_head is not served"),
    "tokens of a targeted embedding": (
        "llama",
        {"target_modules": ["embed_tokens"], "trainable_token_indices": [3]},
        embed_pair() | {f"embed_{DELTA}": matrix(1)},
        "embed_tokens in target_modules together with trainable_token_indices",
    ),
    "tokens of a saved embedding": (
        "llama",
        {"modules_to_save": ["embed_tokens"], "trainable_token_indices": [3]},
        {"embed_weight": matrix(), f"embed_{DELTA}": matrix(1)},
        "embed_tokens in modules_to_save together with trainable_token_indices",
    ),
    "a saved lm_head tied to trained tokens": (
        "tied",
        {"modules_to_save": ["lm_head"], "trainable_token_indices": [3]},
        {"head_weight": matrix(), f"embed_{DELTA}": matrix(1)},
        "of the embedding that it is tied to",
    ),
    "tying different tokens": (
        "tied",
        {"trainable_token_indices": {"embed_tokens": [3], "lm_head": [4]}, "ensure_weight_tying": True},
        {f"embed_{DELTA}": matrix(1), f"head_{DELTA}": matrix(1)},
        "ensure_weight_tying with different trainable_token_indices",
    ),
    "tying by a pattern": (
        "tied",
        {"target_modules": r".*(q_proj|lm_head)", "ensure_weight_tying": True},
        pair(),
        "ensure_weight_tying with a pattern for target_modules",
    ),
    "tying what is saved with what is targeted": (
        "tied",
        {"target_modules": TARGETS, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        pair() | {"embed_weight": matrix()},
        "ensure_weight_tying with both modules_to_save and target_modules",
    ),
    "two copies of a tied matrix": ("tied", {}, {"embed_weight": matrix(seed=1), "head_weight": matrix(seed=2)}, f"{EMBED}.weight and {HEAD}.weight are one.*but differ"),
    "two tied matrices": (
        "tied",
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"embed_weight": matrix(seed=1), "head_weight": matrix(seed=2)},
        "but differ",
    ),
    "two tied pairs": (
        "tied",
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
        embed_pair() | pair(),
        "but differ",
    ),
    "two trained matrices of one module": (
        "llama",
        {"modules_to_save": ["lm_head"]},
        {"head_weight": matrix(seed=1), "head_modules_to_save__weight": matrix(seed=2)},
        "but differ",
    ),
    "activated by a sequence": ("llama", {"alora_invocation_tokens": [5], "modules_to_save": ["lm_head"]}, {"head_weight": matrix()}, "alora_invocation_tokens together with a trained lm_head"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_by_name(case: str) -> None:
    base, config, tensors, match = REFUSED[case]
    with pytest.raises(LoraplexError, match=match) as caught:
        read(base, config=config, **tensors)
    assert isinstance(caught.value, AdapterIncompatibleError | AdapterCorruptUploadError)


def test_values_that_no_engine_holds_are_refused_in_replaced_rows() -> None:
    rows = matrix()
    rows[7, 3] = np.nan
    with pytest.raises(
        AdapterCorruptUploadError, match=rf"{HEAD}\.weight, in the \d+ rows that it replaces, holds 1 NaN"
    ):
        read(config={"modules_to_save": ["lm_head"]}, head_weight=rows)


@pytest.mark.parametrize(
    ("config", "tensors"),
    [
        ({"modules_to_save": ["embed_tokens"]}, {"embed_weight": 1e30 * matrix()}),
        ({"target_modules": ["embed_tokens"]}, {name: 1e15 * each for name, each in embed_pair().items()}),
        ({"target_modules": TARGETS}, {name: 1e19 * each for name, each in pair().items()}),
    ],
    ids=["rows", "a pair on the embedding", "a pair on lm_head"],
)
def test_values_that_leave_the_range_of_engines_are_refused(config: dict[str, Any], tensors: dict[str, Any]) -> None:
    with pytest.raises(AdapterCorruptUploadError, match=r"(embed_tokens|lm_head).*(range)"):
        read(config=config, **tensors)


def test_rows_are_refused_where_the_base_models_files_are_not_known() -> None:
    with pytest.raises(AdapterIncompatibleError, match=rf"tensor {HEAD}\.weight: its rows have to be compared"):
        read(base_files=False, config={"modules_to_save": ["lm_head"]}, head_weight=matrix())


def test_a_base_that_declares_nothing_outside_takes_nothing_there() -> None:
    info = replace(base_info("llama"), outside=())
    recipe = Recipe(rank=2, targets=("q_proj",))
    values = adapter_tensors(base_info("llama"), recipe) | {f"{HEAD}.weight": matrix()}
    with pytest.raises(AdapterIncompatibleError, match=rf"tensor {HEAD}\.weight"):
        read_checkpoint(json.dumps(adapter_config(recipe)).encode(), safetensors_bytes(values, "float32"), info)


def test_the_notes_say_how_many_rows_are_stored() -> None:
    rows = np.concatenate([base_head(), matrix(5)])
    rows[[3, 9]] += 1
    checkpoint = read(config={"modules_to_save": ["lm_head"]}, head_weight=rows)

    assert checkpoint.folded == (
        "lm_head: 2 of 384 rows differ from the base model's and are stored, and 5 of added tokens",
    )
    (module,) = (each for each in checkpoint.modules if each.projection == "lm_head")
    part = module.of_kind(ROWS)
    assert part is not None
    np.testing.assert_array_equal(part.tensors[0].values(), [3, 9, 384, 385, 386, 387, 388])
    np.testing.assert_array_equal(part.tensors[1].values(), rows[[3, 9, 384, 385, 386, 387, 388]])


def base_head() -> NDArray[np.float32]:
    return load_file(base_dir("llama") / "model.safetensors")["lm_head.weight"]


def test_an_embedding_of_another_name_is_left_to_its_architecture() -> None:
    words = replace(base_info("llama").outside[0], path="decoder.words")
    info = replace(base_info("llama"), outside=(words, base_info("llama").outside[1]))
    recipe = Recipe(rank=2, targets=("q_proj",))
    values = adapter_tensors(base_info("llama"), recipe)

    def read_with(config: dict[str, Any], more: dict[str, Any]) -> Checkpoint:
        data = json.dumps(adapter_config(recipe) | config).encode()
        return read_checkpoint(data, safetensors_bytes(values | more, "float32"), info, base_dir=base_dir("llama"))

    saved = read_with({"modules_to_save": ["lm_head"]}, {f"{HEAD}.weight": matrix()})
    assert saved.modules[-1].projection == "lm_head"
    with pytest.raises(AdapterIncompatibleError, match="target_modules includes words, which is not served"):
        read_with({"target_modules": ["q_proj", "words"]}, {})
    with pytest.raises(AdapterIncompatibleError, match="llama has no embed_tokens that adapters may replace"):
        read_with({"modules_to_save": ["embed_tokens"]}, {})
    with pytest.raises(AdapterIncompatibleError, match=r"tensor base_model\.model\.decoder\.words\.weight"):
        read_with({}, {"base_model.model.decoder.words.weight": matrix()})
