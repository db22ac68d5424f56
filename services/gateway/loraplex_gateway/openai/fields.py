"""Every field of the OpenAI-compatible bodies: the one table of what is served, ignored and refused.

A field that is in no table is refused by name, so that nothing a client asks for is dropped in silence. A change
that gives a refused field its meaning moves it here from `refused` to `served` and adds it to `schema.py`; a test compares
the two, and another the tables of docs/openai.md.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any, Final


class Rule(enum.Enum):
    """What becomes of a field that has a value."""

    SERVED = "served"
    IGNORED = "accepted and ignored"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a JSON object. Null is as if it were absent, whatever the rule.

    Attributes:
        name: Its key.
        note: What it does, why ignoring it does no harm, or why it is refused and what to do instead.
        harmless: Values of a refused field that ask for nothing, and so pass.
        same_as: Name of another field whose value is harmless too.
        default: What the other field is if absent; None if it then has no value.
        core: Names under which the gateway's other parts report errors of this field.
    """

    name: str
    rule: Rule
    note: str
    harmless: tuple[Any, ...] = ()
    same_as: str = ""
    default: int | None = None
    core: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Table:
    """The fields of one kind of JSON object.

    Attributes:
        name: What the object is, for people.
        fields: By key.
        nested: Tables of the objects inside, by the key of the field that holds one or a list of them.
    """

    name: str
    fields: dict[str, Field]
    nested: dict[str, Table]


def _served(name: str, note: str, *core: str) -> Field:
    return Field(name, Rule.SERVED, note, core=core)


def _ignored(names: str, note: str) -> tuple[Field, ...]:
    return tuple(Field(name, Rule.IGNORED, note) for name in names.split())


def _refused(names: str, note: str, *harmless: Any) -> tuple[Field, ...]:
    return tuple(Field(name, Rule.REFUSED, note, harmless) for name in names.split())


def _table(name: str, *fields: Field, **nested: Table) -> Table:
    return Table(name, {field.name: field for field in fields}, nested)


NO_CONSTRAINTS: Final = "output is not constrained; ask for the format in the prompt"
NO_TOOLS: Final = "tool calling is not served; describe the functions in a message"
NO_MEDIA: Final = "only text is served"
WHICH_MODEL: Final = "name an adapter, or the base model for none; GET /v1/models lists them"
ADAPTER_IS_MODEL: Final = "put the adapter's name into model"
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

MESSAGE: Final = _table(
    "messages[]",
    _served("role", "`developer` means `system`"),
    _served("content", "text, or a list of parts of type `text`"),
    _served("name", "for templates that use it"),
    *_refused("tool_calls", NO_TOOLS, []),
    *_refused("function_call tool_call_id", NO_TOOLS),
    *_refused("refusal", "write it into content", ""),
    *_refused("reasoning reasoning_content", "write it into content as the model's template has it", ""),
    *_refused("annotations", "write them into content", []),
    *_refused("type", NO_MEDIA, "text"),
    *_ignored("cache_control", "prefixes are cached by themselves"),
    *_ignored("provider_specific_fields", "LiteLLM's notes on an answer; nothing depends on them"),
    *_refused("audio", NO_MEDIA),
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
    _served("ignore_eos", "vLLM's"),
    _served("min_tokens", "vLLM's", "stopping.min_new_tokens"),
    _served("stop_token_ids", "vLLM's; up to 64", "stopping.stop_token_ids"),
    _served("include_stop_str_in_output", "vLLM's"),
    _served("skip_special_tokens", "vLLM's"),
    _served("allowed_token_ids", "vLLM's; up to 1024", "sampling.allowed_token_ids"),
    _served("return_token_ids", "vLLM's; ids of the output, not of the prompt"),
    _served("cache_salt", "vLLM's; up to 256 characters; never shares with another tenant", "cache_salt"),
    _served("request_id", "vLLM's; a second request of this id is refused (409) while the first runs", "request_id"),
    _served(
        "priority",
        "vLLM's numbers (lower is sooner), or `batch`, `normal`, `high`; at most the key's class",
        "priority",
    ),
    _served("adapter_scale", "multiplies the adapter's own scaling, 0 to 100", "adapter_scale"),
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
    *_refused("prompt_logprobs", "ask for them over gRPC"),
    *_refused("logprob_token_ids", "only the likeliest tokens' probabilities are returned; use logprobs"),
    *_refused("return_tokens_as_token_ids", "use return_token_ids", False),
    *_refused("return_prompt_text", "the prompt is not repeated", False),
    *_refused("detokenize", "answers are text; see return_token_ids", True),
    *_refused("use_beam_search early_stopping", "tokens are drawn one by one", False),
    *_refused("length_penalty", "it is for beam search, which is not served", 1.0),
    *_refused("logits_processors custom_logit_processor", "no code of a request is run; use logit_bias", []),
    *_refused("bad_words", "use logit_bias", []),
    *_refused("truncate_prompt_tokens truncation_side", "the prompt is used whole or refused; shorten it"),
    *_refused("guided_json guided_regex guided_choice guided_grammar structured_outputs", NO_CONSTRAINTS),
    *_refused("guided_decoding_backend guided_whitespace_pattern regex ebnf json_schema grammar", NO_CONSTRAINTS),
    *_refused("response_format", NO_CONSTRAINTS, {"type": "text"}),
    *_refused("repetition_detection watermarking", "it is not served; leave it out", False),
    *_refused("kv_transfer_params ec_transfer_params vllm_xargs", NOT_OURS, {}),
    *_refused("routed_experts_prompt_start", NOT_OURS, 0),
    *_refused("adapter adapter_id lora lora_name lora_path lora_request adapters merged_adapters", ADAPTER_IS_MODEL),
    *_refused("adapter_source", "adapters are imported first (`loraplex adapters import`); name them in model"),
    *_refused("extra_body", "its fields belong into the body itself, beside model"),
)

