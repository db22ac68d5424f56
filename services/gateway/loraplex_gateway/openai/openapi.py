"""The OpenAPI 3.1 document of the HTTP port, made from the endpoints, the structs of their bodies and the field tables.

Fields that are refused are not in it, and no object takes a field that is not: a client made from the document asks for
nothing that the gateway would refuse by name.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

import msgspec

from loraplex_gateway.openai.answers import ErrorBody
from loraplex_gateway.openai.convert import SEEDS
from loraplex_gateway.openai.endpoint import Endpoint
from loraplex_gateway.openai.fields import Rule
from loraplex_gateway.requests.validation import RANGES

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from loraplex_gateway.openai.endpoint import OpenEndpoint
    from loraplex_gateway.openai.fields import Field, Table

Json = dict[str, Any]
Refs = dict[Any, Json]
"""Struct -> reference to its component."""

DESCRIPTION: Final = (
    "OpenAI's API and vLLM's further endpoints, over adapters of one base model. Null is as if a field were absent; a "
    "field that is not listed is refused by name."
)
_REFS: Final = "#/components/schemas/"
_PARAMETER: Final = re.compile(r"{(\w+):?\w*}")
_RANGED: Final = {limit.field: (limit.low, limit.high, limit.excludes_low) for limit in RANGES}
_RANGED["sampling.seed"] = (SEEDS.start, SEEDS.stop - 1, False)  # as the body has it


def document(endpoints: Iterable[Endpoint | OpenEndpoint]) -> Json:
    """Return the document of all endpoints."""
    known = [endpoint for endpoint in endpoints if not isinstance(endpoint, Endpoint) or endpoint.is_served]
    bodies = [endpoint for endpoint in known if isinstance(endpoint, Endpoint) and endpoint.body is not None]
    answers = {endpoint.answer for endpoint in known if endpoint.answer not in (None, str)}
    structs = {*(endpoint.body for endpoint in bodies), *answers, ErrorBody}
    ordered = sorted(structs, key=lambda struct: str(struct))
    schemas, components = msgspec.json.schema_components(ordered, ref_template=f"{_REFS}{{name}}")
    refs: Refs = dict(zip(ordered, schemas, strict=True))
    for described in bodies:
        if described.table is not None:
            _annotate(refs[described.body], described.table, components)
    paths: Json = {}
    for endpoint in known:
        path = _PARAMETER.sub(r"{\1}", endpoint.path)
        for method in endpoint.methods:
            paths.setdefault(path, {})[method.lower()] = _operation(endpoint, method, path, refs)
    return {
        "openapi": "3.1.0",
        "info": {"title": "loraplex gateway", "version": "v1", "description": DESCRIPTION},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(endpoint: Endpoint | OpenEndpoint, method: str, path: str, refs: Refs) -> Json:
    name = re.sub(r"\W+", "_", path.strip("/"))
    operation: Json = {
        "operationId": f"{method.lower()}_{name}",
        "summary": endpoint.summary,
        "parameters": [*_path_parameters(path)],
        "responses": {str(status): _answer(endpoint, refs) for status in endpoint.statuses},
        "security": [],
    }
    operation["responses"]["default"] = _content("An error.", {"application/json": {"schema": refs[ErrorBody]}})
    if isinstance(endpoint, Endpoint):
        operation["security"] = [{"key": []}]
        if endpoint.query is not None:
            operation["parameters"] += _query_parameters(endpoint.query)
        if endpoint.body is not None:
            content = {"application/json": {"schema": refs[endpoint.body]}}
            operation["requestBody"] = {"required": True, "content": content}
    return operation


def _answer(endpoint: Endpoint | OpenEndpoint, refs: Refs) -> Json:
    text = {"schema": {"type": "string"}}
    if endpoint.answer is str:
        return _content(endpoint.summary, {"text/plain": text})
    schema = {"type": "object"} if endpoint.answer is None else refs[endpoint.answer]
    content: Json = {"application/json": {"schema": schema}}
    if isinstance(endpoint, Endpoint) and endpoint.is_streamed:
        content["text/event-stream"] = text
    return _content(endpoint.summary, content)


def _content(description: str, content: Json) -> Json:
    return {"description": description, "content": content}


def _path_parameters(path: str) -> Iterator[Json]:
    for name in _PARAMETER.findall(path):
        yield {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}


def _query_parameters(table: Table) -> Iterator[Json]:
    for field in table.fields.values():
        yield {"name": field.name, "in": "query", "description": field.note, "schema": {"type": "string"}}


def _annotate(ref: Json, table: Table, components: Json) -> None:
    """Write into the component of a struct what its table says of each field, and those that are accepted and ignored."""
    component = components[ref["$ref"].removeprefix(_REFS)]
    required = component.get("required", [])
    properties: Json = component["properties"]
    for name in [*properties]:  # a struct may have more than its table serves
        if name not in table.fields or table.fields[name].rule is Rule.REFUSED:
            del properties[name]
    for field in table.fields.values():
        if field.rule is Rule.IGNORED:
            properties[field.name] = {"description": f"Accepted and ignored: {field.note}."}
        elif field.rule is Rule.SERVED and field.name in properties:
            schema = properties[field.name]
            inner = table.nested.get(field.name)
            for nested in _refs_in(schema) if inner is not None else ():
                _annotate(nested, inner, components)  # type: ignore[arg-type]
            properties[field.name] = {**_field_schema(schema, field, field.name in required), "description": field.note}


def _field_schema(schema: Json, field: Field, is_required: bool) -> Json:
    """Return a field's schema with its range, and with null where the field may be absent."""
    kinds = [dict(kind) for kind in schema.get("anyOf", [{key: schema[key] for key in schema if key != "default"}])]
    limits = next((_RANGED[core] for core in field.core if core in _RANGED), None)
    for kind in kinds:
        if limits is not None and kind.get("type") in ("integer", "number"):
            low, kind["maximum"], excludes_low = limits
            kind["exclusiveMinimum" if excludes_low else "minimum"] = low
    if not is_required and {"type": "null"} not in kinds:
        kinds.append({"type": "null"})
    default = {"default": schema["default"]} if schema.get("default") is not None else {}
    return {**(kinds[0] if len(kinds) == 1 else {"anyOf": kinds}), **default}


def _refs_in(schema: Any) -> Iterator[Json]:
    """Yield the references in a schema, at any depth."""
    if isinstance(schema, dict):
        if "$ref" in schema:
            yield schema
        for value in schema.values():
            yield from _refs_in(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _refs_in(value)
