"""Reads foreign PEFT checkpoints: the only code in loraplex that parses files it did not write."""
