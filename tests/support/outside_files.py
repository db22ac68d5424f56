"""Adapters of embedding and lm_head as PEFT itself writes them, and the matrices that PEFT and the store make of them."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from loraplex_common.low_rank import LOW_RANK
from loraplex_common.token_rows import ROWS
from peft import PeftModel, get_peft_model
from support.peft_methods import base_info, base_model

if TYPE_CHECKING:
    from pathlib import Path

    from loraplex_adapter_store.checkpoint.canonical import CanonicalAdapter
    from numpy.typing import NDArray

EMBED, HEAD = "embed_tokens", "lm_head"
FILES = ("adapter_config.json", "adapter_model.safetensors")


def save_outside(
    folder: Path,
    base: str,
    config: Any,
    *,
    num_rows: int | None = None,
    dtype: torch.dtype = torch.float32,
    rows: list[int] | None = None,
    seed: int = 0,
    save: Any = "auto",
) -> dict[str, bytes]:
    """Write an adapter with values that training could have given, and return its two files.

    Args:
        folder: Where to write it.
        base: One of `support.peft_methods.BASES`.
        config: PEFT's.
        num_rows: Rows of embedding and lm_head if they are resized.
        dtype: What is trained has it.
        rows: Rows of whole matrices that training changes; None for all.
        seed: Decides the values.
        save: PEFT's ``save_embedding_layers``.
    """
    torch.manual_seed(seed)
    resized = base_model(base)
    if num_rows is not None:
        resized.resize_token_embeddings(num_rows)
    model = get_peft_model(resized, copy.deepcopy(config))  # PEFT writes into it
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            noise = 0.1 * torch.randn_like(parameter)
            if rows is not None and ".modules_to_save." in name:
                kept = torch.zeros(len(parameter), 1)
                kept[rows] = 1
                noise *= kept
            parameter += noise
            parameter.data = parameter.data.to(dtype)
    model.save_pretrained(str(folder), save_embedding_layers=save)
    return {name: (folder / name).read_bytes() for name in FILES}


def peft_matrices(folder: Path, base: str, num_rows: int | None = None) -> dict[str, NDArray[np.float32]]:
    """Return embedding and lm_head ``[rows, hidden]`` of the model that PEFT loads, by what they make of their inputs."""
    resized = base_model(base)
    if num_rows is not None:
        resized.resize_token_embeddings(num_rows)
    model: Any = PeftModel.from_pretrained(resized, str(folder)).eval().get_base_model()
    count, hidden = num_rows or base_info(base).vocab_size, base_info(base).hidden_size
    with torch.no_grad():
        embed = model.get_input_embeddings()(torch.arange(count))
        head = model.get_output_embeddings()(torch.eye(hidden)).T
    return {EMBED: embed.float().numpy(), HEAD: head.float().numpy()}


def our_matrices(adapter: CanonicalAdapter, base: str, num_rows: int | None = None) -> dict[str, NDArray[np.float32]]:
    """Return the same by the adapter's parts; rows that neither base nor adapter has are NaN."""
    model, info = base_model(base), base_info(base)
    count, layer = num_rows or info.vocab_size, info.num_layers
    found = {}
    for name, module in ((EMBED, model.get_input_embeddings()), (HEAD, model.get_output_embeddings())):
        matrix = np.full((count, info.hidden_size), np.nan, dtype=np.float32)
        matrix[: info.vocab_size] = module.weight.detach().numpy()
        spec = next((each for each in adapter.spec.modules if (each.layer, each.projection) == (layer, name)), None)
        if spec is not None and spec.pair is not None:
            a, b = adapter.tensors[layer, name, LOW_RANK]
            delta = np.float32(spec.scaling) * (b @ a)
            matrix[: info.vocab_size] += delta.T if name == EMBED else delta
        if (layer, name, ROWS) in adapter.tensors:
            ids, values = adapter.tensors[layer, name, ROWS]
            matrix[ids] = values
        found[name] = matrix
    return found


def outside_parts(adapter: CanonicalAdapter, base: str) -> dict[str, dict[str, int]]:
    """Return the sizes of an adapter's parts outside of the layers: module -> kind -> size."""
    found: dict[str, dict[str, int]] = {}
    for layer, projection, kind, size in adapter.spec.sizes:
        if layer == base_info(base).num_layers:
            found.setdefault(projection, {})[kind] = size
    return found
