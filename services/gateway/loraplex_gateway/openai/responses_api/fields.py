"""Every field of POST /v1/responses: what is served, ignored and refused."""

from __future__ import annotations

from typing import Final

from loraplex_gateway.openai.field_rules import Field, Rule, ignored, refused, served, table
from loraplex_gateway.openai.fields import CHAT
from loraplex_gateway.openai.inherited import table_with_inherited

NOTHING_KEPT: Final = "nothing is kept between calls; send all items of the conversation as input"
NO_BACKGROUND: Final = "no answer is kept; ask with stream=true, or wait"
NO_HOSTED: Final = "the tools of OpenAI's servers are not here; send tools of type function"
GIVEN_BACK: Final = "given back in the answer; nothing depends on it"
LOGPROBS: Final = "message.output_text.logprobs"
ENCRYPTED: Final = "reasoning.encrypted_content"

FORMAT: Final = table(
    "text.format",
    served("type", "`text`, `json_object` or `json_schema`"),
    served("name", "of a `json_schema`"),
    served("schema", "of a `json_schema`, which constrains the output", "structured_output"),
    served("strict", "of a `json_schema`; the output follows the schema in either case"),
    *ignored("description", "the schema constrains the output by itself"),
)

TEXT: Final = table(
    "text",
    served("format", "see below"),
    *refused("verbosity", "ask for it in the instructions", "medium"),
    format=FORMAT,
)

REASONING: Final = table(
    "reasoning",
    served("effort", "as `reasoning_effort` of chat completions"),
    *ignored("summary generate_summary", "no summaries are made: a reasoning item has the thoughts as its content"),
    *refused("context mode", "it steers models of OpenAI's; leave it out", "auto", "standard"),
)

STREAM_OPTIONS: Final = table(
    "stream_options",
    *refused("include_obfuscation", "events are not padded against eavesdroppers; use TLS", False),
    *ignored("include_usage continuous_usage_stats", "the last event has the usage in any case"),
)

RESPONSES: Final = table_with_inherited(
    "POST /v1/responses",
    CHAT.fields["model"],
    served("input", "text, or a list of items; see below", "messages", "prompt"),
    served("instructions", "a system message in front of the input"),
    served("tools", "tools of type `function`; see below"),
    served("tool_choice", "`none`, `auto`, `required`, or an object of type `function` or `allowed_tools`"),
    served("parallel_tool_calls", "true if absent"),
    served("text", "see below"),
    served(
        "max_output_tokens",
        "together with the input at most max_model_len, which is the limit if it is absent",
        "stopping.max_new_tokens",
    ),
    served("top_logprobs", f"0 to 20, with `{LOGPROBS}` in `include`", "response_options.logprobs"),
    served("include", f"`{LOGPROBS}`; `{ENCRYPTED}` is ignored, since a reasoning item has its thoughts in clear"),
    served("reasoning", "see below"),
    served("truncation", "`disabled`, or `auto`: of an input that is too long the last tokens are used"),
    *(served(name, GIVEN_BACK) for name in ("metadata", "user", "safety_identifier", "prompt_cache_key")),
    *ignored("prompt_cache_options", "prefixes are cached by themselves; see cache_salt"),
    *refused("store", f"{NOTHING_KEPT}; leave store out, which keeps nothing either", False),
    *refused("previous_response_id conversation", NOTHING_KEPT),
    *refused("background", NO_BACKGROUND, False),
    *refused("background_options", NO_BACKGROUND, {}),
    *refused("prompt", "prompts are not kept here; send its text as instructions and input"),
    *refused("max_tool_calls", "it counts calls of OpenAI's own tools, which are not here"),
    *refused("context_management", "nothing is compacted; see truncation", []),
    *refused("moderation moderation_policy access_programs image", "it belongs to OpenAI's servers; leave it out"),
    Field("max_tokens", Rule.REFUSED, "it is max_output_tokens here", same_as="max_output_tokens"),
    Field("max_completion_tokens", Rule.REFUSED, "it is max_output_tokens here", same_as="max_output_tokens"),
    *refused("messages", "the conversation is `input` here"),
    *refused("response_format", "it is text.format here", {"type": "text"}),
    *refused("reasoning_effort", "it is reasoning.effort here"),
    *refused("logprobs", f"ask for `{LOGPROBS}` in `include`", False),
    *refused("n", "there is one output; send the request again for another", 1),
    *refused("prompt_logprobs", "use /v1/chat/completions"),
    *refused("return_token_ids", "items have text only; use /v1/chat/completions", False),
    stream_options=STREAM_OPTIONS,
    text=TEXT,
    reasoning=REASONING,
)

_STATUS: Final = ignored("id status", "an item of an earlier answer has it; nothing depends on it")

MESSAGE: Final = table(
    "input[] of type message",
    served("type", "`message`; may be absent"),
    served("role", "`user`, `assistant`, `system` or `developer`"),
    served("content", "text, or a list of parts of type `input_text` or `output_text`"),
    *_STATUS,
    *ignored("phase", "it labels messages of OpenAI's models"),
)

FUNCTION_CALL: Final = table(
    "input[] of type function_call",
    served("type", "`function_call`"),
    served("call_id", "the same as in the output that answers it"),
    served("name", "of the function"),
    served("arguments", "the text of a JSON object"),
    *_STATUS,
    *ignored("caller", "the model has called it itself"),
    *refused("namespace async", "functions have no namespaces and are awaited", "", False),
)

FUNCTION_CALL_OUTPUT: Final = table(
    "input[] of type function_call_output",
    served("type", "`function_call_output`"),
    served("call_id", "of the call that it answers"),
    served("output", "text, or a list of parts of type `input_text`"),
    *_STATUS,
    *ignored("caller name", "the call that it answers says so"),
)

REASONING_ITEM: Final = table(
    "input[] of type reasoning",
    served("type", "`reasoning`"),
    served("content", "parts of type `reasoning_text`"),
    served("summary", "parts of type `summary_text`, used where there is no content"),
    *_STATUS,
    *refused("encrypted_content", "another server has encrypted it; send the thoughts as content", ""),
)

PART: Final = table(
    "input[].content[]",
    served("type", "`input_text`, `output_text`, `reasoning_text` or `summary_text`; other types are refused"),
    served("text", "the text; parts are joined by newlines"),
    *ignored("annotations logprobs", "a part of an earlier answer has it; nothing depends on it"),
    *ignored("prompt_cache_breakpoint", "prefixes are cached by themselves"),
)

TOOL: Final = table(
    "tools[]",
    served("type", "`function`; other types are refused"),
    served("name", "of the function"),
    served("description", "for the model"),
    served("parameters", "JSON Schema of the arguments"),
    served("strict", "true: the arguments follow the schema; false if absent"),
    *ignored("output_schema", "it describes what the caller returns"),
    *refused("defer_loading async", "all tools are shown and awaited", False),
    *refused("allowed_callers", "only the model calls tools", ["direct"], []),
)
