"""What reading a checkpoint folds together, in words: kept with the revision for its report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from loraplex_common.vectors import IN_VECTOR

from loraplex_adapter_store.checkpoint.peft_methods import ADALORA, FLORA, SHIRA, VERA

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from loraplex_adapter_store.checkpoint.parts import Module
    from loraplex_adapter_store.checkpoint.peft_config import PeftConfig

_BY_METHOD: Final = {
    ADALORA: "lora_E is multiplied into lora_A: {count} pairs, modules whose budget is 0 left out",
    VERA: "vera_lambda_d and vera_lambda_b are multiplied into the rows of the shared matrices: {count} pairs of rank {rank}",
    SHIRA: "values are ordered by output, and their places are held by output: {count} sparse deltas",
}


def folded_of(config: PeftConfig, modules: Sequence[Module]) -> Iterator[str]:
    """Yield what was folded; nothing for plain LoRA."""
    if said := _BY_METHOD.get(config.method):
        yield said.format(count=len(modules), rank=config.rank)
    factors = sum(config.method == FLORA and module.of_kind(IN_VECTOR) is not None for module in modules)
    if factors:
        yield f"lora_A and lora_B of rank 1 are factors on inputs and outputs: {factors} modules"
    if config.lora_bias:
        yield "lora_B.bias times the scaling is the module's bias"
    if config.bias != "none":
        yield "trained biases are held as what they add to the base's own"
