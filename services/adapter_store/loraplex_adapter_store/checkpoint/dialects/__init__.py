"""Dialects: how programs other than PEFT write a LoRA adapter, brought into the form that PEFT would have written.

`normalise` stands in front of the reader, which then checks the result as it checks PEFT's own files. `RULES` is the table
of what is known, with its origins. A tensor that no rule knows keeps its name, so that the reader refuses it by name.
"""

from __future__ import annotations

from loraplex_adapter_store.checkpoint.dialects.configs import peft_config_data
from loraplex_adapter_store.checkpoint.dialects.normaliser import Normalised, normalise
from loraplex_adapter_store.checkpoint.dialects.table import RULES, Rule

__all__ = ["RULES", "Normalised", "Rule", "normalise", "peft_config_data"]
