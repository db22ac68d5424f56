"""What a checkpoint does outside of the decoder layers, and which of it is served."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraplex_common.adapter_folder import CONFIG_FILE
from loraplex_common.errors import AdapterIncompatibleError

from loraplex_adapter_store.checkpoint.base_rows import BaseRows
from loraplex_adapter_store.checkpoint.outside_config import NAMES, planned
from loraplex_adapter_store.checkpoint.outside_reader import OutsideReader
from loraplex_adapter_store.checkpoint.peft_methods import LORA

if TYPE_CHECKING:
    from collections.abc import Mapping

    from loraplex_common.base_model import BaseModelInfo

    from loraplex_adapter_store.checkpoint.base_weights import BaseWeights
    from loraplex_adapter_store.checkpoint.module_rules import ModuleRules
    from loraplex_adapter_store.checkpoint.outside_config import Plan
    from loraplex_adapter_store.checkpoint.outside_names import OutsideTensors
    from loraplex_adapter_store.checkpoint.parts import Module
    from loraplex_adapter_store.checkpoint.peft_config import PeftConfig


def read_outside_modules(
    config: PeftConfig, rules: ModuleRules, base: BaseModelInfo, weights: BaseWeights, tensors: OutsideTensors
) -> tuple[list[Module], tuple[str, ...]]:
    """Return the modules outside of the layers that a checkpoint changes, and what was done with their tensors, in words.

    Raises:
        AdapterIncompatibleError: If they cannot be served as PEFT loads them; the message has the setting or the tensor.
        AdapterCorruptUploadError: If a tensor holds NaN, infinity or values beyond bf16's range.
    """
    targets = [each.name for each in rules.targeted_outside()]
    if strange := sorted(set(targets) - set(NAMES)):
        raise AdapterIncompatibleError(f"{CONFIG_FILE}: target_modules includes {strange[0]}, which is not served")
    offered = {each.name for each in base.outside}
    if strange := sorted({*config.outside.saved, *config.outside.tokens} - offered):
        raise AdapterIncompatibleError(f"{CONFIG_FILE}: {base.name} has no {strange[0]} that adapters may replace")
    is_tied = base.tied_embeddings
    is_list = not isinstance(config.target_modules, str)
    plans = planned(config.outside, targets, is_list=is_list, is_tied=is_tied)
    rows = BaseRows(weights, [each.path for each in base.outside], is_tied=is_tied)
    reader = OutsideReader(config, rules, base, rows, plans, tensors)
    _check_method(config, plans, tensors)
    return reader.modules(), tuple(reader.notes)


def _check_method(config: PeftConfig, plans: Mapping[str, Plan], tensors: OutsideTensors) -> None:
    """Refuse what is computed of the layers' projections alone.

    Raises:
        AdapterIncompatibleError: If the checkpoint has it; the message has the setting.
    """
    adapted = [name for name, plan in plans.items() if plan.is_adapted]
    for setting, is_on in (
        (f"peft_type {config.method}", config.method != LORA),
        ("use_dora", config.use_dora),
        ("lora_bias", config.lora_bias),
    ):
        if is_on and adapted:
            raise AdapterIncompatibleError(
                f"{CONFIG_FILE}: {setting} of {adapted[0]} is not served: outside of the decoder layers only plain LoRA is; "
                f"exclude it (exclude_modules), or train it in modules_to_save"
            )
    if config.invocation_token_ids and (adapted or tensors):
        raise AdapterIncompatibleError(
            f"{CONFIG_FILE}: alora_invocation_tokens together with a trained {' and '.join(adapted or tensors)}: it would apply "
            "to the tokens before the sequence too, where only the base model may answer; train the projections alone"
        )
