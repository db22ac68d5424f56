"""Small tokenizers of the two kinds that Llama-family models have: byte-level BPE, and pieces with byte fallback."""

from __future__ import annotations

import functools

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = ["hello world, the quick brown fox", "grüße aus köln", "你好 世界", "def f(x):\n    return x * 2"]


@functools.cache
def byte_level_tokenizer() -> Tokenizer:
    """Return a tokenizer as Llama 3, Qwen and SmolLM have it, with BOS, EOS, a special and a plain added token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[AddedToken(token, special=True) for token in ("<s>", "</s>", "<|im_start|>")],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<tool é>", special=False, normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


@functools.cache
def byte_fallback_tokenizer() -> Tokenizer:
    """Return a tokenizer as Llama 2 and Mistral have it: pieces with U+2581 for space, unknown characters as bytes."""
    pieces = ["\u2581", "h", "e", "l", "o", "w", "r", "d", "!", "he", "ll", "hell", "hello", "\u2581hello", "wo", "rl"]
    pieces += ["worl", "world", "\u2581world"]
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("\u2581", "hello")]
    merges += [("w", "o"), ("r", "l"), ("wo", "rl"), ("worl", "d"), ("\u2581", "world")]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    vocab = {token: n for n, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer
