"""Configurations that cannot work are refused at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from loraplex_gateway.config import GatewayConfig


def make(**overrides: Any) -> GatewayConfig:
    return GatewayConfig(model=(Path("m"),), redis_url="redis://localhost", **overrides)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"tls_cert": Path("c")}, "--tls-cert and --tls-key"),
        ({"tls_key": Path("k")}, "--tls-cert and --tls-key"),
        ({"tls_client_ca": Path("a")}, "--tls-client-ca needs"),
        ({"port": 70_000}, "--port 70000"),
        ({"max_concurrent_requests": 0}, "--max-concurrent-requests"),
        ({"max_queued_requests": -1}, "--max-queued-requests"),
    ],
)
def test_what_cannot_work_is_refused_by_its_flag(overrides: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make(**overrides)


def test_everything_but_model_and_valkey_has_a_default() -> None:
    assert make().port == 8500
