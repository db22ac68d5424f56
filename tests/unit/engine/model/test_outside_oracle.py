"""Adapters of the embedding and of lm_head, mixed in one batch with others, compute what peft computes with each alone."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loraplex_common.adapter_image import pack
from loraplex_engine.step import SlotSetup
from peft import LoraConfig, PeftModel
from support.base_models import Architecture, TinyBase, write_base_model
from support.oracle import Comparison, make_rig
from support.outside_adapters import ADDING, KINDS, OutsideTruth
from support.outside_files import save_outside
from support.peft_methods import base_dir, base_info, base_model
from support.plans import Draw, Sequence_
from support.teacher_forcing import NUM_FORCED, compare

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from support.oracle import Rig

NO_IDS = np.empty(0, np.int32)
EMBED, HEAD = "embed_tokens", "lm_head"
NUM_ROWS = 390


class LoadedFiles:
    """The models that PEFT makes of adapters' folders; see `support.oracle.Oracle`."""

    def __init__(self, base: str, folders: dict[str, Path], num_rows: dict[str, int]) -> None:
        self.vocab_size, self._num_rows = base_info(base).vocab_size, num_rows
        self._models: dict[str | None, Any] = {None: base_model(base).eval()}
        for name, folder in folders.items():
            resized = base_model(base)
            if num_rows[name] > self.vocab_size:
                resized.resize_token_embeddings(num_rows[name])
            self._models[name] = PeftModel.from_pretrained(resized, str(folder)).eval()

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int], adapter: str | None = None) -> NDArray[np.float32]:
        found: NDArray[np.float32] = self._models[adapter](torch.tensor([list(token_ids)])).logits[0].float().numpy()
        return found

    def greedy(self, prompt: Sequence[int], num_tokens: int, adapter: str | None = None) -> list[int]:
        tokens = list(prompt)
        for _ in range(num_tokens):
            tokens.append(int(self.logits(tokens, adapter)[-1].argmax()))
        return tokens[len(prompt) :]

    def known_ids(self, adapter: str | None) -> NDArray[np.int64]:
        return np.arange(self.vocab_size if adapter is None else self._num_rows[adapter])


def load_all(rig: Rig, truth: OutsideTruth) -> None:
    for name, adapter in truth.adapters.items():
        rig.adapters[name] = rig.harness.load(adapter.spec, pack(rig.runner.geometry, adapter.spec, adapter.tensors))


def add_sequences(rig: Rig, truth: OutsideTruth | LoadedFiles, seed: int) -> list[tuple[str | None, Sequence_]]:
    """Two sequences per adapter and for the base: prompts of the tokens that each has, in chunks, teacher-forced."""
    rng, added = np.random.default_rng(seed), []
    for name, index in list(rig.adapters.items()) * 2:
        ids = truth.known_ids(name)
        prompt = rng.choice(ids, int(rng.integers(2, 40))).tolist()
        if len(ids) > truth.vocab_size:
            prompt[int(rng.integers(len(prompt)))] = int(ids[-1])
        cuts = np.flatnonzero(rng.random(len(prompt) - 1) < 0.1) + 1
        setup = SlotSetup(slot=0, prompt_token_ids=NO_IDS, output_token_ids=NO_IDS, prompt_logprobs=len(ids))
        sequence = rig.harness.add(
            prompt,
            adapter=index,
            forced=truth.greedy(prompt, NUM_FORCED, name),
            chunks=np.diff([0, *cuts]).tolist(),
            draw=Draw(num_logprobs=len(ids)),
            setup=setup,
        )
        added.append((name, sequence))
    return added


def check_batch(rig: Rig, truth: OutsideTruth | LoadedFiles, seed: int) -> int:
    """Run a batch of the base and all adapters and compare every position; returns how many added tokens were drawn."""
    added = add_sequences(rig, truth, seed)
    rig.harness.generate([sequence for _, sequence in added], NUM_FORCED + 1)
    tally = Comparison()
    compare(truth, added, tally)
    tally.check()
    rig.harness.release(sequence for _, sequence in added)
    return sum(token >= truth.vocab_size for _, sequence in added for token in sequence.drawn)


@settings(max_examples=8, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(
    architecture=st.sampled_from(["llama", "qwen2", "qwen3"]),
    kinds=st.lists(st.sampled_from(KINDS), min_size=2, max_size=4),
    is_tied=st.booleans(),
    vocab_size=st.sampled_from([384, 389]),
    seed=st.integers(0, 1 << 20),
)
def test_any_mix_equals_peft(
    architecture: Architecture, kinds: list[str], vocab_size: int, seed: int, *, is_tied: bool
) -> None:
    base = TinyBase(architecture=architecture, vocab_size=vocab_size, tie_word_embeddings=is_tied, seed=seed % 1000)
    with tempfile.TemporaryDirectory() as folder:
        model_dir = write_base_model(Path(folder), base)
        truth, rig = OutsideTruth(model_dir, kinds, seed=seed), make_rig(model_dir, num_pages=1500)
        load_all(rig, truth)

        check_batch(rig, truth, seed)

        rig.runner.close()


@pytest.mark.parametrize("is_tied", [False, True])
def test_all_kinds_in_one_batch_equal_peft_and_draw_added_tokens(tmp_path: Path, *, is_tied: bool) -> None:
    model_dir = write_base_model(tmp_path, TinyBase(vocab_size=384, tie_word_embeddings=is_tied))
    truth, rig = OutsideTruth(model_dir, KINDS), make_rig(model_dir, num_pages=1500)
    load_all(rig, truth)

    num_drawn = sum(check_batch(rig, truth, seed) for seed in range(3))

    assert num_drawn >= len(ADDING)
    prompt = list(range(40, 60))
    for name in truth.adapters:
        assert np.abs(truth.logits(prompt, name)[:, :384] - truth.logits(prompt)).max() > 0.05, name
    rig.runner.close()


def lora(*targets: str, **more: Any) -> LoraConfig:
    return LoraConfig(r=2, lora_alpha=3, task_type="CAUSAL_LM", target_modules=["q_proj", *targets], **more)


@pytest.mark.parametrize("base", ["llama", "tied"])
def test_files_that_peft_writes_equal_peft_in_one_batch(base: str, tmp_path: Path) -> None:
    configs = {
        "pairs": (lora(EMBED, HEAD), None),
        "tied pairs": (lora(EMBED, ensure_weight_tying=True), None),
        "saved": (lora(modules_to_save=[EMBED, HEAD]), None),
        "a pair beside saved rows": (lora(HEAD, modules_to_save=[EMBED]), None),
        "tokens": (lora(trainable_token_indices=[9, 3, 380]), None),
        "only resized": (lora(), NUM_ROWS),
        "resized and saved": (lora(modules_to_save=[EMBED, HEAD]), NUM_ROWS),
        "resized pairs": (lora(EMBED, HEAD), NUM_ROWS),
        "resized tokens": (lora(trainable_token_indices={EMBED: [3, 385], HEAD: [3, 385]}), NUM_ROWS),
    }
    folders, num_rows = {}, {}
    for seed, (name, (config, count)) in enumerate(configs.items()):
        folders[name], num_rows[name] = tmp_path / str(seed), count or base_info(base).vocab_size
        save_outside(folders[name], base, config, num_rows=count, seed=seed, save=count is not None)
    truth, rig = LoadedFiles(base, folders, num_rows), make_rig(base_dir(base), folders, num_pages=2500)

    check_batch(rig, truth, seed=0)

    rig.runner.close()
