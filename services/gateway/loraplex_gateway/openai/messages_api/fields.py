"""Every field of POST /v1/messages and /v1/messages/count_tokens: what is served, ignored and refused."""

from __future__ import annotations

from typing import Final

from loraplex_gateway.openai.field_rules import Field, Rule, ignored, refused, served, table
from loraplex_gateway.openai.fields import ADAPTER, CHAT
from loraplex_gateway.openai.inherited import table_with_inherited

NO_SERVER_TOOLS: Final = "the tools of Anthropic's servers are not here; send tools with an input_schema"
ONLY_TEXT: Final = "only text is served"
CACHED: Final = "prefixes are cached by themselves"
NOTHING_KEPT: Final = "nothing is kept between calls; leave it out"

FORMAT: Final = table(
    "output_config.format",
    served("type", "`json_schema`"),
    served("schema", "constrains the output", "structured_output"),
)

OUTPUT_CONFIG: Final = table(
    "output_config",
    served("format", "see below"),
    served("effort", "as `reasoning_effort` of chat completions"),
    format=FORMAT,
)

THINKING: Final = table(
    "thinking",
    served(
        "type",
        "`enabled` and `disabled` set the template's `enable_thinking` and `thinking`; `adaptive` leaves it to the model",
    ),
    *ignored("budget_tokens", "thoughts count towards max_tokens, which limits them"),
    *refused("display", "thoughts are shown as they are, not summarized and not left out", "summarized"),
)

TOOL_CHOICE: Final = table(
    "tool_choice",
    served("type", "`auto`, `any`, `tool` or `none`"),
    served("name", "of a `tool`"),
    served("disable_parallel_tool_use", "true: at most one call"),
)

_CONVERSATION: Final = (
    CHAT.fields["model"],
    served("messages", "turns of `user`, `assistant` and `system`; see below", "messages", "prompt"),
    served("system", "text, or a list of blocks of type `text`"),
    served("tools", "tools with an `input_schema`; see below"),
    served("tool_choice", "see below"),
    served("thinking", "see below"),
    served("output_config", "see below"),
    *ignored("cache_control", CACHED),
)

MESSAGES: Final = table_with_inherited(
    "POST /v1/messages",
    *_CONVERSATION,
    served("max_tokens", "must be there; together with the prompt at most max_model_len", "stopping.max_new_tokens"),
    served("stop_sequences", "up to 16", "stopping.stop_strings"),
    *refused("stream_options", "the last events have the usage in any case", {}),
    *refused("container mcp_servers", NO_SERVER_TOOLS, []),
    *refused("context_management inference_geo diagnostics", "it belongs to Anthropic's servers; leave it out"),
    *refused("speed", "there is one speed; leave it out", "standard"),
    *refused("stop", "it is stop_sequences here", []),
    Field("max_completion_tokens", Rule.REFUSED, "it is max_tokens here", same_as="max_tokens"),
    *refused("response_format", "it is output_config.format here", {"type": "text"}),
    *refused("logprobs", "Anthropic's API has none; use /v1/chat/completions or /v1/responses", False),
    *refused("n", "there is one output; send the request again for another", 1),
    *refused("prompt_logprobs", "use /v1/chat/completions"),
    *refused("return_token_ids", "blocks have text only; use /v1/chat/completions", False),
    thinking=THINKING,
    tool_choice=TOOL_CHOICE,
    output_config=OUTPUT_CONFIG,
)

COUNT_TOKENS: Final = table(
    "POST /v1/messages/count_tokens",
    *_CONVERSATION,
    *ignored("speed", "a prompt has as many tokens at any speed"),
    *refused("context_management mcp_servers", NO_SERVER_TOOLS, [], {}),
    served("chat_template_kwargs", "as in POST /v1/messages"),
    served("adapters", "as in POST /v1/messages; weights do not change tokens", "adapters"),
    adapters=ADAPTER,
    thinking=THINKING,
    tool_choice=TOOL_CHOICE,
    output_config=OUTPUT_CONFIG,
)

MESSAGE: Final = table(
    "messages[]",
    served("role", "`user`, `assistant` or `system`; turns of one role that follow each other are one turn"),
    served("content", "text, or a list of blocks; an assistant's text at the end is continued"),
)

TEXT_BLOCK: Final = table(
    "block of type text",
    served("type", "`text`"),
    served("text", "the text; blocks are joined by newlines"),
    *ignored("cache_control", CACHED),
    *refused("citations", "write them into the text", []),
)

TOOL_USE_BLOCK: Final = table(
    "block of type tool_use",
    served("type", "`tool_use`"),
    served("id", "the same as in the result that answers it"),
    served("name", "of the tool"),
    served("input", "the arguments"),
    *ignored("cache_control", CACHED),
    *ignored("caller", "the model has called it itself"),
    *refused("toolset_name", NO_SERVER_TOOLS, ""),
)

TOOL_RESULT_BLOCK: Final = table(
    "block of type tool_result",
    served("type", "`tool_result`"),
    served("tool_use_id", "of the call that it answers"),
    served("content", "text, or a list of blocks of type `text`; empty if absent"),
    served("is_error", "true puts `Error: ` in front of the content: templates have no other place for it"),
    *ignored("cache_control", CACHED),
    *refused("toolset_name", NO_SERVER_TOOLS, ""),
)

THINKING_BLOCK: Final = table(
    "block of type thinking",
    served("type", "`thinking`"),
    served("thinking", "handed to the template as the turn's thoughts"),
    *ignored("signature", "thoughts are not signed here"),
)

TOOL: Final = table(
    "tools[]",
    served("type", "`custom`, or absent; other types are refused"),
    served("name", "of the tool"),
    served("description", "for the model"),
    served("input_schema", "JSON Schema of the arguments"),
    served("strict", "true: the arguments follow the schema; false if absent"),
    *ignored("cache_control", CACHED),
    *ignored("eager_input_streaming", "arguments are streamed as they come"),
    *refused("input_examples", "write them into the description", []),
    *refused("defer_loading", "all tools are shown", False),
    *refused("allowed_callers", "only the model calls tools", ["direct"], []),
)
