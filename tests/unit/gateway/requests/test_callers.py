"""What a credential decides: classes of service, and which callers share prefixes and homes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from loraplex_common.auth import ANYBODY, Principal
from loraplex_common.error_status import from_status, to_status
from loraplex_common.errors import PriorityForbiddenError
from loraplex_gateway.requests.callers import affinity_key, cache_salt, granted_priority
from loraplex_gateway.types import Priority

BATCH, NORMAL, HIGH = Priority.BATCH, Priority.NORMAL, Priority.HIGH


def caller(highest: Priority = NORMAL, *, name: str = "acme", group: str = "") -> Principal:
    return Principal(name=name, group=group, highest_priority=highest)


@pytest.mark.parametrize(
    ("wanted", "highest", "granted"),
    [
        (None, BATCH, BATCH),
        (None, NORMAL, NORMAL),
        (None, HIGH, NORMAL),
        (BATCH, BATCH, BATCH),
        (BATCH, HIGH, BATCH),
        (NORMAL, NORMAL, NORMAL),
        (HIGH, HIGH, HIGH),
    ],
)
def test_a_class_up_to_the_credentials_is_granted(
    wanted: Priority | None, highest: Priority, granted: Priority
) -> None:
    assert granted_priority(wanted, caller(highest)) is granted


@pytest.mark.parametrize(("wanted", "highest"), [(NORMAL, BATCH), (HIGH, BATCH), (HIGH, NORMAL)])
def test_a_class_above_the_credentials_is_refused_with_the_remedy(wanted: Priority, highest: Priority) -> None:
    with pytest.raises(
        PriorityForbiddenError, match=f"priority={wanted.name.lower()} in its line of.*keys file"
    ) as caught:
        granted_priority(wanted, caller(highest))

    told = from_status(to_status(caught.value))
    assert type(told) is PriorityForbiddenError
    assert told.metadata == {"priority": wanted.name.lower(), "highest_priority": highest.name.lower()}


def test_where_there_are_no_keys_every_class_is_granted() -> None:
    assert granted_priority(HIGH, ANYBODY) is HIGH


NAMES = st.text(st.sampled_from("ab:"), min_size=1, max_size=6)
ASKED = st.tuples(NAMES, st.one_of(st.just(""), NAMES), st.text(st.sampled_from("ab:"), max_size=6))


@given(one=ASKED, other=ASKED)
def test_salts_are_equal_within_a_group_under_equal_salts_and_never_else(
    one: tuple[str, str, str], other: tuple[str, str, str]
) -> None:
    salts = [cache_salt(caller(name=name, group=group), salt) for name, group, salt in (one, other)]
    whose = [(bool(group), group or name, salt) for name, group, salt in (one, other)]

    assert (salts[0] == salts[1]) == (whose[0] == whose[1])


def test_one_affinity_key_of_two_tenants_is_two() -> None:
    key = affinity_key(caller(name="a"), "user-1")

    assert key == affinity_key(caller(name="a"), "user-1")
    assert key != affinity_key(caller(name="b"), "user-1")
    assert key != cache_salt(caller(name="a"), "user-1")
    assert affinity_key(caller(name="a"), "") == ""
