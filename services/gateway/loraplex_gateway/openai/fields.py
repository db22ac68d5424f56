"""Every field of the OpenAI-compatible bodies: the one table of what is served, ignored and refused.

A field that is in no table is refused by name, so that nothing a client asks for is dropped in silence. A change
that gives a refused field its meaning moves it here from `refused` to `served` and adds it to `schema.py`; a test compares
the two, and another the tables of docs/openai.md.
"""

from __future__ import annotations

from typing import Final

from loraplex_gateway.openai.field_rules import Field as Field
from loraplex_gateway.openai.field_rules import Rule as Rule
from loraplex_gateway.openai.field_rules import Table as Table
from loraplex_gateway.openai.field_rules import ignored as _ignored
from loraplex_gateway.openai.field_rules import refused as _refused
from loraplex_gateway.openai.field_rules import served as _served
from loraplex_gateway.openai.field_rules import table as _table
from loraplex_gateway.openai.output_fields import ONE_BACKEND, RESPONSE_FORMAT, STRUCTURED_OUTPUTS

OLD_TOOLS: Final = "OpenAI's older way; send tools and tool_choice, tool_calls and turns of the role tool"
ONLY_FUNCTIONS: Final = "only functions are served: type `function` with a function"
NO_MEDIA: Final = "only text is served"
WHICH_MODEL: Final = "name an adapter, or the base model for none; GET /v1/models lists them"
ADAPTER_IS_MODEL: Final = "put the adapter's name into model, or several into adapters"
NOT_OURS: Final = "it belongs to another server's internals; leave it out"

STREAM_OPTIONS: Final = _table(
    "stream_options",
    _served("include_usage", "a last chunk with the token counts"),
    _served("continuous_usage_stats", "vLLM's, with include_usage: the choice's token counts so far in every chunk"),
    *_refused("include_obfuscation", "chunks are not padded against eavesdroppers; use TLS", False),
)

CONTENT_PART: Final = _table(
    "messages[].content[]",
    _served("type", "`text`; other types are refused"),
    _served("text", "the text; parts are joined by newlines"),
    *_ignored("cache_control", "prefixes are cached by themselves"),
    *_refused("annotations", "write them into the text", []),
    *_refused("image_url image input_audio audio_url video_url file refusal thinking", NO_MEDIA),
)

CALLED_FUNCTION: Final = _table(
    "messages[].tool_calls[].function",
    _served("name", "the function's name"),
    _served("arguments", "the text of a JSON object, or the object; empty for none"),
    *_ignored("parsed_arguments", "what OpenAI's clients read from arguments, and send back"),
)

TURN_TOOL_CALL: Final = _table(
    "messages[].tool_calls[]",
    _served("id", "the call's id, for templates that use it"),
    _served("type", "`function`"),
    _served("function", "see below"),
    *_ignored("index", "it is the place in the list"),
    function=CALLED_FUNCTION,
)

OFFERED_FUNCTION: Final = _table(
    "tools[].function",
    _served("name", "1 to 64 letters, digits, `_` and `-`"),
    _served("description", "for the model"),
    _served("parameters", "a JSON schema of an object; absent: no parameters"),
    _served("strict", "whether a call's arguments are held to the schema also where the model need not call"),
    *_ignored("cache_control", "prefixes are cached by themselves"),
)

TOOL: Final = _table(
    "tools[]",
    _served("type", "`function`; other types are refused"),
    _served("function", "see below"),
    *_ignored("cache_control", "prefixes are cached by themselves"),
    function=OFFERED_FUNCTION,
)

MESSAGE: Final = _table(
    "messages[]",
    _served("role", "`developer` means `system`"),
    _served("content", "text, or a list of parts of type `text`; null beside tool_calls"),
    _served("name", "for templates that use it"),
    _served("tool_calls", "calls that an assistant's turn made, see below"),
    _served("tool_call_id", "the call that a turn of the role `tool` answers"),
    _served("reasoning_content", "vLLM's; what an assistant's turn thought, for templates that show it"),
    _served("reasoning", "vLLM's other name of reasoning_content"),
    *_refused("function_call", OLD_TOOLS),
    *_refused("refusal", "write it into content", ""),
    *_refused("annotations", "write them into content", []),
    *_refused("type", NO_MEDIA, "text"),
    *_ignored("cache_control", "prefixes are cached by themselves"),
    *_ignored("parsed", "what OpenAI's clients read from content, and send back"),
    *_ignored("provider_specific_fields", "LiteLLM's notes on an answer; nothing depends on them"),
    *_refused("audio", NO_MEDIA),
)

ADAPTER: Final = _table(
    "adapters[]",
    _served("name", "as `model` names an adapter, without the base model's name in front"),
    _served("weight", "multiplies the adapter's own scaling, 0 to 100; 1 if absent", "adapter_scale"),
)

ADAPTERS: Final = _served(
    "adapters",
    "up to 8 adapters whose effects are added up, each times its weight; `model` is the base model's name then; see below",
    "adapters",
)

