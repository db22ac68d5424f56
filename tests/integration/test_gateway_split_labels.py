"""Requests to a split label: a key's always get one revision, explicit names are never split."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import pytest
from loraplex.v1 import gateway_pb2
from loraplex_common.alias_feed import AdapterEntry
from support.gateway_rig import DIGEST, OTHER_DIGEST, Rig, running_gateway, text_request

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.integration


@pytest.fixture
async def rig(valkey_url: str) -> AsyncIterator[Rig]:
    async with running_gateway(valkey_url) as rig:
        shares = {"prod": ((DIGEST, 1), (OTHER_DIGEST, 1))}
        fingerprint = rig.app.catalog.models[0].fingerprint
        split = AdapterEntry(
            name="split",
            labels={"latest": DIGEST, "prod": DIGEST},
            splits=shares,
            base_fingerprints={DIGEST: fingerprint, OTHER_DIGEST: fingerprint},
        )
        rig.app.names.update([split])
        yield rig


async def revision(rig: Rig, **fields: str) -> str:
    stopping = gateway_pb2.StoppingParams(max_new_tokens=1)
    request = text_request(stopping=stopping, **fields)
    answer = await rig.stub.GenerateOnce(gateway_pb2.GenerateOnceRequest(request=request))
    return answer.started.adapter_revision


async def test_requests_of_one_key_get_one_revision_and_those_without_are_split(rig: Rig) -> None:
    keyed = [{await revision(rig, adapter="split:prod", affinity_key=f"user-{n}") for _ in range(3)} for n in range(12)]
    free = Counter([await revision(rig, adapter="split:prod") for _ in range(24)])

    assert [len(found) for found in keyed] == [1] * 12
    assert set().union(*keyed) == set(free) == {DIGEST, OTHER_DIGEST}
    assert {await revision(rig, adapter="split") for _ in range(6)} == {DIGEST}
    assert {await revision(rig, adapter=f"split@{OTHER_DIGEST}") for _ in range(6)} == {OTHER_DIGEST}
