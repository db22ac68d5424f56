"""A quotas file says exactly what it means, names what it does not understand, and is followed."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from loraplex_common.quotas_file import CHECK_EVERY_S, QuotasFile, QuotasFileError, TenantQuota, parse_quotas

if TYPE_CHECKING:
    from pathlib import Path

FILE = """\
[default]
requests_per_minute = 60
tokens_per_minute = 1_000
tokens_burst = 5000
max_adapter_bytes = "1.5GiB"

[tenants.acme]
tokens_per_minute = 100
requests_per_minute = "unlimited"
max_concurrent_requests = 0

[tenants."team:prod"]
"""


def test_a_tenants_table_comes_before_the_default_and_a_burst_goes_with_its_rate() -> None:
    quotas = parse_quotas(FILE, "q.toml")

    assert quotas.of("anybody") == TenantQuota(
        requests_per_minute=60,
        requests_burst=60,
        tokens_per_minute=1000,
        tokens_burst=5000,
        max_adapter_bytes=3 * 2**29,
    )
    assert quotas.of("acme") == TenantQuota(
        tokens_per_minute=100, tokens_burst=100, max_concurrent_requests=0, max_adapter_bytes=3 * 2**29
    )
    assert quotas.of("team:prod") == quotas.default


def test_without_a_table_nothing_is_limited() -> None:
    assert not parse_quotas("", "q.toml").of("acme").limits_requests
    assert parse_quotas("[default]\nrequests_per_minute = 0", "q.toml").of("acme").limits_requests


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[default]\nrequest_per_minute = 1", "q.toml:2: default.request_per_minute: unknown; the keys are requests_"),
        ("[tenants.a]\n\n[tenants.b]\nrpm = 1", "q.toml:4: tenants.b.rpm: unknown"),
        ('[tenants."a b"]\nrpm = 1', "q.toml:2: tenants.a b.rpm: unknown"),
        ("[tenant.a]", "q.toml: tenant: unknown; the file has the tables"),
        ("tenants = 3", "q.toml:1: tenants: must be tables"),
        ("[tenants]\nacme = 3", "q.toml:2: tenants.acme: must be a table"),
        ("[default]\ntokens_per_minute = -1", "q.toml:2: default.tokens_per_minute: is -1; it must be a whole number"),
        ("[default]\ntokens_per_minute = 1.5", "q.toml:2: default.tokens_per_minute: is 1.5"),
        ("[default]\ntokens_per_minute = true", "q.toml:2: default.tokens_per_minute: is True"),
        ("[default]\ntokens_per_minute = '1k'", "q.toml:2: default.tokens_per_minute: is '1k'"),
        ("[default]\nmax_adapter_bytes = '1 zB'", "q.toml:2: default.max_adapter_bytes: '1 zB' is no size"),
        ("[default]\ntokens_burst = 5", "q.toml:2: default.tokens_burst: goes with a tokens_per_minute above 0"),
        (
            "[default]\nrequests_per_minute = 1\nrequests_burst = 0",
            "q.toml:3: default.requests_burst: must be at least",
        ),
        (
            "[default]\nrequests_per_minute = 1\nrequests_burst = 'unlimited'",
            "q.toml:3: default.requests_burst: must be a number",
        ),
        ("[default\n", "q.toml: "),
        ("[default]\ntokens_per_minute = " + 5000 * "9", "q.toml: Exceeds the limit"),
        ("x = " + 3000 * "[" + 3000 * "]", "q.toml: it is nested too deeply"),
        (
            "[default]\nmax_concurrent_requests = 99999999999999999999",
            "q.toml:2: default.max_concurrent_requests: is 9",
        ),
    ],
)
def test_what_means_nothing_is_refused_with_line_and_key(text: str, said: str) -> None:
    with pytest.raises(QuotasFileError) as caught:
        parse_quotas(text, "q.toml")

    assert str(caught.value).startswith(said)


def test_a_file_is_read_again_when_it_changes_and_a_broken_one_changes_nothing(tmp_path: Path) -> None:
    path, now = tmp_path / "q.toml", [0.0]
    path.write_text("[default]\nrequests_per_minute = 1")
    file = QuotasFile(path, clock=lambda: now[0])

    def rewrite(text: str) -> int | None:
        path.write_text(text)
        os.utime(path, ns=(0, round(now[0]) * 10**9))
        now[0] += CHECK_EVERY_S
        return file.current().default.requests_per_minute

    assert rewrite("[default]\nrequests_per_minute = 2") == 2
    assert rewrite("[default]\nrequests_per_minutes = 3") == 2
    first = file.current()
    now[0] += CHECK_EVERY_S
    assert file.current() is first
    assert rewrite("[default]\nrequests_per_minute = 4") == 4
    path.unlink()
    now[0] += CHECK_EVERY_S
    assert file.current().default.requests_per_minute == 4


def test_a_file_that_is_not_there_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(QuotasFileError, match="No such file"):
        QuotasFile(tmp_path / "none.toml")