_COMMON: Final = (
    _served(
        "model",
        "the adapter's name, `name:label` or `name@revision`, also as `base|name`; the base model's name for none",
        "adapter",
    ),
    _served("n", "choices, each with a seed of its own"),
    _served("stream", "server-sent events"),
    _served("stream_options", "see below"),
    _served("stop", "a string or up to 16", "stopping.stop_strings"),
    _served("seed", "-2^63 to 2^64 - 1", "sampling.seed"),
    _served("temperature", "0 (greedy) to 100", "sampling.temperature"),
    _served("top_p", "0 to 1; 0 leaves only the likeliest token, as OpenAI has it (vLLM refuses it)", "sampling.top_p"),
    _served("presence_penalty", "-2 to 2", "sampling.presence_penalty"),
    _served("frequency_penalty", "-2 to 2", "sampling.frequency_penalty"),
    _served("logit_bias", "token id to -100 .. 100", "sampling.logit_bias"),
    _served("top_k", "vLLM's; 0 and -1 keep all", "sampling.top_k"),
    _served("min_p", "vLLM's; 0 to 1", "sampling.min_p"),
    _served("repetition_penalty", "vLLM's; above 0, up to 10", "sampling.repetition_penalty"),
    _served("ignore_eos", "vLLM's", "stopping.ignore_eos"),
    _served("min_tokens", "vLLM's", "stopping.min_new_tokens"),
    _served("stop_token_ids", "vLLM's; up to 64", "stopping.stop_token_ids"),
    _served("include_stop_str_in_output", "vLLM's"),
    _served("skip_special_tokens", "vLLM's"),
    _served("allowed_token_ids", "vLLM's; up to 1024", "sampling.allowed_token_ids"),
    _served("return_token_ids", "vLLM's; ids of the output and of the prompt"),
    _served("cache_salt", "vLLM's; up to 256 characters; never shares with another tenant", "cache_salt"),
    _served("request_id", "vLLM's; a second request of this id is refused (409) while the first runs", "request_id"),
    _served(
        "priority",
        "vLLM's numbers (lower is sooner), or `batch`, `normal`, `high`; at most the key's class",
        "priority",
    ),
    _served(
        "adapter_scale",
        "multiplies the adapter's own scaling, 0 to 100; refused on an adapter that multiplies what the base computes (DoRA, (IA)3, FLoRA)",
        "adapter_scale",
    ),
    ADAPTERS,
    _served("queue_timeout", "longest wait for a place in a batch, in seconds", "queue_timeout"),
    _served("time_limit", "longest time from admission, in seconds; the text so far is the answer", "time_limit"),
    _served("affinity_key", "a tenant's equal keys prefer the same engine", "affinity_key"),
    _served("load_policy", "`wait` or `fail_fast` when the adapter is not on the device", "load_policy"),
    *_ignored("user safety_identifier metadata session_id", "says who or what asks; nothing depends on it"),
    *_ignored("prompt_cache_key prompt_cache_retention", "prefixes are cached by themselves; see cache_salt"),
    *_ignored("service_tier", "there is one tier; see priority"),
    *_ignored("prediction", "it could only make the same answer faster"),
    *_ignored("stream_interval", "chunks are sent as soon as there is text"),
    *_ignored("spaces_between_special_tokens", "special tokens are written as the tokenizer has them"),
    *_ignored("return_token_offsets return_mm_kwargs", "only vLLM's render endpoints know it"),
    *_refused("store", "nothing is stored; leave it out", False),
    _served(
        "prompt_logprobs",
        "vLLM's; 0 to 20; not with stream; `rank` is null for a token beyond the likeliest",
        "response_options.prompt_logprobs",
    ),
    *_refused("logprob_token_ids", "only the likeliest tokens' probabilities are returned; use logprobs"),
    *_refused("return_tokens_as_token_ids", "use return_token_ids", False),
    *_refused("return_prompt_text", "the prompt is not repeated", False),
    *_refused("detokenize", "answers are text; see return_token_ids", True),
    *_refused("use_beam_search early_stopping", "tokens are drawn one by one", False),
    *_refused("length_penalty", "it is for beam search, which is not served", 1.0),
    *_refused("logits_processors custom_logit_processor", "no code of a request is run; use logit_bias", []),
    _served(
        "bad_words",
        "vLLM's; up to 64 strings that are never generated, at their beginning or after a space",
        "sampling.bad_words",
        "bad_token_sequences",
    ),
    _served(
        "truncate_prompt_tokens",
        "vLLM's; keep this many of the prompt's tokens; -1 as many as leave room for max_tokens",
        "truncate_prompt_tokens",
    ),
    _served("truncation_side", "vLLM's; `left` keeps the last tokens, `right` the first"),
    _served("structured_outputs", "vLLM's; see below"),
    *(
        _served(f"guided_{name}", f"older vLLM's name of structured_outputs.{name}")
        for name in ("json", "regex", "choice", "grammar")
    ),
    *_ignored("guided_decoding_backend", ONE_BACKEND),
    *_refused("guided_whitespace_pattern", "whitespace between JSON's parts is what JSON allows"),
    *_refused("json_schema", "use structured_outputs.json"),
    *_refused("regex", "use structured_outputs.regex"),
    *_refused("ebnf grammar", "use structured_outputs.grammar"),
    _served("response_format", "see below"),
    *_refused("repetition_detection watermarking", "it is not served; leave it out", False),
    *_refused("kv_transfer_params ec_transfer_params vllm_xargs", NOT_OURS, {}),
    *_refused("routed_experts_prompt_start", NOT_OURS, 0),
    *_refused("adapter adapter_id lora lora_name lora_path lora_request merged_adapters", ADAPTER_IS_MODEL),
    *_refused("adapter_source", "adapters are imported first (`loraplex adapters import`); name them in model"),
    *_refused("extra_body", "its fields belong into the body itself, beside model"),
)

