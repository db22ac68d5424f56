"""Converts a Llama model from GGUF to a directory in Hugging Face layout, with numpy alone.

Quantised weights are expanded to fp32 and rounded to bf16. llama.cpp stores the rows of q and k so that RoPE rotates
neighbours instead of halves; that permutation is undone here. What the converter does not know (an architecture, a
tokenizer, a tensor) is refused by name: a model that loads must be the model that was meant.
"""

from __future__ import annotations

import json
import shutil
import struct
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from loraplex_common.bfloat16 import to_bfloat16

from loraplex_client.demo.errors import ConversionError
from loraplex_client.demo.gguf_tokenizer import chat_template, special_tokens, tokenizer_json

if TYPE_CHECKING:
    import gguf
    from numpy.typing import NDArray

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes expected)."""

SMOLLM2_HUB_ID: Final = "HuggingFaceTB/SmolLM2-135M-Instruct"
TOP_LEVEL: Final = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
PER_LAYER: Final = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert(gguf_path: Path, out_dir: Path, progress: Progress | None = None, *, hub_id: str = SMOLLM2_HUB_ID) -> Path:
    """Write a GGUF model as config.json, model.safetensors (bf16), tokenizer and generation config.

    Args:
        gguf_path: The file to read; architecture ``llama``, byte-level BPE tokenizer.
        out_dir: Directory to create; replaced if it exists. It appears only once it is complete.
        progress: Told of the bf16 bytes converted so far.
        hub_id: Public name of the model, under which adapters name their base.

    Returns:
        `out_dir`.

    Raises:
        ConversionError: If the file holds an unknown architecture, tokenizer or tensor.
    """
    import gguf  # only the extra `convert` installs it

    reader = gguf.GGUFReader(gguf_path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if (architecture := fields.get("general.architecture")) != "llama":
        raise ConversionError(f"{gguf_path}: architecture {architecture!r} is not 'llama'")
    documents = {
        "config.json": _config(fields, {tensor.name for tensor in reader.tensors}, hub_id),
        "generation_config.json": _generation_config(fields),
        "tokenizer.json": tokenizer_json(fields),
        "tokenizer_config.json": _tokenizer_config(fields),
    }
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.", dir=out_dir.parent))
    try:
        _write_weights(reader, fields, building / "model.safetensors", progress or (lambda done, total: None))
        for name, document in documents.items():
            (building / name).write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        building.chmod(0o755)  # mkdtemp makes it private; containers read it as another user
        shutil.rmtree(out_dir, ignore_errors=True)
        building.rename(out_dir)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return out_dir


def _shortest(value: float) -> float:
    """Undo the widening of an fp32 field, e.g. 9.999999747378752e-06 to 1e-05."""
    return float(str(np.float32(value)))


def _config(fields: Mapping[str, Any], tensor_names: set[str], hub_id: str) -> dict[str, Any]:
    num_heads = int(fields["llama.attention.head_count"])
    hidden_size = int(fields["llama.embedding_length"])
    return {
        "_name_or_path": hub_id,
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fields.get("tokenizer.ggml.eos_token_id"),
        "head_dim": int(fields.get("llama.rope.dimension_count") or hidden_size // num_heads),
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": int(fields["llama.feed_forward_length"]),
        "max_position_embeddings": int(fields["llama.context_length"]),
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": num_heads,
        "num_hidden_layers": int(fields["llama.block_count"]),
        "num_key_value_heads": int(fields["llama.attention.head_count_kv"]),
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
        "rms_norm_eps": _shortest(fields["llama.attention.layer_norm_rms_epsilon"]),
        "rope_theta": _shortest(fields.get("llama.rope.freq_base", 10000.0)),
        "tie_word_embeddings": "output.weight" not in tensor_names,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
    }


def _generation_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "_from_model_config": True,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fields.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
    }


def _tokenizer_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": bool(fields.get("tokenizer.ggml.add_bos_token", False)),
        "add_eos_token": bool(fields.get("tokenizer.ggml.add_eos_token", False)),
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(fields["llama.context_length"]),
        **special_tokens(fields),
        **chat_template(fields),
    }


def _write_weights(reader: gguf.GGUFReader, fields: Mapping[str, Any], path: Path, progress: Progress) -> None:
    """Write all tensors as bf16, in order of name, one at a time.

    numpy has no bf16, so the safetensors library cannot take these arrays; the format is a length, a JSON header and
    the tensors' bytes.
    """
    from gguf.quants import dequantize

    heads = {
        "q_proj.weight": int(fields["llama.attention.head_count"]),
        "k_proj.weight": int(fields["llama.attention.head_count_kv"]),
    }
    tensors = sorted(((_hugging_face_name(tensor.name), tensor) for tensor in reader.tensors), key=lambda pair: pair[0])
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    total = 0
    for name, tensor in tensors:
        num_bytes = 2 * int(tensor.n_elements)
        header[name] = {"dtype": "BF16", "shape": _shape(tensor), "data_offsets": [total, total + num_bytes]}
        total += num_bytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensors start aligned, so that readers can map them
    done = 0
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name, tensor in tensors:
            values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False).reshape(_shape(tensor))
            num_heads = heads.get(".".join(name.split(".")[-2:]))
            if num_heads is not None:
                values = _undo_rope_permutation(values, num_heads)
            done += file.write(to_bfloat16(values).tobytes())
            progress(done, total)


def _shape(tensor: gguf.ReaderTensor) -> list[int]:
    """Return the shape, slowest dimension first; GGUF lists the fastest first."""
    return [int(size) for size in reversed(tensor.shape)]


def _hugging_face_name(name: str) -> str:
    """Return what Hugging Face calls a GGUF tensor.

    Raises:
        ConversionError: If the tensor is none of a plain Llama's.
    """
    parts = name.split(".")
    if parts[-1] == "weight":
        if len(parts) == 2 and parts[0] in TOP_LEVEL:
            return f"{TOP_LEVEL[parts[0]]}.weight"
        if len(parts) == 4 and parts[0] == "blk" and parts[1].isdigit() and parts[2] in PER_LAYER:
            return f"model.layers.{parts[1]}.{PER_LAYER[parts[2]]}.weight"
    raise ConversionError(f"tensor {name!r} is not part of a plain Llama model")


def _undo_rope_permutation(weight: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """Put the rows of q or k back from (pair, half) to (half, pair) order within each head; ``[rows, cols]``."""
    rows, cols = weight.shape
    return weight.reshape(num_heads, rows // num_heads // 2, 2, cols).swapaxes(1, 2).reshape(rows, cols)
