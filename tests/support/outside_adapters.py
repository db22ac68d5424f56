"""Adapters of the embedding and lm_head in peft: random values, their parts as the engine takes them, and peft's logits.

Rows are what peft computes with after loading, read from the model itself: the embedding of each token, and lm_head's output for
each unit vector; those equal to the base's are left out.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from loraplex_common.adapter_image import AdapterSpec, ModuleSpec, Tensors
from loraplex_common.low_rank import LowRank
from loraplex_common.token_rows import Rows
from peft import LoraConfig, get_peft_model
from peft.utils.other import ModulesToSaveWrapper
from transformers import AutoModelForCausalLM

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from loraplex_common.part_kind import Arrays, Part
    from numpy.typing import NDArray

KINDS = ("plain", "lora", "embed lora", "head lora", "saved", "trained", "resized")
"""Plain: of the decoder's layers alone."""
ADDING = ("saved", "trained", "resized")
"""Kinds that add tokens."""
LOUD = 3.0
"""How much longer than the base's typical row of lm_head an added token's is: greedy draws take them."""


@dataclass(frozen=True)
class OutsideAdapter:
    """One model with one adapter, in fp32.

    Attributes:
        added: Tokens that it adds.
        changed: Tokens with rows of its own, those among them.
    """

    model: Any
    spec: AdapterSpec
    tensors: Tensors
    added: tuple[int, ...]
    changed: tuple[int, ...]


class OutsideTruth:
    """A base model and adapters of these kinds, each on a copy of its own; see `support.oracle.Oracle`.

    Attributes:
        vocab_size: The base's.
        adapters: By name.
    """

    def __init__(self, model_dir: Path, kinds: Sequence[str], *, seed: int = 0, num_added: int = 3) -> None:
        base: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager")
        self._base = base.eval()
        self.vocab_size: int = base.config.vocab_size
        self.adapters = {
            f"{kind}-{at}": _adapt(copy.deepcopy(self._base), kind, seed + at, num_added + at)
            for at, kind in enumerate(kinds)
        }

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int], adapter: str | None = None) -> NDArray[np.float32]:
        """Return the logits after each token, ``[tokens, tokens that the adapter has]``."""
        model = self._base if adapter is None else self.adapters[adapter].model
        found: NDArray[np.float32] = model(torch.tensor([list(token_ids)]), use_cache=False).logits[0].numpy()
        return found

    def greedy(self, prompt: Sequence[int], num_tokens: int, adapter: str | None = None) -> list[int]:
        """Return the likeliest continuation."""
        tokens = list(prompt)
        for _ in range(num_tokens):
            tokens.append(int(self.logits(tokens, adapter)[-1].argmax()))
        return tokens[len(prompt) :]

    def known_ids(self, adapter: str | None) -> NDArray[np.int64]:
        """Return the tokens that a prompt may have."""
        added = () if adapter is None else self.adapters[adapter].added
        return np.array([*range(self.vocab_size), *added])


def _adapt(model: Any, kind: str, seed: int, num_added: int) -> OutsideAdapter:
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    vocab_size, base = model.config.vocab_size, copy.deepcopy(model)
    if kind in ADDING:
        model.resize_token_embeddings(vocab_size + num_added, mean_resizing=False)
    added = tuple(range(vocab_size, vocab_size + num_added)) if kind in ADDING else ()
    changed = [*rng.choice(vocab_size, 5, replace=False).tolist(), *added]
    if kind == "resized":
        _shift(model.get_input_embeddings().weight, added)
        _shift(model.get_output_embeddings().weight, added, LOUD)
    is_tied = base.config.tie_word_embeddings
    model = get_peft_model(model, _config(kind, rng, changed, is_tied=is_tied)).eval()
    modules, tensors = _pairs(model, rng)
    outside = base.config.num_hidden_layers
    if kind in ("saved", "trained"):
        _train_rows(model, kind, changed)
    embed, head = _rows_of(model, base)
    for projection, (ids, values) in (("embed_tokens", embed), ("lm_head", head)):
        if kind not in ADDING or not len(ids):
            continue
        modules.append(ModuleSpec(outside, projection, (Rows(len(ids), int(ids[-1])),)))
        tensors[outside, projection, Rows.kind] = (ids, values)
    modules.sort(key=lambda module: module.layer)
    return OutsideAdapter(model, AdapterSpec(f"{seed + 1:064x}", tuple(modules)), tensors, added, tuple(changed))


