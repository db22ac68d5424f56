"""What the texts beside an adapter bring: chat template, generation defaults, stop tokens, response schema.

A part is brought only where it differs from what the base model's files say; a copy of those brings nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from loraplex_common.adapter_folder import GENERATION_FILE
from loraplex_common.errors import AdapterCorruptUploadError, AdapterIncompatibleError
from loraplex_common.text_parts import (
    GENERATION_RANGES,
    MAX_SCHEMA_BYTES,
    MAX_STOP_TOKENS,
    MAX_TEMPLATE_BYTES,
    TextParts,
)
from loraplex_common.tokenizer_config import SPECIAL_TOKENS

from loraplex_adapter_store.checkpoint.base_tokenizer import token_content
from loraplex_adapter_store.checkpoint.bounds import MAX_GENERATION_VALUES, parse_json
from loraplex_adapter_store.checkpoint.chat_templates import effective_template, read_template

if TYPE_CHECKING:
    from loraplex_common.added_tokens import AddedToken

    from loraplex_adapter_store.checkpoint.base_tokenizer import BaseTokenizer
    from loraplex_adapter_store.checkpoint.chat_templates import Template

CONFIG_FILE: Final = "tokenizer_config.json"
MAP_FILE: Final = "special_tokens_map.json"
TEMPLATE_FILE: Final = "chat_template.jinja"
_TEMPLATE_CONFIGS: Final = (CONFIG_FILE, "chat_template.json")
# Settings of a generation_config.json that change the output in transformers and mean nothing here.
_NOT_SERVED: Final = (
    *("max_new_tokens", "stop_strings", "bad_words_ids", "suppress_tokens", "no_repeat_ngram_size"),
    *("typical_p", "num_beams", "forced_eos_token_id", "forced_bos_token_id"),
)
# Values with which a setting does nothing, as a request has them if nothing is said (`SamplingParams`).
_NEUTRAL: Final[Mapping[str, tuple[float, ...]]] = {
    "temperature": (1.0,),
    "top_k": (0, -1),
    "top_p": (1.0,),
    "min_p": (0.0,),
    "repetition_penalty": (1.0,),
}


@dataclass(frozen=True, slots=True)
class BroughtTexts:
    """What an adapter brings besides weights.

    Attributes:
        template_file: Name of the file that its template is from; empty if it brings none.
        special_tokens: Special tokens as the template sees them, the base model's included.
        warnings: What its author should know.
    """

    parts: TextParts
    template_file: str = ""
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def brought_texts(
    files: Mapping[str, bytes],
    objects: Mapping[str, dict[str, Any]],
    base: BaseTokenizer,
    *,
    added: tuple[AddedToken, ...] = (),
) -> BroughtTexts:
    """Return what the files beside an adapter bring; they have passed the comparison of `tokenizer_files`.

    Args:
        files: Name -> content.
        objects: The JSON objects among them, parsed.
        base: The base model's files, with the tokens that the adapter adds.
        added: These tokens.

    Raises:
        AdapterCorruptUploadError: If a file cannot be read, or is longer than its bound.
        AdapterIncompatibleError: If a value is out of range, or too many tokens end an output; the file is named.
    """
    own = _own_tokens(objects, base)
    template, template_file, tokens = _template(files, objects, own, base)
    generation = _generation_config(files)
    defaults, warnings = _generation_defaults(generation, base)
    parts = TextParts(
        chat_template=template,
        special_tokens=tokens,
        generation=defaults,
        stop_token_ids=_stop_token_ids(generation, own, base),
        response_schema=_response_schema(objects.get(CONFIG_FILE, {}), base),
        added_tokens=added,
    )
    return BroughtTexts(parts, template_file, {**base.special_tokens, **tokens}, warnings)


def _own_tokens(objects: Mapping[str, dict[str, Any]], base: BaseTokenizer) -> dict[str, str]:
    """Return the special tokens that the adapter's files name otherwise than the base model's, by role."""
    config = objects.get(CONFIG_FILE, {})
    # transformers does not read the map beside a configuration that lists its added tokens.
    sources = (config,) if "added_tokens_decoder" in config else (config, objects.get(MAP_FILE, {}))
    own: dict[str, str] = {}
    for role in SPECIAL_TOKENS:
        content = next((found for source in sources if (found := token_content(source.get(role))) is not None), None)
        if content is not None and content != base.special(role):
            own[role] = content
    return own


def _read_tokens(own: Mapping[str, str], template: Template, base: BaseTokenizer, file: str) -> dict[str, str]:
    """Return those of the adapter's own tokens that a template writes."""
    tokens = {role: content for role, content in own.items() if role in template.variables}
    for role, content in tokens.items():
        if content not in base.vocabulary:
            raise AdapterIncompatibleError(
                f"{file}: its chat template writes the {role}, {content[:60]!r}, which is no token of the base model"
            )
    return tokens


