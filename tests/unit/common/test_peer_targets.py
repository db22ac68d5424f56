"""Lists of addresses: which are taken, and what gRPC is given for them."""

from __future__ import annotations

import itertools

import pytest
from loraplex_common.peer_targets import channel_target, check_targets, in_turn, parse_targets


@pytest.mark.parametrize("text", ["stores:8510", "dns:///stores:8510", "unix:/run/store"])
def test_one_address_may_be_any_name_of_grpc(text: str) -> None:
    assert parse_targets(text) == (text,)


@pytest.mark.parametrize(
    "text",
    ["", " ", ",", "a:1,", "a:1,,b:2", "a:1,b", "a:1,b:0", "a:1,b:65536", "a:1,dns:///b:2", "a:1,b:x", "a:1,a:1"],
)
def test_a_list_that_names_no_addresses_is_refused_with_its_flag(text: str) -> None:
    with pytest.raises(ValueError, match="--store-target "):
        check_targets("store-target", text, tls_name=None, has_tls=False)


def test_certificates_of_several_addresses_are_checked_by_a_name_that_must_be_given() -> None:
    with pytest.raises(ValueError, match="--store-tls-name"):
        check_targets("store-target", "a:1,b:2", tls_name=None, has_tls=True)
    check_targets("store-target", "a:1,b:2", tls_name="store", has_tls=True)
    check_targets("store-target", "a:1", tls_name=None, has_tls=True)
    check_targets("store-target", None, tls_name=None, has_tls=True)


def test_each_address_has_its_turn() -> None:
    assert sorted(itertools.islice(in_turn("a:1, b:2,c:3"), 6)) == sorted(2 * ["a:1", "b:2", "c:3"])


async def test_one_channel_knows_all_addresses() -> None:
    assert await channel_target("dns:///stores:8510") == "dns:///stores:8510"
    assert await channel_target("127.0.0.1:2,127.0.0.1:1") == "ipv4:127.0.0.1:1,127.0.0.1:2"
    assert await channel_target("[::1]:2,[::1]:1") == "ipv6:[::1]:1,[::1]:2"
    assert await channel_target("no-such-host.invalid:1,127.0.0.1:1") == "ipv4:127.0.0.1:1"
    with pytest.raises(OSError, match="resolves"):
        await channel_target("no-such-host.invalid:1,no-such-host.invalid:2")
