"""What a push of tensors in memory sends, and which values it refuses by name before a byte is sent."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import peft
import pytest
import torch
from loraplex_client import RawTensor
from loraplex_client._push_messages import CHUNK_BYTES, push_of
from loraplex_common.errors import InvalidParameterError, NotSupportedError

if TYPE_CHECKING:
    from loraplex.v1 import adapter_store_pb2 as pb


def sent(state_dict: dict[str, Any], config: Any = "{}", **options: Any) -> list[pb.PushAdapterRequest]:
    defaults: dict[str, Any] = {
        "label": "",
        "expected": None,
        "stage": False,
        "ready_timeout_s": None,
        "base_model": "",
    }
    return list(push_of("a", state_dict, config, **defaults | options).messages())


def data_of(messages: list[pb.PushAdapterRequest]) -> bytes:
    return b"".join(message.data for message in messages)


def test_bytes_follow_the_header_in_pieces_that_know_no_tensors() -> None:
    small, large = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3), np.ones((700, 513), dtype=np.float32)

    header, *data, finish = sent({"small": small.T, "large": large, "none": torch.empty(0, 4)}, expected="")

    announced = [(each.name, each.dtype, list(each.shape)) for each in header.header.tensors]
    assert announced == [("small", "BF16", [3, 2]), ("large", "F32", [700, 513]), ("none", "F32", [0, 4])]
    assert header.header.HasField("expected_revision")
    assert [len(piece.data) for piece in data] == [CHUNK_BYTES, 12 + 700 * 513 * 4 - CHUNK_BYTES]
    values = small.T.contiguous().view(torch.uint8).numpy().tobytes() + large.tobytes()
    assert data_of(data) == values
    assert finish.finish.sha256 == hashlib.sha256(values).hexdigest()


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16", "int32", "int64"])
def test_a_scalar_a_view_and_a_file_s_bytes_are_sent_as_they_are(dtype: str) -> None:
    wanted = torch.arange(12).to(getattr(torch, dtype)).reshape(3, 4)
    raw = wanted[:, 1].contiguous().view(torch.uint8).numpy().tobytes()
    header = sent({"view": wanted[:, 1], "scalar": wanted[0, 0]})[0].header
    names = {"float16": "F16", "float32": "F32", "bfloat16": "BF16", "int32": "I32", "int64": "I64"}

    assert [each.dtype for each in header.tensors] == [names[dtype]] * 2
    assert data_of(sent({"view": wanted[:, 1]})) == raw
    assert data_of(sent({"file": RawTensor(names[dtype], (3,), raw)})) == raw


def test_peft_s_configuration_is_sent_as_it_saves_it() -> None:
    config = peft.LoraConfig(r=4, target_modules=["v_proj", "q_proj"], task_type="CAUSAL_LM")

    written = json.loads(sent({"a": np.zeros(1, np.float32)}, config)[0].header.adapter_config)

    assert written["peft_type"] == "LORA"
    assert written["target_modules"] == ["q_proj", "v_proj"]
    assert written["r"] == 4


class Part:
    """A part of a distributed tensor, as torch's DTensor is one."""

    dtype, shape = torch.float32, (4, 4)

    def full_tensor(self) -> torch.Tensor:
        """Gather it."""
        return torch.zeros(4, 4)


def test_what_cannot_be_pushed_is_refused_by_name() -> None:
    for value, error, match in (
        (Part(), NotSupportedError, r"lora_A is a part of a distributed tensor: gather it first"),
        (torch.zeros(2, dtype=torch.float64), NotSupportedError, r"lora_A: torch\.float64 is not one of float32"),
        (np.zeros(2, dtype=np.int8), NotSupportedError, r"lora_A: int8 is not one of"),
        ([1.0, 2.0], InvalidParameterError, r"lora_A: list is no tensor"),
    ):
        with pytest.raises(error, match=match):
            sent({"lora_A": value})
    many = {f"{n}{'x' * 400}": np.zeros(1, np.float32) for n in range(11_000)}
    with pytest.raises(InvalidParameterError, match="11000 tensors: their names"):
        sent(many)
