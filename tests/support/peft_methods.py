"""Adapters of every method as PEFT itself writes them, and what parts make of a projection, for comparisons."""

from __future__ import annotations

import functools
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from loraplex_adapter_store.checkpoint.canonical import CanonicalAdapter, canonicalise, read_canonical
from loraplex_adapter_store.checkpoint.reader import read_checkpoint
from loraplex_common.base_model import BaseModelInfo, load_base_model
from loraplex_common.flora import FLORA
from loraplex_common.low_rank import LOW_RANK, LowRank
from loraplex_common.sparse_delta import SPARSE_DELTA, SparseDelta
from loraplex_common.vectors import BIAS, IN_VECTOR, OUT_VECTOR, OutVector
from peft import PeftModel, get_peft_model
from support.base_models import TinyBase, write_base_model
from transformers import AutoModelForCausalLM

if TYPE_CHECKING:
    from loraplex_common.part_kind import Arrays, Part
    from numpy.typing import NDArray

BASES = {
    "llama": TinyBase(),
    "qwen2": TinyBase(architecture="qwen2"),
    "bf16": TinyBase(bias=True, dtype="bfloat16"),
    "tied": TinyBase(tie_word_embeddings=True),
    "odd": TinyBase(architecture="qwen3", num_kv_heads=1, vocab_size=401),
    "tied bf16": TinyBase(architecture="qwen3", tie_word_embeddings=True, dtype="bfloat16"),
}


@functools.cache
def base_dir(name: str) -> Path:
    """Return the directory of one of `BASES`, written once per process."""
    return write_base_model(Path(tempfile.mkdtemp(prefix="loraplex-methods-")) / name, BASES[name])


@functools.cache
def base_info(name: str) -> BaseModelInfo:
    """Return what the store knows of it."""
    return load_base_model(base_dir(name))


def base_model(name: str) -> Any:
    """Return a fresh copy of it in fp32, as PEFT changes models in place."""
    torch.set_num_threads(1)
    factory: Any = AutoModelForCausalLM  # untyped
    return factory.from_pretrained(base_dir(name), dtype=torch.float32).eval()


def save_trained(
    folder: Path,
    base: str,
    config: Any,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    std: float = 0.2,
    before_save: Any = None,
) -> dict[str, bytes]:
    """Write an adapter whose parameters have values that training could have given, and return its two files."""
    torch.manual_seed(seed)
    model = get_peft_model(base_model(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            noise = torch.randn_like(parameter)
            parameter.copy_(parameter * (1 + std * noise) if "magnitude" in name else parameter + std * noise)
            if "base_layer" not in name and dtype != torch.float32:
                parameter.data = parameter.data.to(dtype)
    if before_save is not None:
        before_save(model)
    model.save_pretrained(str(folder))
    return {name: (folder / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")}


def read_files(files: dict[str, bytes], base: str) -> CanonicalAdapter:
    """Read a checkpoint, write its canonical form, and read that back."""
    checkpoint = read_checkpoint(
        files["adapter_config.json"], files["adapter_model.safetensors"], base_info(base), base_dir=base_dir(base)
    )
    form = canonicalise(checkpoint)
    adapter = read_canonical(b"".join(form.chunks()), form.revision)
    assert adapter.spec == form.spec
    return adapter


def peft_outputs(folder: Path, base: str, inputs: dict[str, torch.Tensor]) -> dict[str, NDArray[np.float32]]:
    """Return what each module of the model that PEFT loads makes of its input, by dotted name."""
    model: Any = PeftModel.from_pretrained(base_model(base), str(folder)).base_model.model
    model.eval()
    with torch.no_grad():
        return {name: model.get_submodule(name)(x).numpy() for name, x in inputs.items()}


def outputs_of(parts: dict[str, tuple[Part, Arrays]], layer: Any, x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return what a projection with some parts makes of inputs ``[rows, in]``, by the formula of ADR 26 in fp64.

    Args:
        parts: By kind, with their values.
        layer: The base's `torch.nn.Linear`.
        x: Inputs.
    """
    weight = layer.weight.detach().numpy().astype(np.float64)
    bias = 0.0 if layer.bias is None else layer.bias.detach().numpy().astype(np.float64)
    values = {kind: tuple(np.asarray(each, dtype=np.float64) for each in part[1]) for kind, part in parts.items()}
    product = (x * values[IN_VECTOR][0] if IN_VECTOR in values else x) @ weight.T
    if FLORA in values:
        product = x @ (weight * (values[FLORA][1] @ values[FLORA][0])).T
    delta = np.zeros_like(weight)
    if LOW_RANK in values:
        pair = parts[LOW_RANK][0]
        assert isinstance(pair, LowRank)
        delta = pair.scaling * (values[LOW_RANK][1] @ values[LOW_RANK][0])
    y: NDArray[np.float64] = product + x @ delta.T
    if OUT_VECTOR in values:
        out = parts[OUT_VECTOR][0]
        assert isinstance(out, OutVector)
        c = values[OUT_VECTOR][0]
        c = c / np.linalg.norm(weight + delta, axis=1) if out.is_magnitude else c
        y, bias = c * y, bias * (c if out.scales_bias else 1.0)
    if SPARSE_DELTA in values:
        sparse = parts[SPARSE_DELTA][0]
        assert isinstance(sparse, SparseDelta)
        y = y + sparse.scaling * (x @ dense(parts[SPARSE_DELTA][1], weight.shape).T)
    return y + bias + (values[BIAS][0] if BIAS in values else 0.0)


def dense(csr: Arrays, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Return a sparse delta's values, columns and starts as a matrix."""
    values, columns, starts = csr
    matrix = np.zeros(shape)
    for row, (begin, end) in enumerate(pairwise(starts)):
        matrix[row, columns[begin:end]] = values[begin:end]
    return matrix
