"""Text and tokens: models, tokenizers, chat templates, detokenizing, stop strings."""
