"""What is wrong with a push is refused by name, and nothing of it is left."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from loraplex_common.errors import AdapterCorruptUploadError, AdapterIncompatibleError, InvalidParameterError
from support.pushes import (
    assert_no_blob,
    push_messages,
    send,
    tensors_of,
)
from support.store_rig import StoreClient, refused

if TYPE_CHECKING:
    from loraplex.v1 import adapter_store_pb2 as pb
    from loraplex_client import AsyncAdapters

pytestmark = pytest.mark.integration


def tensor_with(**fields: Any) -> list[pb.PushAdapterRequest]:
    """Return a push whose first tensor is announced otherwise than it is."""
    messages = push_messages("a", 1)
    for field, value in fields.items():
        if field == "shape":
            messages[0].header.tensors[0].shape[:] = value
        else:
            setattr(messages[0].header.tensors[0], field, value)
    return messages


def spoiled() -> list[pb.PushAdapterRequest]:
    messages = push_messages("a", 1)
    messages[1].data = b"\1" + messages[1].data[1:]
    return messages


def without_tensors() -> list[pb.PushAdapterRequest]:
    messages = push_messages("a", 1)
    messages[0].header.ClearField("tensors")
    return messages


NAMES = [tensor.name for tensor in push_messages("a", 1)[0].header.tensors]
WRONG = [
    (push_messages("a", 1)[1:], InvalidParameterError, "first message must be a header"),
    (push_messages("a", 1)[:-1], AdapterCorruptUploadError, "ended without a finish: [0-9]+ of [0-9]+ bytes"),
    (push_messages("a", 1)[::2], AdapterCorruptUploadError, "truncated: [0-9]+ of [0-9]+ bytes"),
    (
        [*push_messages("a", 1)[:2], *push_messages("a", 1)[1:]],
        AdapterCorruptUploadError,
        "more bytes than the announced",
    ),
    ([*push_messages("a", 1)[:1], *push_messages("a", 1)], InvalidParameterError, "message header may not come"),
    (spoiled(), AdapterCorruptUploadError, "sha256 of the tensors is"),
    (without_tensors(), InvalidParameterError, "0 tensors"),
    (tensor_with(shape=[1, 1]), AdapterCorruptUploadError, "more bytes than the announced"),
    (tensor_with(shape=[1] * 9), InvalidParameterError, "at most 8 dimensions"),
    (tensor_with(shape=[2**31, 2**31]), AdapterCorruptUploadError, "max-adapter-bytes"),
    (tensor_with(dtype="F64"), AdapterIncompatibleError, "dtype 'F64' is not one of F32, F16, BF16"),
    (tensor_with(name=""), InvalidParameterError, "is no tensor's name"),
    (tensor_with(name=NAMES[1]), InvalidParameterError, "is announced twice"),
    (tensor_with(name="model.strange"), AdapterIncompatibleError, "model.strange"),
    (push_messages("a", 1, ready_timeout_s=121.0), InvalidParameterError, "121 s is not between 0 and 120 s"),
    (push_messages("no name", 1), InvalidParameterError, "is no adapter name"),
]


async def test_what_is_wrong_with_a_push_is_named_and_nothing_is_left(client: StoreClient, redis_url: str) -> None:
    for messages, error, match in WRONG:
        with refused(error, match):
            await send(client, messages)

    assert await client.names() == []
    await assert_no_blob(redis_url)


async def test_a_value_that_is_no_number_is_refused_by_its_tensor(adapters: AsyncAdapters) -> None:
    values, config = tensors_of(1)
    name = next(iter(values))
    values[name][0, 0] = np.nan

    with pytest.raises(AdapterCorruptUploadError, match=f"{name} holds 1 NaN of its {values[name].size} values"):
        await adapters.push("a", values, config)
