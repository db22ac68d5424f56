"""Turns tensors in memory into the messages of a push; shared by both clients."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np
from google.protobuf.duration_pb2 import Duration
from loraplex.v1 import adapter_store_pb2 as pb
from loraplex_common.errors import InvalidParameterError, NotSupportedError

from loraplex_client import _store_messages as messages
from loraplex_client.resources import PushResult

if TYPE_CHECKING:
    from collections.abc import Iterator

CHUNK_BYTES: Final = 1 << 20
MAX_HEADER_BYTES: Final = 4 * 1024 * 1024 - 65536
"""Bytes of the first message: a server takes no message above 4 MiB."""
_DTYPES: Final = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int32": "I32", "int64": "I64"}

Config: TypeAlias = "Mapping[str, Any] | bytes | str | Any"
"""``adapter_config.json``: a mapping, its text, or PEFT's own configuration object."""


@dataclass(frozen=True, slots=True)
class RawTensor:
    """A tensor as the bytes of a file.

    Attributes:
        dtype: As safetensors names it, e.g. ``BF16``.
        data: Little-endian, row-major.
    """

    dtype: str
    shape: tuple[int, ...]
    data: memoryview | bytes


@dataclass(frozen=True, slots=True)
class Push:
    """A push that is ready to be sent.

    Attributes:
        header: Its first message.
        reads: Give the bytes of the tensors, in the header's order; a tensor on a device is copied when its turn comes.
    """

    header: pb.PushAdapterRequest.Header
    reads: tuple[Callable[[], memoryview], ...]

    def messages(self) -> Iterator[pb.PushAdapterRequest]:
        """Yield all messages: the header, the bytes in pieces of `CHUNK_BYTES`, the finish."""
        yield pb.PushAdapterRequest(header=self.header)
        digest, piece = hashlib.sha256(), bytearray()
        for read in self.reads:
            data = read()
            digest.update(data)
            while data:
                taken = data[: CHUNK_BYTES - len(piece)]
                piece += taken
                data = data[len(taken) :]
                if len(piece) == CHUNK_BYTES:
                    yield pb.PushAdapterRequest(data=bytes(piece))
                    piece.clear()
        if piece:
            yield pb.PushAdapterRequest(data=bytes(piece))
        yield pb.PushAdapterRequest(finish=pb.PushAdapterRequest.Finish(sha256=digest.hexdigest()))


def push_of(
    name: str,
    state_dict: Mapping[str, Any],
    config: Config,
    *,
    label: str,
    expected: str | None,
    stage: bool,
    ready_timeout_s: float | None,
    base_model: str,
) -> Push:
    """Return a push of tensors.

    Raises:
        InvalidParameterError: If a value is no tensor, or the names together are too long for one message.
        NotSupportedError: If a tensor has a dtype that no adapter may have, or is a part of a distributed one.
    """
    header = pb.PushAdapterRequest.Header(
        name=name,
        adapter_config=_config_bytes(config),
        label=label,
        expected_revision=expected,
        stage=stage,
        base_model=base_model,
        request_id=messages.new_request_id(),
    )
    if ready_timeout_s is not None:
        timeout = Duration()
        timeout.FromNanoseconds(round(ready_timeout_s * 1e9))
        header.ready_timeout.CopyFrom(timeout)
    reads: list[Callable[[], memoryview]] = []
    for tensor_name, value in state_dict.items():
        dtype, shape, read = _tensor(tensor_name, value)
        header.tensors.add(name=tensor_name, dtype=dtype, shape=shape)
        reads.append(read)
    if header.ByteSize() > MAX_HEADER_BYTES:
        raise InvalidParameterError(
            f"{len(reads)} tensors: their names and adapter_config take {header.ByteSize()} bytes, at most "
            f"{MAX_HEADER_BYTES} fit one message; import a directory instead",
            field="state_dict",
        )
    return Push(header, tuple(reads))


def push_result(message: pb.PushAdapterResponse) -> PushResult:
    """Return what a push brought."""
    return PushResult(
        adapter=messages.adapter(message.adapter),
        revision=messages.revision(message.revision),
        already_existed=message.already_existed,
        warnings=tuple(message.warnings),
        late_gateways=tuple(message.visibility.late_gateways),
        ready_engines=tuple(message.ready_engines),
        late_engines=tuple(message.late_engines),
        ready_timeout_s=message.ready_timeout.ToMilliseconds() / 1000,
    )


def _config_bytes(config: Config) -> bytes:
    if isinstance(config, bytes):
        return config
    if isinstance(config, str):
        return config.encode()
    fields = config if isinstance(config, Mapping) else config.to_dict()
    return json.dumps(fields, default=_plain).encode()


def _plain(value: object) -> object:
    """Return a value of PEFT's configuration as save_pretrained writes it: a set as a list, an enumeration as its value."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    if hasattr(value, "value"):
        return value.value
    raise InvalidParameterError(f"config: {type(value).__name__} is nothing that JSON has", field="config")


def _tensor(name: str, value: Any) -> tuple[str, tuple[int, ...], Callable[[], memoryview]]:
    """Return a tensor's dtype and shape, and what gives its bytes."""
    if isinstance(value, RawTensor):
        return value.dtype, value.shape, lambda: memoryview(value.data)
    if not hasattr(value, "dtype") or not hasattr(value, "shape"):
        raise InvalidParameterError(
            f"{name}: {type(value).__name__} is no tensor of torch or numpy", field="state_dict"
        )
    if hasattr(value, "full_tensor"):
        raise NotSupportedError(
            f"{name} is a part of a distributed tensor: gather it first, e.g. with full_tensor() on all ranks, and push from one"
        )
    dtype = _DTYPES.get(str(value.dtype).removeprefix("torch."))
    if dtype is None:
        raise NotSupportedError(f"{name}: {value.dtype} is not one of {', '.join(_DTYPES)}")
    is_torch = hasattr(value, "detach")
    return dtype, tuple(value.shape), lambda: _torch_bytes(value) if is_torch else _numpy_bytes(value)


def _torch_bytes(tensor: Any) -> memoryview:
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return _numpy_bytes(flat.view(sys.modules["torch"].uint8).numpy())  # numpy has no bf16


def _numpy_bytes(array: Any) -> memoryview:
    flat: Any = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return memoryview(flat)