COMPLETION: Final = _table(
    "POST /v1/completions",
    _served("prompt", "a string, token ids, or a list of either", "prompt", "text", "token_ids", "prompt_token_ids"),
    *_COMMON,
    _served(
        "max_tokens",
        "16 if absent; 0 only reads the prompt; together with the prompt at most max_model_len",
        "stopping.max_new_tokens",
    ),
    _served(
        "logprobs",
        "0 to 20; with echo of the prompt's tokens too",
        "response_options.logprobs",
        "response_options.prompt_logprobs",
    ),
    _served("echo", "the prompt in front of the output"),
    _served("add_special_tokens", "vLLM's; whether text prompts begin with BOS"),
    Field("best_of", Rule.REFUSED, "only n choices are drawn; leave it out", same_as="n", default=1),
    Field("max_completion_tokens", Rule.REFUSED, "it is chat's name; send max_tokens", same_as="max_tokens"),
    *_refused("suffix", "the models served here do not fill in the middle; put all into prompt", ""),
    *_refused("prompt_embeds", "send text or token ids as prompt"),
    adapters=ADAPTER,
    stream_options=STREAM_OPTIONS,
    response_format=RESPONSE_FORMAT,
    structured_outputs=STRUCTURED_OUTPUTS,
)

CHAT: Final = _table(
    "POST /v1/chat/completions",
    _served("messages", "see below", "messages", "prompt", "prompt_token_ids"),
    *_COMMON,
    _served("max_completion_tokens", "together with the prompt at most max_model_len", "stopping.max_new_tokens"),
    _served("max_tokens", "OpenAI's older name of max_completion_tokens", "stopping.max_new_tokens"),
    _served("logprobs", "true or false"),
    _served("top_logprobs", "0 to 20, with logprobs", "response_options.logprobs"),
    _served("add_generation_prompt", "vLLM's"),
    _served("continue_final_message", "vLLM's"),
    _served("chat_template_kwargs", "vLLM's; further variables of the model's template, e.g. `enable_thinking`"),
    _served("tools", "up to 128 functions, 256 KiB; see below", "tools"),
    _served(
        "tool_choice", "`auto`, `none`, `required`, a function by name, or OpenAI's `allowed_tools`", "tool_choice"
    ),
    _served("parallel_tool_calls", "false: at most one call; true: up to 16 where they are constrained"),
    *_refused("functions", OLD_TOOLS, []),
    *_refused("function_call", OLD_TOOLS, "none", "auto"),
    _served(
        "chat_template", "vLLM's; only where the operator allows it (`--allow-request-chat-template`)", "chat_template"
    ),
    _served("documents", "vLLM's; up to 128 objects for templates that read them, refused for others", "documents"),
    _served(
        "reasoning_effort",
        "for templates that read it, refused for others; `none` also turns off thinking by `enable_thinking`",
        "reasoning_effort",
    ),
    _served("include_reasoning", "vLLM's; false leaves the thoughts out of the answer"),
    *_refused("add_special_tokens", "the template writes the special tokens", False),
    *_refused("echo", "the prompt is not repeated", False),
    *_refused("modalities", NO_MEDIA, ["text"], []),
    *_refused("audio web_search_options", NO_MEDIA),
    *_refused("media_io_kwargs mm_processor_kwargs", NO_MEDIA, {}),
    *_refused("verbosity", "ask for it in a message", "medium"),
    *_refused("thinking_token_budget", "the model's thinking is not limited; see max_completion_tokens", -1),
    adapters=ADAPTER,
    stream_options=STREAM_OPTIONS,
    response_format=RESPONSE_FORMAT,
    structured_outputs=STRUCTURED_OUTPUTS,
    messages=_table(MESSAGE.name, *MESSAGE.fields.values(), content=CONTENT_PART, tool_calls=TURN_TOOL_CALL),
    tools=TOOL,
)

MODEL_PATH: Final = _table("GET /v1/models/{model}", _served("model", "as in the bodies", "adapter"))