def _template(
    files: Mapping[str, bytes], objects: Mapping[str, dict[str, Any]], own: Mapping[str, str], base: BaseTokenizer
) -> tuple[str, str, dict[str, str]]:
    """Return template, its file's name and the adapter's own tokens that it reads; empty if the base's does as well."""
    jinja = files.get(TEMPLATE_FILE)
    if jinja is not None:
        _check_utf8(jinja)
    found = effective_template(jinja, {name: objects[name] for name in _TEMPLATE_CONFIGS if name in objects})
    if found is not None:
        text, file = found
        template = read_template(text, file=file)
        tokens = _read_tokens(own, template, base, file)
        if not tokens and base.template is not None and template.program == base.template.program:
            return "", "", {}
    elif base.template is not None and base.template_source is not None:
        # The base's template with other tokens is another template.
        text, file = base.template_source, CONFIG_FILE if CONFIG_FILE in objects else MAP_FILE
        tokens = _read_tokens(own, base.template, base, file)
        if not tokens:
            return "", "", {}
    else:
        return "", "", {}
    _check_length(text, MAX_TEMPLATE_BYTES, f"{file}: its chat template")
    return text, file, tokens


def _check_utf8(template: bytes) -> None:
    try:
        template.decode()
    except UnicodeDecodeError as error:  # replaced characters would stand in each prompt
        raise AdapterCorruptUploadError(f"{TEMPLATE_FILE} is no UTF-8: {error}; save it as UTF-8") from error


def _check_length(text: str, limit: int, what: str) -> None:
    try:
        num_bytes = len(text.encode())
    except UnicodeEncodeError as error:
        raise AdapterCorruptUploadError(f"{what} holds lone surrogates, which are no Unicode") from error
    if num_bytes > limit:
        raise AdapterIncompatibleError(f"{what} has {num_bytes} bytes; an adapter may bring {limit}")


def _generation_config(files: Mapping[str, bytes]) -> dict[str, Any]:
    data = files.get(GENERATION_FILE)
    if data is None:
        return {}
    fields = parse_json(data, what=GENERATION_FILE, max_values=MAX_GENERATION_VALUES)
    if not isinstance(fields, dict):
        raise AdapterCorruptUploadError(f"{GENERATION_FILE} is no JSON object")
    return fields


def _generation_defaults(fields: Mapping[str, Any], base: BaseTokenizer) -> tuple[dict[str, float], tuple[str, ...]]:
    """Return the sampling defaults, none if the base model has the same, and a warning of what is left out."""
    defaults: dict[str, float] = {}
    for name, (low, high) in GENERATION_RANGES.items():
        value = fields.get(name)
        if value is None:
            continue
        is_number = isinstance(value, int | float) and not isinstance(value, bool)  # NaN is in no range
        if not is_number or not low <= value <= high or (name == "top_k" and value % 1):
            raise AdapterIncompatibleError(
                f"{GENERATION_FILE}: {name} is {str(value)[:60]}; requests take {low:g} to {high:g}"
            )
        defaults[name] = int(value) if name == "top_k" else float(value)
    if defaults.get("repetition_penalty") == 0:
        raise AdapterIncompatibleError(f"{GENERATION_FILE}: repetition_penalty is 0; requests take more than 0")
    theirs = base.generation
    ignored = [name for name in _NOT_SERVED if fields.get(name) not in (None, theirs.get(name))]
    warnings = (f"{GENERATION_FILE}: not taken over: {', '.join(ignored)}",) if ignored else ()
    is_same = all(
        value == said if (said := theirs.get(name)) is not None else value in _NEUTRAL[name]
        for name, value in defaults.items()
    )
    return ({} if is_same else defaults), warnings


def _stop_token_ids(fields: Mapping[str, Any], own: Mapping[str, str], base: BaseTokenizer) -> tuple[int, ...]:
    eos = fields.get("eos_token_id")
    ids = [] if eos is None else eos if isinstance(eos, list) else [eos]
    if not all(type(token_id) is int for token_id in ids):
        raise AdapterIncompatibleError(f"{GENERATION_FILE}: eos_token_id is no integer and no list of integers")
    known = set(base.vocabulary.values())
    if strange := [token_id for token_id in ids if token_id not in known]:
        raise AdapterIncompatibleError(
            f"{GENERATION_FILE}: eos_token_id {strange[0]} is no token of the base model's tokenizer"
        )
    if "eos_token" in own:
        ids = [*ids, base.vocabulary[own["eos_token"]]]  # it has been compared: it is a token of the base
    added = tuple(sorted({*ids} - base.eos_token_ids))
    if len(added) > MAX_STOP_TOKENS:
        raise AdapterIncompatibleError(
            f"{GENERATION_FILE}: {len(added)} tokens end an output besides the base model's; at most {MAX_STOP_TOKENS} may"
        )
    return added


def _described(config: Mapping[str, Any]) -> Any:
    """Return how a tokenizer says that answers are taken apart: as transformers has it now, or had it before."""
    return config.get("response_template") or config.get("response_schema")


def _response_schema(config: Mapping[str, Any], base: BaseTokenizer) -> str:
    schema = _described(config)
    if not schema or schema == _described(base.config):
        return ""
    if not isinstance(schema, dict):
        raise AdapterIncompatibleError(f"{CONFIG_FILE}: response_schema is no JSON object")
    text = json.dumps(schema, sort_keys=True, separators=(",", ":"))
    _check_length(text, MAX_SCHEMA_BYTES, f"{CONFIG_FILE}: its response_schema")
    return text
