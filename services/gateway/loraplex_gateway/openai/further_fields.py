"""Tables of the endpoints that have nothing in common with the two that generate."""

from __future__ import annotations

from typing import Final

from loraplex_gateway.openai.field_rules import ignored, refused, served, table
from loraplex_gateway.openai.fields import ADAPTER, CONTENT_PART, MESSAGE, NO_MEDIA

MODEL_LIST: Final = table(
    "GET /v1/models",
    served("limit", "most entries, 1 to 1000; without it and `after` the whole list"),
    served("after", "id of the last entry of the page before: its `last_id`"),
    served("after_id", "Anthropic's name of after"),
)

_WHICH_TOKENIZER: Final = served(
    "model", "as in the other bodies; if there is one base model, it may be left out for that", "adapter"
)

TOKENIZE: Final = table(
    "POST /tokenize",
    _WHICH_TOKENIZER,
    served(
        "adapters",
        "as in the bodies that generate: whose chat template renders messages; weights do not change tokens",
        "adapters",
    ),
    served("prompt", "the text; either this or messages", "prompt", "text"),
    served("messages", "as in `POST /v1/chat/completions`", "messages", "prompt"),
    served("add_special_tokens", "whether a text begins with BOS; true if absent; messages take only false"),
    served("return_token_strs", "also returns each token as the vocabulary has it"),
    served("add_generation_prompt", "with messages; true if absent"),
    served("continue_final_message", "with messages"),
    served("chat_template_kwargs", "with messages; further variables of the model's template"),
    served("tools", "with messages; functions, as in `POST /v1/chat/completions`"),
    *refused("chat_template", "conversations are rendered by the model's own template; send a prompt you rendered"),
    *refused("media_io_kwargs mm_processor_kwargs", NO_MEDIA, {}),
    adapters=ADAPTER,
    messages=table(MESSAGE.name, *MESSAGE.fields.values(), content=CONTENT_PART),
)

DETOKENIZE: Final = table(
    "POST /detokenize",
    _WHICH_TOKENIZER,
    served("tokens", "token ids", "token_ids"),
    *refused("adapters", "several adapters have the base model's tokens; leave it out", []),
)

LOAD_ADAPTER: Final = table(
    "POST /v1/load_lora_adapter",
    served("lora_name", "the adapter's name, without label or revision", "name"),
    served(
        "lora_path",
        "a directory below an import root of the adapter store, a repository of the hub (`org/name`, `hf:org/name` or "
        "`hf:org/name@commit`), or what the store is allowed of `s3://bucket/folder` and `oci://registry/repo@sha256:...`",
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
