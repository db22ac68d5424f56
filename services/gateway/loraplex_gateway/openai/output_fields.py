"""The tables of the objects that say what form an output has."""

from __future__ import annotations

from typing import Final

from loraplex_gateway.openai.field_rules import ignored, refused, served, table

ONE_BACKEND: Final = "constraints are compiled in one way"

RESPONSE_FORMAT: Final = table(
    "response_format",
    served("type", "`text`, `json_object`, `json_schema`; vLLM's `structural_tag`"),
    served("json_schema", "see below"),
    served("format", "vLLM's, of a structural tag"),
    *(served(name, "vLLM's, of a structural tag in its older form") for name in ("structures", "triggers")),
    *refused("schema", "put it into json_schema, with type json_schema"),
    json_schema=table(
        "response_format.json_schema",
        served("schema", "a JSON Schema"),
        *(
            served(name, "says what the schema is for; the output depends on the schema alone")
            for name in ("name", "description")
        ),
        served("strict", "true or not, the output always fits the schema"),
    ),
)

STRUCTURED_OUTPUTS: Final = table(
    "structured_outputs",
    served("json", "a JSON Schema, or its text"),
    served("regex", "a regular expression for the whole output"),
    served("choice", "1 to 1024 strings, one of which is the output"),
    served("grammar", "a context-free grammar in Lark's or GBNF's notation"),
    served("structural_tag", "free text with constrained parts, as JSON or its text"),
    served("json_object", "`true` for any JSON object"),
    *refused("disable_any_whitespace", "blanks between JSON's parts are what JSON allows", False),
    *refused("disable_additional_properties", "say additionalProperties false in the schema", False),
    *refused("whitespace_pattern", "whitespace between JSON's parts is what JSON allows"),
    *ignored("_backend _backend_was_auto", ONE_BACKEND),
)
