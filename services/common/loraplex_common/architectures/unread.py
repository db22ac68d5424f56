"""Refuses what no reader of config.json understood: an entry that changes the computation is never passed over.

A reader asks for each entry that its architecture computes something by. The others are known to change nothing (the
lists below), or are refused by name: a soft cap, a multiplier or a layer without RoPE that went unnoticed would give
fluent, wrong text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

    from loraplex_common.config_values import BaseModelError, ConfigValues

_ABOUT_THE_FILE: Final = (
    *("_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_flash_attn_2_enabled", "_name_or_path"),
    *("architectures", "attn_implementation", "auto_map", "dtype", "finetuned", "finetuning_task", "internal_version"),
    *("is_llama_config", "language"),
    *("model_name", "model_type", "name_or_path", "tokenizer_class", "torch_dtype", "transformers_version"),
    *("transformers.js_config", "unsloth_fixed", "unsloth_version", "use_flash_attn", "use_flashattn"),
)
_ABOUT_WEIGHTS: Final = ("quantization_config", "compression_config")
"""Read before an architecture's reader is called."""
_ABOUT_TRAINING: Final = (
    *("attention_dropout", "classifier_dropout", "embd_pdrop", "gradient_checkpointing", "hidden_dropout"),
    *("initializer_range", "pretraining_tp", "resid_pdrop", "residual_dropout", "use_cache"),
)
_ABOUT_TOKENS: Final = (
    *("begin_suppress_tokens", "bad_words_ids", "bos_token_id", "decoder_start_token_id", "eos_token_id"),
    *("forced_bos_token_id", "forced_eos_token_id", "pad_token_id", "prefix", "sep_token_id", "suppress_tokens"),
    *("unk_token_id",),
)
_ABOUT_OUTPUTS: Final = (
    *("chunk_size_feed_forward", "id2label", "label2id", "num_labels", "output_attentions", "output_hidden_states"),
    *("output_scores", "problem_type", "return_dict", "return_dict_in_generate", "task_specific_params"),
    *("tf_legacy_loss", "torchscript", "use_bfloat16", "remove_invalid_values"),
)
_ABOUT_GENERATION: Final = (
    *("cache_implementation", "diversity_penalty", "do_sample", "early_stopping", "encoder_no_repeat_ngram_size"),
    *("exponential_decay_length_penalty", "length_penalty", "max_length", "max_new_tokens", "max_sequence_length"),
    *("max_seq_len", "min_length", "model_max_length", "no_repeat_ngram_size", "num_beam_groups", "num_beams"),
    *("num_return_sequences", "repetition_penalty", "seq_length", "temperature", "top_k", "top_p", "typical_p"),
)
"""Defaults that old releases of transformers wrote here; generation_config.json has those that are read."""
HARMLESS: Final = frozenset(
    (*_ABOUT_THE_FILE, *_ABOUT_WEIGHTS, *_ABOUT_TRAINING, *_ABOUT_TOKENS, *_ABOUT_OUTPUTS, *_ABOUT_GENERATION)
)
"""Keys that change nothing of what a decoder computes, whatever their value, in any object of config.json."""
NEUTRAL: Final[Mapping[str, Any]] = {
    "add_cross_attention": False,
    "attention_out_bias": False,
    "bias": False,
    "embedding_multiplier": 1.0,
    "is_causal": True,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "llama_4_scaling_beta": 0.0,
    "logit_scale": 1.0,
    "logits_scaling": 1.0,
    "no_rope_layers": [],
    "pruned_heads": {},
    "qk_layernorm": False,
    "qkv_bias": False,
    "residual_multiplier": 1.0,
    "rope_interleaved": False,
    "rope_ratio": 1.0,
    "scale_emb": 1.0,
    "tie_encoder_decoder": False,
    "use_mrope": False,
    "use_qk_norm": False,
}
"""Keys with the one value at which they change nothing."""


def refuse_unread(values: ConfigValues) -> None:
    """Refuse the entries that an architecture's reader did not ask for and that are not known to change nothing.

    Args:
        values: The entries of config.json, after the reader is done.

    Raises:
        BaseModelError: That names each of them.
    """
    unread = [(path, value) for path, value in values.unread() if not _changes_nothing(path, value)]
    if unread:
        raise _refusal(values, unread)


def _changes_nothing(path: str, value: Any) -> bool:
    key = path if path in HARMLESS else path.rpartition(".")[2]
    if key in HARMLESS:
        return True
    neutral = NEUTRAL.get(key)
    # 0 and False are equal in Python, but not in a config.json: there, one of them is a mistake.
    return key in NEUTRAL and value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def _refusal(values: ConfigValues, unread: list[tuple[str, Any]]) -> BaseModelError:
    named = ", ".join(f"{path} {repr(value)[:80]}" for path, value in unread)
    return values.problem(
        f"{named} {'is' if len(unread) == 1 else 'are'} not served: nothing is known to be computed by "
        f"{'it' if len(unread) == 1 else 'them'} in this architecture; serve a model without, or remove what only "
        "describes the model from the file"
    )
