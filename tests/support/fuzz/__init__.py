"""Mutated files and streams at everything that reads what strangers send; see `support.fuzz.__main__`."""