COMPLETION: Final = _table(
    "POST /v1/completions",
    _served("prompt", "a string, token ids, or a list of either", "prompt", "text", "token_ids"),
    *_COMMON,
    _served("max_tokens", "16 if absent; together with the prompt at most max_model_len", "stopping.max_new_tokens"),
    _served("logprobs", "0 to 20", "response_options.logprobs"),
    _served("add_special_tokens", "vLLM's; whether text prompts begin with BOS"),
    Field("best_of", Rule.REFUSED, "only n choices are drawn; leave it out", same_as="n", default=1),
    Field("max_completion_tokens", Rule.REFUSED, "it is chat's name; send max_tokens", same_as="max_tokens"),
    *_refused("echo", "the prompt's text is not repeated; put it in front of the completion yourself", False),
    *_refused("suffix", "the models served here do not fill in the middle; put all into prompt", ""),
    *_refused("prompt_embeds", "send text or token ids as prompt"),
    stream_options=STREAM_OPTIONS,
)

CHAT: Final = _table(
    "POST /v1/chat/completions",
    _served("messages", "see below", "messages", "prompt"),
    *_COMMON,
    _served("max_completion_tokens", "together with the prompt at most max_model_len", "stopping.max_new_tokens"),
    _served("max_tokens", "OpenAI's older name of max_completion_tokens", "stopping.max_new_tokens"),
    _served("logprobs", "true or false"),
    _served("top_logprobs", "0 to 20, with logprobs", "response_options.logprobs"),
    _served("add_generation_prompt", "vLLM's"),
    _served("continue_final_message", "vLLM's"),
    _served("chat_template_kwargs", "vLLM's; further variables of the model's template, e.g. `enable_thinking`"),
    *_refused("tools functions", NO_TOOLS, []),
    *_refused("tool_choice function_call", NO_TOOLS, "none", "auto"),
    *_ignored("parallel_tool_calls", "it matters with tools only, which are refused"),
    *_refused("chat_template", "conversations are rendered by the model's own template; send a prompt you rendered"),
    *_refused("add_special_tokens", "the template writes the special tokens", False),
    *_refused("documents", "put them into a message", []),
    *_refused("echo", "the prompt is not repeated", False),
    *_refused("modalities", NO_MEDIA, ["text"], []),
    *_refused("audio web_search_options", NO_MEDIA),
    *_refused("media_io_kwargs mm_processor_kwargs", NO_MEDIA, {}),
    *_refused("verbosity", "ask for it in a message", "medium"),
    *_refused("reasoning_effort", "the model's thinking is not steered; leave it out", "none"),
    *_refused("thinking_token_budget", "the model's thinking is not limited; see max_completion_tokens", -1),
    *_refused("include_reasoning", "the model's thinking is part of the text", True),
    stream_options=STREAM_OPTIONS,
    messages=_table(MESSAGE.name, *MESSAGE.fields.values(), content=CONTENT_PART),
)

MODEL_PATH: Final = _table("GET /v1/models/{model}", _served("model", "as in the bodies", "adapter"))

MODEL_LIST: Final = _table(
    "GET /v1/models",
    _served("limit", "most entries, 1 to 1000; without it and `after` the whole list"),
    _served("after", "id of the last entry of the page before: its `last_id`"),
    _served("after_id", "Anthropic's name of after"),
)

_WHICH_TOKENIZER: Final = _served(
    "model", "as in the other bodies; if there is one base model, it may be left out for that", "adapter"
)

TOKENIZE: Final = _table(
    "POST /tokenize",
    _WHICH_TOKENIZER,
    _served("prompt", "the text; either this or messages", "prompt", "text"),
    _served("messages", "as in `POST /v1/chat/completions`", "messages", "prompt"),
    _served("add_special_tokens", "whether a text begins with BOS; true if absent; messages take only false"),
    _served("return_token_strs", "also returns each token as the vocabulary has it"),
    _served("add_generation_prompt", "with messages; true if absent"),
    _served("continue_final_message", "with messages"),
    _served("chat_template_kwargs", "with messages; further variables of the model's template"),
    _served("tools", "with messages; functions, as in `POST /v1/chat/completions`"),
    *_refused("chat_template", "conversations are rendered by the model's own template; send a prompt you rendered"),
    *_refused("media_io_kwargs mm_processor_kwargs", NO_MEDIA, {}),
    messages=_table(MESSAGE.name, *MESSAGE.fields.values(), content=CONTENT_PART),
)

DETOKENIZE: Final = _table(
    "POST /detokenize",
    _WHICH_TOKENIZER,
    _served("tokens", "token ids", "token_ids"),
)

LOAD_ADAPTER: Final = _table(
    "POST /v1/load_lora_adapter",
    _served("lora_name", "the adapter's name, without label or revision", "name"),
    _served(
        "lora_path",
        "a directory below an import root of the adapter store, or a repository of the hub: `org/name`, "
        "`hf:org/name` or `hf:org/name@commit`",
        *("uri", "source", "hf.repo", "hf.revision", "hf.subfolder"),
    ),
    _served("load_inplace", "if the name has an adapter: import a new revision and move `latest` to it"),
    _served(
        "base_model_name", "the base model that the adapter must be for, instead of what it names itself", "base_model"
    ),
    *_refused("is_3d_lora_weight", "weights of experts are not served", False),
)

UNLOAD_ADAPTER: Final = _table(
    "POST /v1/unload_lora_adapter",
    _served("lora_name", "the adapter's name, without label or revision", "name"),
    *_ignored("lora_int_id", "adapters are known by name"),
)
