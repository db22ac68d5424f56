"""Shapes of base models that are held beside Llama-3-8B: their distance to the byte floor should be the same."""

from __future__ import annotations

from typing import Any, Final

from loraplex_engine.simulation.shapes import base_model_from_config

from loraplex_bench.shapes import LLAMA3_8B, LLAMA3_8B_FP8, Shape

QWEN3_8B: Final[dict[str, Any]] = {
    "architectures": ["Qwen3ForCausalLM"],
    "num_hidden_layers": 36,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
}
GEMMA3_4B: Final[dict[str, Any]] = {
    "architectures": ["Gemma3ForCausalLM"],
    "num_hidden_layers": 34,
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "sliding_window": 1024,
    "sliding_window_pattern": 6,
    "query_pre_attn_scalar": 256,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    "tie_word_embeddings": True,
}
PHI4: Final[dict[str, Any]] = {
    "architectures": ["Phi3ForCausalLM"],
    "num_hidden_layers": 40,
    "hidden_size": 5120,
    "intermediate_size": 17920,
    "num_attention_heads": 40,
    "num_key_value_heads": 10,
    "vocab_size": 100352,
    "max_position_embeddings": 16384,
    "original_max_position_embeddings": 16384,
    "rms_norm_eps": 1e-5,
    "rope_theta": 250000.0,
    "tie_word_embeddings": False,
}
BF16_SHAPES: Final = (
    LLAMA3_8B,
    Shape(info=base_model_from_config("gemma3-4b", GEMMA3_4B), pool_gib=48.0),
    Shape(info=base_model_from_config("phi4", PHI4), pool_gib=36.0),
)
"""In bf16; the first is what the others are compared with."""
FP8_SHAPES: Final = (
    LLAMA3_8B_FP8,
    Shape(info=base_model_from_config("qwen3-8b", QWEN3_8B), pool_gib=52.0, is_fp8=True, has_fp8_blocks=True),
)
"""In FP8, likewise."""
