"""The parts that all other parts of the store depend on, from its configuration: Valkey, tiers of blobs, threads, images."""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from loraplex_common.auth import Authenticator
from loraplex_common.exposition import new_registry
from loraplex_common.valkey_client import blocking_pool

from loraplex_adapter_store.buffers import NUM_AHEAD, BufferPool
from loraplex_adapter_store.byte_budget import ByteBudget
from loraplex_adapter_store.config import StoreConfig
from loraplex_adapter_store.credentials import Credentials
from loraplex_adapter_store.disk.disk_index import DiskIndex
from loraplex_adapter_store.disk.disk_tier import DiskTier
from loraplex_adapter_store.images import ImageCache, ImageSources
from loraplex_adapter_store.metrics import StoreMetrics
from loraplex_adapter_store.repository import keys
from loraplex_adapter_store.repository.blob_tier import Bulk
from loraplex_adapter_store.repository.blobs import Blobs
from loraplex_adapter_store.repository.bulk_reader import BulkReader
from loraplex_adapter_store.repository.bulk_writer import BulkWriter
from loraplex_adapter_store.repository.catalog import Catalog
from loraplex_adapter_store.repository.derivation_leases import DerivationLeases
from loraplex_adapter_store.repository.engines import EngineHoldings
from loraplex_adapter_store.repository.on_disk import OnDisk
from loraplex_adapter_store.repository.tenant_bytes import adapter_bytes
from loraplex_adapter_store.repository.tenant_imports import TenantImports, imports_per_day
from loraplex_adapter_store.signatures.check import Signatures
from loraplex_adapter_store.tiers import tiers_of

if TYPE_CHECKING:
    from contextlib import AsyncExitStack

    from loraplex_adapter_store.bases import KnownBases

NUM_THREADS: Final = 4
MAX_IMAGE_THREADS: Final = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Core:
    """What the parts share."""

    config: StoreConfig
    client: keys.Client
    credentials: Credentials
    signatures: Signatures
    catalog: Catalog
    blobs: Blobs
    holdings: EngineHoldings
    metrics: StoreMetrics
    executor: ThreadPoolExecutor
    authenticator: Authenticator


def make_core(config: StoreConfig, bases: KnownBases, stack: AsyncExitStack) -> Core:
    """Return the shared parts; the stack closes them.

    Raises:
        ColdTierError: If ``--cold-tier`` cannot be used.
        TrustFileError: If ``--trusted-signers`` cannot be used.
    """
    client = config.connect_valkey(config.redis_url)
    stack.push_async_callback(client.aclose)
    credentials = Credentials.from_file(config.credentials_file)
    pool = blocking_pool(config.redis_url, config.redis_password)
    bulk = Bulk(BulkReader(pool), BulkWriter(pool)) if pool is not None else None
    if bulk is not None:
        stack.push_async_callback(asyncio.to_thread, bulk.close)
    executor = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="store")
    # It runs in a thread, as what it waits for may wait for this event loop.
    stack.push_async_callback(asyncio.to_thread, executor.shutdown, cancel_futures=True)
    return Core(
        config=config,
        client=client,
        catalog=Catalog(
            client,
            gc_grace_s=config.gc_grace_s,
            check_name=bases.check_adapter_name,
            limit_of=adapter_bytes(config.quotas_file),
            on_disk=OnDisk(config.num_replicas),
            imports=TenantImports(client, imports_per_day(config.quotas_file)),
        ),
        credentials=credentials,
        signatures=Signatures.from_file(config.trusted_signers),
        blobs=Blobs(client, tiers_of(config, client, credentials, bulk)),
        holdings=EngineHoldings(client),
        metrics=StoreMetrics(new_registry("adapter_store")),
        executor=executor,
        authenticator=Authenticator.from_file(config.api_keys_file),
    )


def make_images(core: Core, stack: AsyncExitStack) -> ImageCache:
    """Return what makes and keeps page images, in memory and where asked for on disk; the stack closes it."""
    config = core.config
    threads = max(NUM_THREADS, min(MAX_IMAGE_THREADS, os.cpu_count() or 1))
    executor = ThreadPoolExecutor(threads, thread_name_prefix="image")
    stack.push_async_callback(asyncio.to_thread, executor.shutdown, cancel_futures=True)
    disk = None
    if config.disk_cache_dir is not None:
        disk = DiskTier(DiskIndex(config.disk_cache_dir, config.disk_cache_bytes), executor, core.metrics)
        stack.push_async_callback(disk.close)
    budget = ByteBudget(config.image_work_bytes)
    leases = DerivationLeases(core.client)
    buffers = BufferPool(max_idle_bytes=config.image_work_bytes, num_ahead=NUM_AHEAD)
    stack.push_async_callback(asyncio.to_thread, buffers.close)
    sources = ImageSources(core.blobs, core.catalog, disk, budget, executor, leases, buffers)
    return ImageCache(sources, core.metrics, budget_bytes=config.image_cache_bytes)
