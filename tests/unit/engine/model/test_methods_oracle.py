"""Files that PEFT writes for each of its methods, read as the store reads them and mixed in one batch, equal PEFT."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from peft import AdaLoraConfig, IA3Config, LoraConfig, ShiraConfig, VeraConfig
from support.decoder_shapes import PROJECTIONS
from support.oracle import Comparison, Oracle, make_rig
from support.peft_methods import BASES, base_dir, save_trained
from support.teacher_forcing import NUM_FORCED, add_sequences, compare

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

QV = ["q_proj", "v_proj"]
CONFIGS: dict[str, Any] = {
    "lora": LoraConfig(r=3, lora_alpha=5, target_modules=list(PROJECTIONS)),
    "dora": LoraConfig(r=3, lora_alpha=5, target_modules=list(PROJECTIONS), use_dora=True),
    "lora_bias": LoraConfig(r=3, target_modules=["k_proj", "down_proj"], lora_bias=True),
    "dora with biases": LoraConfig(r=3, target_modules=QV, bias="all", use_dora=True),
    "ia3": IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "adalora": AdaLoraConfig(init_r=4, target_modules=QV, total_step=10),
    "vera": VeraConfig(r=6, target_modules=list(PROJECTIONS)),
    "shira": ShiraConfig(r=1, target_modules=list(PROJECTIONS), random_seed=3),
}


class Truths:
    """One PEFT model per adapter, as methods do not mix in one."""

    def __init__(self, model_dir: Path, folders: dict[str, Path]) -> None:
        self._oracles: dict[str | None, Oracle] = {
            name: Oracle(model_dir, {name: folder}) for name, folder in folders.items()
        }
        self._oracles[None] = Oracle(model_dir)

    def logits(self, token_ids: Sequence[int], adapter: str | None = None) -> NDArray[np.float32]:
        return self._oracles[adapter].logits(token_ids, adapter)

    def greedy(self, prompt: Sequence[int], num_tokens: int, adapter: str | None = None) -> list[int]:
        return self._oracles[adapter].greedy(prompt, num_tokens, adapter)


def test_files_of_every_method_in_one_batch_equal_peft(tmp_path: Path) -> None:
    model_dir, folders = base_dir("qwen2"), {}
    for number, (name, config) in enumerate(CONFIGS.items()):
        config.task_type = "CAUSAL_LM"
        folders[name] = tmp_path / str(number)
        save_trained(folders[name], "qwen2", config, seed=number, std=0.1)
    truths, rig = Truths(model_dir, folders), make_rig(model_dir, folders, num_pages=1500)
    vocab_size = BASES["qwen2"].vocab_size

    added = add_sequences(rig, truths, np.random.default_rng(0), vocab_size)
    rig.harness.generate([sequence for _, sequence in added], NUM_FORCED + 1)

    tally = Comparison()
    compare(truths, added, tally)
    tally.check()
    prompt = list(range(40, 60))
    for name in CONFIGS:
        assert np.abs(truths.logits(prompt, name) - truths.logits(prompt)).max() > 0.05, name
    rig.runner.close()