def _config(kind: str, rng: np.random.Generator, changed: list[int], *, is_tied: bool) -> LoraConfig:
    rank = int(rng.integers(1, 9))
    outside = {
        "lora": ["embed_tokens", "lm_head"],
        "embed lora": ["embed_tokens"],
        "head lora": ["lm_head"],
    }.get(kind, [])
    indices: Any = None
    if kind == "trained":
        indices = changed if is_tied else {"embed_tokens": changed, "lm_head": changed}
    return LoraConfig(
        r=rank,
        lora_alpha=int(rng.integers(1, 2 * rank + 1)),
        target_modules=["q_proj", "down_proj", *outside],
        modules_to_save=["embed_tokens", "lm_head"] if kind == "saved" else None,
        trainable_token_indices=indices,
    )


@torch.no_grad()
def _shift(weight: torch.Tensor, ids: Sequence[int], factor: float = 1.0) -> None:
    """Give rows values as long as the others' and longer by a factor."""
    typical = float(weight[: min(ids)].norm(dim=1).mean()) if ids else 0.0
    rows = torch.randn(len(ids), weight.shape[1])
    weight[list(ids)] = rows / rows.norm(dim=1, keepdim=True) * typical * factor


@torch.no_grad()
def _train_rows(model: Any, kind: str, changed: list[int]) -> None:
    """Change what training would change of rows: of lm_head the added ones are loud."""
    for name, module in model.named_modules():
        factor = LOUD if name.endswith("lm_head") else 1.0
        if kind == "saved" and isinstance(module, ModulesToSaveWrapper):
            saved: Any = module.modules_to_save
            weight = saved["default"].weight
            for token in changed:
                rows = torch.randn(weight.shape[1])
                weight[token] = rows / rows.norm() * float(weight[:64].norm(dim=1).mean()) * factor
        if kind == "trained" and hasattr(module, "trainable_tokens_delta"):
            delta = module.trainable_tokens_delta["default"]
            typical = float(module.get_base_layer().weight[:64].norm(dim=1).mean())
            rows = torch.randn_like(delta)
            delta.copy_(rows / rows.norm(dim=1, keepdim=True) * typical * factor)


def _array(values: torch.Tensor) -> NDArray[np.float32]:
    return values.detach().float().numpy().copy()


def _pairs(model: Any, rng: np.random.Generator) -> tuple[list[ModuleSpec], dict[tuple[int, str, str], Arrays]]:
    """Give all pairs random values, and return them."""
    modules: list[ModuleSpec] = []
    tensors: dict[tuple[int, str, str], Arrays] = {}
    outside: int = model.config.num_hidden_layers
    for name, module in model.named_modules():
        if not hasattr(module, "lora_A") or not (module.lora_A or module.lora_embedding_A):
            continue
        match = re.search(r"layers\.(\d+)\.\w+\.(\w+)$", name)
        layer, projection = (int(match[1]), match[2]) if match else (outside, name.rpartition(".")[2])
        scaling = float(module.scaling["default"])
        a, b = _random_pair(module, scaling)
        part: Part = LowRank(len(a), scaling)
        modules.append(ModuleSpec(layer, projection, (part,)))
        tensors[layer, projection, part.kind] = (a, b)
    return modules, tensors


@torch.no_grad()
def _random_pair(module: Any, scaling: float) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    if module.lora_embedding_A:
        a, b = module.lora_embedding_A["default"], module.lora_embedding_B["default"]
        a.copy_(torch.randn_like(a))
    else:
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
    b.copy_(torch.randn_like(b) * (0.5 / (scaling * b.shape[1] ** 0.5)))
    return _array(a), _array(b)


@torch.inference_mode()
def _rows_of(model: Any, base: Any) -> list[tuple[NDArray[np.int32], NDArray[np.float32]]]:
    """Return ids and values of the rows of the embedding and of lm_head that differ from the base's."""
    num_tokens: int = model.get_input_embeddings().weight.shape[0]
    own = [
        model.get_input_embeddings()(torch.arange(num_tokens)),
        model.get_output_embeddings()(torch.eye(base.config.hidden_size)).T,
    ]
    theirs = [base.get_input_embeddings().weight, base.get_output_embeddings().weight]
    found = []
    for mine, plain in zip(own, theirs, strict=True):
        equal = (mine[: len(plain)] == plain).all(dim=1).numpy()
        ids = np.flatnonzero(~np.pad(equal, (0, num_tokens - len(plain)))).astype(np.int32)
        found.append((ids, _array(mine)[ids]))
    return found
