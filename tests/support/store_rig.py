"""An adapter store in this process over a tiny base model and a real Valkey."""

from __future__ import annotations

import functools
import hashlib
import tempfile
import uuid
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.longrunning import operations_pb2, operations_pb2_grpc
from loraplex.v1 import adapter_pb2, adapter_store_pb2_grpc
from loraplex.v1 import adapter_store_pb2 as pb
from loraplex_adapter_store.config import StoreConfig
from loraplex_adapter_store.service import RunningStore, running_store
from loraplex_common.error_status import from_status
from loraplex_common.grpc_channel import open_channel
from loraplex_common.rpc_errors import error_from_rpc
from support.adapters import Recipe, adapter_files
from support.base_models import TinyBase, write_base_model

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from loraplex_common.errors import LoraplexError

PART_BYTES = 256 * 1024


@functools.cache
def tiny_base_dir() -> Path:
    """Return a tiny base model named ``tiny``, written once per process."""
    return write_base_model(Path(tempfile.mkdtemp(prefix="loraplex-store-")) / "tiny", TinyBase())


@functools.cache
def other_base_dir() -> Path:
    """Return a base model of another shape, named ``other``."""
    base = TinyBase(hidden_size=32, num_heads=2, num_kv_heads=1, seed=1)
    return write_base_model(Path(tempfile.mkdtemp(prefix="loraplex-store-")) / "other", base)


def store_config(redis_url: str, **changes: Any) -> StoreConfig:
    """Return a configuration on free ports that collects garbage at once."""
    defaults: dict[str, Any] = {
        "model": (tiny_base_dir(),),
        "model_alias": ("loraplex-tests/tiny",),
        "redis_url": redis_url,
        "port": 0,
        "metrics_port": 0,
        "gc_grace_s": 0.0,
        "gc_interval_s": 0.05,
        "max_adapter_bytes": 8 * 2**20,
        "drain_grace_s": 1.0,
    }
    return StoreConfig(**defaults | changes)


@dataclass(kw_only=True)
class StoreClient:
    """Every call that tests make to a store, over gRPC."""

    channel: grpc.aio.Channel

    @property
    def stub(self) -> Any:
        """The service's stub; the generated types differ between sync and asyncio."""
        return adapter_store_pb2_grpc.AdapterStoreServiceStub(self.channel)

    @property
    def operations(self) -> Any:
        """The stub of the operations service."""
        return operations_pb2_grpc.OperationsStub(self.channel)

    async def wait(self, operation: operations_pb2.Operation) -> pb.ImportAdapterResult:
        """Wait for an import and return its result.

        Raises:
            LoraplexError: If it failed.
        """
        done = await self.operations.WaitOperation(operations_pb2.WaitOperationRequest(name=operation.name), timeout=60)
        assert done.done
        if done.HasField("error"):
            raise from_status(done.error)
        result = pb.ImportAdapterResult()
        assert done.response.Unpack(result)
        return result

    async def import_dir(self, name: str, directory: Path, **fields: Any) -> pb.ImportAdapterResult:
        """Import from a directory and wait."""
        return await self.import_uri(name, directory.as_uri(), **fields)

    async def import_uri(self, name: str, uri: str, **fields: Any) -> pb.ImportAdapterResult:
        """Import from ``file:///dir`` and wait."""
        request = pb.ImportAdapterRequest(name=name, uri=uri, **fields)
        with translated():
            return await self.wait(await self.stub.ImportAdapter(request))

    async def upload(self, name: str, files: dict[str, bytes], **header: Any) -> pb.UploadAdapterResponse:
        """Upload files unchanged."""
        with translated():
            response: pb.UploadAdapterResponse = await self.stub.UploadAdapter(
                iter(upload_parts(name, files, **header))
            )
        return response

    async def upload_recipe(self, name: str, recipe: Recipe | None = None, **header: Any) -> pb.UploadAdapterResponse:
        """Upload a random adapter for the tiny base model."""
        return await self.upload(name, adapter_files(tiny_base_dir(), recipe), **header)

    async def get(self, name: str) -> pb.GetAdapterResponse:
        """Look a name up."""
        with translated():
            response: pb.GetAdapterResponse = await self.stub.GetAdapter(pb.GetAdapterRequest(name=name))
        return response

    async def names(self, **fields: Any) -> list[str]:
        """List all names."""
        with translated():
            page = await self.stub.ListAdapters(pb.AdapterStoreServiceListAdaptersRequest(**fields))
        return [adapter.name for adapter in page.adapters]


def upload_parts(
    name: str, files: dict[str, bytes], *, part_bytes: int = PART_BYTES, **header: Any
) -> Iterator[pb.UploadAdapterRequest]:
    """Yield the messages of an upload."""
    announced = [
        pb.UploadAdapterRequest.File(name=file, num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        for file, data in files.items()
    ]
    yield pb.UploadAdapterRequest(header=pb.UploadAdapterRequest.Header(name=name, files=announced, **header))
    for data in files.values():
        for start in range(0, len(data), part_bytes):
            yield pb.UploadAdapterRequest(data=data[start : start + part_bytes])


class translated:  # noqa: N801
    """Turn failed calls inside the block into the errors behind them."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, grpc.aio.AioRpcError):
            raise error_from_rpc(error) from error


@asynccontextmanager
async def running_rig(
    config: StoreConfig, api_key: str | None = None
) -> AsyncIterator[tuple[RunningStore, StoreClient]]:
    """Run a store, give out a client, and check at the end that the store holds nothing."""
    async with running_store(config) as store:
        async with open_channel(f"127.0.0.1:{store.grpc_port}", api_key=api_key) as channel:
            yield store, StoreClient(channel=channel)
        store.check_integrity()


def refused(error: type[LoraplexError], match: str) -> Any:
    """Expect a typed error whose message matches."""
    return pytest.raises(error, match=match)


def new_id() -> str:
    """Return a request id."""
    return str(uuid.uuid4())


async def set_alias(client: StoreClient, name: str, label: str, revision: str, **fields: Any) -> pb.SetAliasResponse:
    """Point a label at a revision."""
    alias = adapter_pb2.Alias(name=name, label=label, revision=revision)
    with translated():
        response: pb.SetAliasResponse = await client.stub.SetAlias(pb.SetAliasRequest(alias=alias, **fields))
    return response


async def delete(client: StoreClient, name: str, **fields: Any) -> adapter_pb2.Adapter:
    """Delete a name."""
    with translated():
        response = await client.stub.DeleteAdapter(pb.DeleteAdapterRequest(name=name, **fields))
    adapter: adapter_pb2.Adapter = response.adapter
    return adapter
