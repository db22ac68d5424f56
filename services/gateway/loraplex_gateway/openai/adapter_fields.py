"""The tables of the bodies that load and unload adapters."""

from __future__ import annotations

from typing import Final

from loraplex_gateway.openai.field_rules import ignored, refused, served, table

LOAD_ADAPTER: Final = table(
    "POST /v1/load_lora_adapter",
    served("lora_name", "the adapter's name, without label or revision", "name"),
    served(
        "lora_path",
        "a directory below an import root of the adapter store, or a repository of the hub: `org/name`, "
        "`hf:org/name` or `hf:org/name@commit`",
        *("uri", "source", "hf.repo", "hf.revision", "hf.subfolder"),
    ),
    served("load_inplace", "if the name has an adapter: import a new revision and move `latest` to it"),
    served(
        "base_model_name", "the base model that the adapter must be for, instead of what it names itself", "base_model"
    ),
    *refused("is_3d_lora_weight", "weights of experts are not served", False),
)

UNLOAD_ADAPTER: Final = table(
    "POST /v1/unload_lora_adapter",
    served("lora_name", "the adapter's name, without label or revision", "name"),
    *ignored("lora_int_id", "adapters are known by name"),
)
