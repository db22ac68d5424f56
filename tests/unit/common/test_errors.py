"""The error table: every class survives the wire, and docs/errors.md says what the classes say."""

from __future__ import annotations

import re
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2
from loraplex_common import errors
from loraplex_common.error_status import from_status, to_status
from loraplex_common.errors import LoraplexError, RemoteError
from loraplex_common.quota_failure import ExceededLimit

DOCS = Path(__file__).parents[3] / "docs" / "errors.md"


def error_classes() -> list[type[LoraplexError]]:
    return [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, LoraplexError)]


CLASSES = [cls for cls in error_classes() if cls is not RemoteError]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_error_survives_the_wire(cls: type[LoraplexError]) -> None:
    error = cls("what is wrong", retry_after_s=1.5, metadata={"engine": "e-1"}, field="adapter")

    result = from_status(to_status(error))

    assert type(result) is cls
    assert (result.code, result.reason, result.http_status) == (cls.code, cls.reason, cls.http_status)
    assert (result.message, result.retry_after_s, result.metadata) == ("what is wrong", 1.5, {"engine": "e-1"})
    assert (result.field, result.violations) == ("adapter", (("adapter", "what is wrong"),))


def test_limits_of_a_quota_survive_the_wire_and_a_refusal_without_a_time_is_final() -> None:
    limit = ExceededLimit(tenant="acme", limit="tokens_per_minute", value=100, description="100 a minute; 3 are left")
    later = errors.TenantQuotaError("over its quota", exceeded=[limit], retry_after_s=2.5)
    never = errors.TenantQuotaError("over its quota", exceeded=[limit, limit])

    for error in (later, never):
        status = to_status(error)
        result = from_status(status)
        assert isinstance(result, errors.TenantQuotaError)
        assert (result.exceeded, result.retry_after_s) == (error.exceeded, error.retry_after_s)
        assert "google.rpc.QuotaFailure" in [detail.TypeName() for detail in status.details]
    assert later.is_retryable
    assert not never.is_retryable


def test_no_two_errors_share_code_and_reason() -> None:
    pairs = [(cls.code, cls.reason) for cls in CLASSES]

    assert len(set(pairs)) == len(pairs)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_reasons_are_identifiers_and_http_statuses_are_errors(cls: type[LoraplexError]) -> None:
    assert re.fullmatch(r"[A-Z][A-Z_]+", cls.reason)
    assert 400 <= cls.http_status < 600
    assert cls.code is not grpc.StatusCode.OK


def test_an_error_without_extras_carries_only_error_info() -> None:
    status = to_status(errors.AdapterNotFoundError("no such adapter"))

    assert [detail.TypeName() for detail in status.details] == ["google.rpc.ErrorInfo"]


def test_several_violations_survive_the_wire() -> None:
    violations = (("sampling.top_p", "above 1"), ("stopping.max_new_tokens", "negative"))

    result = from_status(to_status(errors.InvalidParameterError("two fields are wrong", violations=violations)))

    assert result.violations == violations
    assert result.field == "sampling.top_p"


def test_an_unknown_reason_becomes_a_remote_error_with_the_codes_http_status() -> None:
    newer = RemoteError("from a newer peer", code=grpc.StatusCode.NOT_FOUND, reason="TEAPOT_NOT_FOUND", http_status=404)

    result = from_status(to_status(newer))

    assert type(result) is RemoteError
    assert (result.code, result.reason, result.http_status) == (grpc.StatusCode.NOT_FOUND, "TEAPOT_NOT_FOUND", 404)


def test_a_remote_error_passes_a_second_hop_unchanged() -> None:
    first = RemoteError("odd", code=grpc.StatusCode.UNAVAILABLE, reason="ODD", http_status=503, retry_after_s=2.0)

    second = from_status(to_status(from_status(to_status(first))))

    assert (second.code, second.reason, second.retry_after_s) == (grpc.StatusCode.UNAVAILABLE, "ODD", 2.0)


def test_a_status_with_foreign_details_is_still_read() -> None:
    status = to_status(errors.SaturatedError("full", retry_after_s=0.25))
    status.details.add().Pack(error_details_pb2.Help(links=[error_details_pb2.Help.Link(url="x")]))

    assert isinstance(from_status(status), errors.SaturatedError)


