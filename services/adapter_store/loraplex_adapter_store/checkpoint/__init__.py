"""Reads foreign PEFT checkpoints: the only code in loraplex that parses files which loraplex did not write."""
