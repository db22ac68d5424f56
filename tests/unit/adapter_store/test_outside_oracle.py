"""What the store reads of embedding and lm_head is what PEFT computes after loading the same files, on tied and untied bases."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex_common.low_rank import LOW_RANK
from loraplex_common.token_rows import ROWS
from peft import AdaLoraConfig, IA3Config, LoraConfig
from support.outside_files import EMBED, HEAD, our_matrices, outside_parts, peft_matrices, save_outside
from support.peft_methods import read_files

VOCAB = 384
ALL = {ROWS: VOCAB}
PAIR = {LOW_RANK: 2}


def lora(*targets: str, **more: Any) -> LoraConfig:
    return LoraConfig(r=2, lora_alpha=3, task_type="CAUSAL_LM", target_modules=list(targets) or ["q_proj"], **more)


INDICES = [9, 3, 380]
THREE = {ROWS: 3}
CASES: dict[str, tuple[LoraConfig, dict[str, Any], dict[str, Any]]] = {
    # configuration; parts on an untied base; parts on a tied base
    "a pair on lm_head": (lora("q_proj", HEAD), {HEAD: PAIR}, {HEAD: PAIR}),
    "a pair on the embedding": (lora("q_proj", EMBED), {EMBED: PAIR}, {EMBED: PAIR}),
    "pairs on both and nothing else": (lora(EMBED, HEAD), {EMBED: PAIR, HEAD: PAIR}, {EMBED: PAIR, HEAD: PAIR}),
    "rank and alpha by pattern": (
        lora(EMBED, HEAD, rank_pattern={"lm_head": 5}, alpha_pattern={"model.embed_tokens": 7}, use_rslora=True),
        {EMBED: PAIR, HEAD: {LOW_RANK: 5}},
        {EMBED: PAIR, HEAD: {LOW_RANK: 5}},
    ),
    "tied pairs": (lora("q_proj", EMBED, ensure_weight_tying=True), {EMBED: PAIR}, {EMBED: PAIR, HEAD: PAIR}),
    "tied pairs by way of lm_head, its own scaling": (
        lora("q_proj", HEAD, alpha_pattern={"lm_head": 8}, ensure_weight_tying=True),
        {HEAD: PAIR},
        {EMBED: PAIR, HEAD: PAIR},
    ),
    "both saved": (lora(modules_to_save=[EMBED, HEAD]), {EMBED: ALL, HEAD: ALL}, {EMBED: ALL, HEAD: ALL}),
    "lm_head saved": (lora(modules_to_save=[HEAD]), {HEAD: ALL}, {HEAD: ALL}),
    "the embedding saved, a pair on lm_head": (
        lora("q_proj", HEAD, modules_to_save=[EMBED]),
        {EMBED: ALL, HEAD: PAIR},
        {EMBED: ALL, HEAD: PAIR},
    ),
    "the embedding saved and targeted": (lora("q_proj", EMBED, modules_to_save=[EMBED]), {EMBED: ALL}, {EMBED: ALL}),
    "saved and tied": (
        lora(modules_to_save=[HEAD], ensure_weight_tying=True),
        {HEAD: ALL},
        {EMBED: ALL, HEAD: ALL},
    ),
    "tokens": (lora(trainable_token_indices=INDICES), {EMBED: THREE}, {EMBED: THREE, HEAD: THREE}),
    "tokens by name": (
        lora(trainable_token_indices={"embed_tokens": INDICES}),
        {EMBED: THREE},
        {EMBED: THREE, HEAD: THREE},
    ),
    "tokens of both": (
        lora(trainable_token_indices={"model.embed_tokens": INDICES, HEAD: INDICES}),
        {EMBED: THREE, HEAD: THREE},
        {EMBED: THREE, HEAD: THREE},
    ),
    "other tokens of lm_head": (
        lora(trainable_token_indices={EMBED: INDICES, HEAD: [1]}),
        {EMBED: THREE, HEAD: {ROWS: 1}},
        {EMBED: THREE, HEAD: {ROWS: 1}},
    ),
    "tokens of lm_head": (lora(trainable_token_indices={HEAD: INDICES}), {HEAD: THREE}, {HEAD: THREE}),
    "tokens, and a pair on lm_head": (
        lora("q_proj", HEAD, trainable_token_indices=INDICES),
        {EMBED: THREE, HEAD: PAIR},
        {EMBED: THREE, HEAD: PAIR | THREE},
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("base", ["llama", "tied"])
def test_embedding_and_lm_head_are_those_that_peft_loads(case: str, base: str, tmp_path: Path) -> None:
    config, untied, tied = CASES[case]
    adapter = read_files(save_outside(tmp_path, base, config), base)

    assert outside_parts(adapter, base) == (tied if base == "tied" else untied)
    ours, theirs = our_matrices(adapter, base), peft_matrices(tmp_path, base)
    for name in (EMBED, HEAD):
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5, atol=1e-6, err_msg=name)


RESIZED: dict[str, tuple[LoraConfig, dict[str, int], dict[str, int]]] = {
    # configuration; parts of the embedding and of lm_head, on any base
    "only resized": (lora(), {ROWS: 6}, {ROWS: 6}),
    "saved": (lora(modules_to_save=[EMBED, HEAD]), {ROWS: 390}, {ROWS: 390}),
    "the embedding saved": (lora(modules_to_save=[EMBED]), {ROWS: 390}, {ROWS: 6}),
    "pairs": (lora("q_proj", EMBED, HEAD), PAIR | {ROWS: 6}, PAIR | {ROWS: 6}),
    "a pair on lm_head": (lora("q_proj", HEAD), {ROWS: 6}, PAIR | {ROWS: 6}),
    "tokens of both": (
        lora(trainable_token_indices={EMBED: [3, 385], HEAD: [3, 385]}),
        {ROWS: 7},
        {ROWS: 7},
    ),
}


@pytest.mark.parametrize("case", RESIZED)
@pytest.mark.parametrize("base", ["bf16", "tied bf16"])
def test_rows_of_added_tokens_are_those_of_the_resized_model(case: str, base: str, tmp_path: Path) -> None:
    config, embed, head = RESIZED[case]
    adapter = read_files(save_outside(tmp_path, base, config, num_rows=390, save=True), base)

    parts = outside_parts(adapter, base)
    if case == "a pair on lm_head" and base == "bf16":
        embed = {}  # PEFT saves the copies of targeted modules alone
    assert (parts.get(EMBED, {}), parts.get(HEAD, {})) == (embed, head)
    ours, theirs = our_matrices(adapter, base, 390), peft_matrices(tmp_path, base, 390)
    for name in (EMBED, HEAD) if embed else (HEAD,):
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5, atol=1e-6, err_msg=name)
    assert adapter.spec.last_row_id == 389
    assert adapter.spec.unscalable is not None


@settings(max_examples=12, deadline=None)
@given(
    base=st.sampled_from(["llama", "tied", "bf16", "tied bf16"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    rows=st.sets(st.integers(0, VOCAB - 1), max_size=40),
    saved=st.sampled_from([[EMBED], [HEAD], [EMBED, HEAD]]),
    targets=st.sampled_from([["q_proj"], ["v_proj", HEAD], [EMBED, "q_proj"]]),
)
def test_of_a_saved_matrix_only_rows_that_differ_from_the_base_are_stored(
    base: str, dtype: torch.dtype, rows: set[int], saved: list[str], targets: list[str]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        config = lora(*targets, modules_to_save=saved)
        files = save_outside(Path(folder), base, config, rows=sorted(rows), dtype=dtype)
        adapter, theirs = read_files(files, base), peft_matrices(Path(folder), base)
    ours, parts = our_matrices(adapter, base), outside_parts(adapter, base)

    for name in saved:
        assert parts.get(name, {}).get(ROWS, 0) == len(rows)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    for name in (EMBED, HEAD):  # rows that are left out are the base's, before the file's dtype rounded them
        np.testing.assert_allclose(ours[name], theirs[name], rtol=tolerance, atol=1e-6, err_msg=name)
        if name in saved and rows:
            np.testing.assert_array_equal(ours[name][sorted(rows)], theirs[name][sorted(rows)])


def test_copies_of_the_base_that_a_file_brings_change_nothing(tmp_path: Path) -> None:
    adapter = read_files(save_outside(tmp_path, "tied", lora(), save=True), "tied")

    assert outside_parts(adapter, "tied") == {}
    assert adapter.spec == read_files(save_outside(tmp_path / "plain", "tied", lora(), save=False), "tied").spec


@pytest.mark.parametrize(
    "config",
    [
        IA3Config(target_modules=["k_proj"], feedforward_modules=[], modules_to_save=[HEAD]),
        AdaLoraConfig(init_r=4, target_modules=["q_proj"], total_step=10, modules_to_save=[HEAD]),
    ],
    ids=["ia3", "adalora"],
)
def test_every_method_may_save_lm_head(config: Any, tmp_path: Path) -> None:
    config.task_type = "CAUSAL_LM"
    adapter = read_files(save_outside(tmp_path, "llama", config, rows=[5, 6, 7]), "llama")

    assert outside_parts(adapter, "llama") == {HEAD: THREE}
    ours, theirs = our_matrices(adapter, "llama"), peft_matrices(tmp_path, "llama")
    np.testing.assert_array_equal(ours[HEAD], theirs[HEAD])
