"""What all services are told about identities: halves are refused, networks are not open by accident, URLs hide passwords."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from loraplex_common.service_settings import (
    ServiceSettings,
    hide_password,
    is_loopback,
    require_identity,
    whole_url,
    without_password,
)

FILE = Path("x.pem")


@pytest.mark.parametrize(
    ("changes", "url", "words"),
    [
        ({"tls_cert": FILE}, None, "--tls-cert and --tls-key belong together"),
        ({"tls_key": FILE}, None, "--tls-cert and --tls-key belong together"),
        ({"tls_client_ca": FILE}, None, "--tls-client-ca needs"),
        ({"peer_tls_cert": FILE, "peer_tls_ca": FILE}, None, "--peer-tls-cert and --peer-tls-key belong together"),
        ({"peer_tls_cert": FILE, "peer_tls_key": FILE}, "redis://h", "--peer-tls-cert needs --peer-tls-ca"),
        ({"redis_tls_ca": FILE}, "redis://h", "--redis-tls-ca needs a --redis-url that begins with rediss://"),
        ({"redis_tls_ca": FILE}, None, "--redis-tls-ca needs"),
    ],
)
def test_half_an_identity_is_refused_with_the_flags_that_are_missing(
    changes: dict[str, Any], url: str | None, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        ServiceSettings(**changes).check_identity(url)


@pytest.mark.parametrize(
    "url",
    ["collector:4317", "http://", "http://h", "http://h:1/v1", "http://h:65536", "http://[::1:4317", "grpc://h:1"],
)
def test_an_endpoint_for_traces_that_is_none_is_refused_by_name(url: str) -> None:
    with pytest.raises(ValueError, match="write http://HOST:PORT"):
        ServiceSettings(otlp_endpoint=url).check_identity(None)


@pytest.mark.parametrize("url", ["http://collector:4317", "https://[::1]:4317/"])
def test_an_endpoint_for_traces_has_a_host_and_a_port(url: str) -> None:
    ServiceSettings(otlp_endpoint=url).check_identity(None)


def test_a_certificate_towards_valkey_alone_is_fine() -> None:
    ServiceSettings(redis_tls_ca=FILE, peer_tls_cert=FILE, peer_tls_key=FILE).check_identity("rediss://h:6379/0")


@pytest.mark.parametrize(
    ("host", "is_local"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("[::1]", True), ("localhost", True)]
    + [(host, False) for host in ("0.0.0.0", "::", "10.1.2.3", "engine-1", "", "localhost.example.org")],
)
def test_only_what_this_machine_alone_reaches_is_the_loopback(host: str, is_local: bool) -> None:
    assert is_loopback(host) is is_local


def test_a_network_is_open_only_to_those_with_keys_or_because_somebody_said_so() -> None:
    with pytest.raises(ValueError, match=r"--api-keys-file, or, .* --allow-anonymous"):
        require_identity("0.0.0.0", None, allow_anonymous=False)
    require_identity("0.0.0.0", None, allow_anonymous=True)
    require_identity("0.0.0.0", FILE, allow_anonymous=False)
    require_identity("127.0.0.1", None, allow_anonymous=False)


@pytest.mark.parametrize(
    "url",
    [
        "redis://:hunter2@h:1/0",
        "rediss://me:hunter2@h/0",
        "unix://:hunter2@/run/v.sock",
        "unix:///v?password=hunter2",
        "redis://h?db=1&password=hunter2",
        "redis://h/0?pass%77ord=hunter2",
    ],
)
def test_a_url_with_a_password_is_refused_on_a_command_line_and_masked_in_logs(url: str) -> None:
    with pytest.raises(ValueError, match="--redis-password-file") as caught:
        without_password(url)

    assert "hunter2" not in str(caught.value) + hide_password(url)
    assert "********" in hide_password(url)


@pytest.mark.parametrize("url", ["redis://:6379/hunter2@h:1/0", "rediss://me:hunter2#6@h/0", "redis://:hunter2?@h"])
def test_a_password_that_would_pass_for_a_path_is_refused_and_not_repeated(url: str) -> None:
    for parse in (whole_url, without_password):
        with pytest.raises(ValueError, match="are written %2F, %3F and %23") as caught:
            parse(url)
        assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("url", ["redis://h:1/0", "rediss://me@h/0", "unix:///run/v.sock?db=3"])
def test_a_url_without_one_is_shown_as_it_is(url: str) -> None:
    assert without_password(url) == hide_password(url) == url
