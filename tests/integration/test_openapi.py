"""/openapi.json: every route with its body, what the field tables serve and no more; and no request of it is a 5xx."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import httpx
import pytest
from loraplex_gateway.openai.app import endpoints
from loraplex_gateway.openai.endpoint import Endpoint
from loraplex_gateway.openai.fields import Rule
from loraplex_gateway.openai.openapi import document
from support.admin_rig import running
from support.gateway_rig import running_gateway
from support.openapi_campaign import fuzz_changes, fuzz_requests
from support.valkey import fresh_database

if TYPE_CHECKING:
    from pathlib import Path

    from loraplex_common.valkey import EmbeddedValkey
    from loraplex_gateway.openai.context import HttpContext

pytestmark = pytest.mark.integration
ALL = endpoints(cast("HttpContext", SimpleNamespace()))
KNOWN = [endpoint for endpoint in ALL if not isinstance(endpoint, Endpoint) or endpoint.is_served]
BODIES = {
    endpoint.body: endpoint.table
    for endpoint in KNOWN
    if isinstance(endpoint, Endpoint) and endpoint.body is not None and endpoint.table is not None
}
DOCUMENT: dict[str, Any] = document(ALL)
SCHEMAS = DOCUMENT["components"]["schemas"]


def refs(value: Any) -> list[str]:
    """Return every reference in a document."""
    if isinstance(value, dict):
        return [
            *([value["$ref"]] if "$ref" in value else []),
            *(ref for inner in value.values() for ref in refs(inner)),
        ]
    return [ref for inner in value for ref in refs(inner)] if isinstance(value, list) else []


def test_every_route_is_in_the_document_and_every_reference_has_its_component() -> None:
    routes = {(endpoint.path.replace(":path", ""), method.lower()) for endpoint in KNOWN for method in endpoint.methods}

    assert {(path, method) for path, methods in DOCUMENT["paths"].items() for method in methods} == routes
    assert {ref.removeprefix("#/components/schemas/") for ref in refs(DOCUMENT)} <= set(SCHEMAS)
    operations = [operation for methods in DOCUMENT["paths"].values() for operation in methods.values()]
    assert len({operation["operationId"] for operation in operations}) == len(operations)


@pytest.mark.parametrize("body", BODIES, ids=lambda body: str(body.__name__))
def test_a_body_has_what_its_table_takes_and_nothing_that_it_refuses(body: Any) -> None:
    table, schema = BODIES[body], SCHEMAS[body.__name__]
    taken = {field.name for field in table.fields.values() if field.rule is not Rule.REFUSED}

    assert set(schema["properties"]) == taken
    assert schema["additionalProperties"] is False
    assert all(member["description"] for member in schema["properties"].values())


def test_what_needs_a_credential_says_so() -> None:
    for endpoint in KNOWN:
        path = endpoint.path.replace(":path", "")
        for method in endpoint.methods:
            needs_key = DOCUMENT["paths"][path][method.lower()]["security"] == [{"key": []}]
            assert needs_key == isinstance(endpoint, Endpoint), path


def test_a_seed_may_be_negative_and_a_temperature_may_not() -> None:
    properties = SCHEMAS["CompletionBody"]["properties"]

    assert properties["seed"]["anyOf"][0]["minimum"] == -(2**63)
    assert properties["temperature"]["anyOf"][0] == {"type": "number", "minimum": 0, "maximum": 100}
    assert {"type": "null"} in properties["temperature"]["anyOf"]
    assert properties["model"]["type"] == "string"


async def test_no_random_request_is_answered_with_a_5xx(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        async with httpx.AsyncClient() as http:
            assert (await http.get(f"{rig.http}/openapi.json")).json() == json.loads(json.dumps(DOCUMENT))

        outcome = await fuzz_requests(rig.http, num_requests=8, draw=1)

        assert outcome.failures == []
        assert set(outcome.statuses) >= {200, 400}
        rig.check_idle()


async def test_no_random_change_of_adapters_is_answered_with_a_5xx(
    store_valkey: EmbeddedValkey, tmp_path: Path
) -> None:
    async with running(fresh_database(store_valkey), tmp_path) as rig:
        outcome = await fuzz_changes(str(rig.http.base_url), num_requests=8, draw=1)

        assert outcome.failures == []
        assert set(outcome.statuses) >= {200, 400, 404}