def test_long_messages_and_many_violations_are_cut_to_fit_a_trailer() -> None:
    violations = [(f"field{i}" * 50, "\u00e4" * 5000) for i in range(100)]

    status = to_status(errors.InvalidParameterError("\u00e4" * 100_000, violations=violations))

    assert status.message.endswith("...")
    assert len(status.message.encode()) * 3 + status.ByteSize() < 8192


WIDE = "\U0001f600"


@pytest.mark.parametrize("letter", ["a", "%", "\u00e4", WIDE], ids=["plain", "percent", "two-bytes", "four-bytes"])
@pytest.mark.parametrize("value_chars", [1, 100, 1000, 100_000])
def test_a_status_has_at_most_4_kib_whatever_the_caller_sent(letter: str, value_chars: int) -> None:
    limit = ExceededLimit(tenant=letter * 128, limit="l" * 64, value=2**60, description=letter * 1000)
    error = errors.TenantQuotaError(
        letter * 100_000,
        exceeded=[limit] * 20,
        retry_after_s=1e9,
        metadata={f"key_{number}": letter * value_chars for number in range(1000)},
        violations=[(letter * 1000, letter * 1000)] * 100,
    )

    status = to_status(error)
    written = sum(1 if 0x20 <= byte <= 0x7E and byte != 0x25 else 3 for byte in status.message.encode())

    assert status.ByteSize() <= 4096
    assert written + 4 * -(-status.ByteSize() // 3) < 8192  # grpc-message and the details in base64
    result = from_status(status)
    assert isinstance(result, errors.TenantQuotaError)
    assert result.retry_after_s is not None
    assert result.message.startswith(letter * 100)
    assert result.metadata["left_out"].startswith("key_")
    assert {value for key, value in result.metadata.items() if key != "left_out"} <= {letter * value_chars}


def test_a_fact_of_which_a_part_would_fit_is_left_out_and_named_while_short_ones_stay() -> None:
    facts = {"adapter": "n" * 5000, "resume_token": "t" * 2500, "error_id": "e-1"}

    result = from_status(to_status(errors.StreamInterruptedError("cut", metadata=facts)))

    assert result.metadata == {"resume_token": "t" * 2500, "error_id": "e-1", "left_out": "adapter"}


def test_violations_that_have_no_room_leave_it_to_the_first_ones() -> None:
    violations = [(f"field_{number}", "x" * 128) for number in range(8)]
    error = errors.InvalidParameterError("m" * 1024, metadata={"fact": "f" * 2000}, violations=violations)

    result = from_status(to_status(error))

    assert 0 < len(result.violations) < 8
    assert result.violations == tuple(violations[: len(result.violations)])
    assert result.metadata == error.metadata


def test_lone_surrogates_in_a_message_do_not_break_the_answer() -> None:
    status = to_status(errors.InvalidParameterError("bad text \ud800", field="prompt", metadata={"name": "\ud800"}))

    assert status.message.startswith("bad text")
    assert from_status(status).metadata == {"name": "?"}


def documented_rows() -> dict[str, tuple[str, str, int, bool]]:
    """{class: (code, reason, http, whether a retry may help)} of the table in docs/errors.md."""
    pattern = re.compile(r"^\| `(\w+)` \| (\w+) \| (\w+) \| (\d+) \| ([^|]+) \| [^|]+ \|$", re.MULTILINE)
    return {
        name: (code, reason, int(http), retry != "no")
        for name, code, reason, http, retry in pattern.findall(DOCS.read_text())
    }


def test_the_documented_error_table_is_the_class_tree() -> None:
    expected = {cls.__name__: (cls.code.name, cls.reason, cls.http_status, cls.is_retryable) for cls in CLASSES}

    assert documented_rows() == expected, "docs/errors.md and loraplex_common/errors.py differ"


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_openais_clients_do_not_send_a_refused_request_again(cls: type[LoraplexError]) -> None:
    servers_own_failure = (
        errors.LoraplexError,
        errors.AdapterCorruptError,
        errors.DeadlineError,
        errors.RequestLostError,
    )

    if not cls.is_retryable and cls not in servers_own_failure:  # those say x-should-retry: false
        assert cls.http_status in (400, 401, 403, 404, 413, 422, 499)
