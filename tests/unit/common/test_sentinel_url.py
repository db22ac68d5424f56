"""The URL of a Valkey behind Sentinels."""

from __future__ import annotations

import pytest
from loraplex_common.sentinel_url import SentinelUrl
from loraplex_common.service_settings import hide_password, whole_url, without_password


def test_a_url_names_sentinels_primary_user_and_database() -> None:
    found = SentinelUrl.parse("rediss-sentinel://gate%20way@s1:5000,s2,[::1]:26380/3#main")

    assert found == SentinelUrl(
        sentinels=(("s1", 5000), ("s2", 26379), ("::1", 26380)),
        primary="main",
        user="gate way",
        database=3,
        has_tls=True,
    )


@pytest.mark.parametrize("url", ["redis://host:1/0", "unix:///path", "rediss://host"])
def test_other_urls_are_none_of_sentinels(url: str) -> None:
    assert SentinelUrl.parse(url) is None


@pytest.mark.parametrize(
    ("url", "match"),
    [
        ("redis-sentinel://s1:1,s2:2/0", "has the form redis-sentinel://"),
        ("redis-sentinel://s1/x#main", "has the form"),
        ("redis-sentinel://s1:port#main", "'s1:port' is no address of a Sentinel"),
        ("redis-sentinel://s1,,s2#main", "'' is no address"),
        ("redis-sentinel://user:secret@s1#main", "--redis-password-file"),
    ],
)
def test_a_url_in_another_form_is_refused_when_it_is_read_and_never_quoted(url: str, match: str) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        whole_url(url)
    assert "secret" not in str(caught.value)


def test_a_password_on_a_command_line_is_refused_there_too() -> None:
    with pytest.raises(ValueError, match="password"):
        without_password("redis-sentinel://user:secret@s1,s2#main")
    assert "secret" not in hide_password("redis-sentinel://user:secret@s1,s2#main")
