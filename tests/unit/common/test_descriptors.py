"""Connections never take the last descriptor."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest
from loraplex_common.descriptors import RESERVED, connections_per_port


@pytest.mark.parametrize(("limit", "wanted", "most"), [(1024, 8192, (1024 - RESERVED) // 2), (10**6, 8192, 8192)])
def test_ports_share_what_is_not_reserved(monkeypatch: pytest.MonkeyPatch, limit: int, wanted: int, most: int) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))

    assert connections_per_port(wanted, num_ports=2) == most


def test_the_soft_limit_is_raised_to_the_hard_one() -> None:
    code = (
        "import resource; from loraplex_common.descriptors import raise_limit; "
        "resource.setrlimit(resource.RLIMIT_NOFILE, (256, 512)); "
        "print(raise_limit(), resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert hard >= 512

    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)

    assert result.stdout.split("\n")[0] == "512 (512, 512)"
