"""Where canonical blobs lie, by the configuration."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from loraplex_common.errors import InvalidParameterError, LoraplexError
from loraplex_common.housekeeping import until_done
from loraplex_common.service_settings import refuse_cluster

from loraplex_adapter_store.repository.blob_tier import BlobTier, Bulk, ValkeyTier
from loraplex_adapter_store.repository.hot_tier import ColdTierError, HotTier, settle_place
from loraplex_adapter_store.repository.object_tier import ObjectTier

if TYPE_CHECKING:
    from loraplex_common.tasks import Supervisor

    from loraplex_adapter_store.config import StoreConfig
    from loraplex_adapter_store.credentials import Credentials
    from loraplex_adapter_store.repository import keys


def tiers_of(
    config: StoreConfig, client: keys.Client, credentials: Credentials, bulk: Bulk | None
) -> tuple[BlobTier, ...]:
    """Return the tiers, the nearest first.

    Raises:
        ColdTierError: If the cold tier cannot be used as it is configured.
    """
    if config.cold_tier is None:
        return (ValkeyTier(client, bulk),)
    try:
        cold = ObjectTier(config.cold_tier, credentials)
    except (InvalidParameterError, ValueError) as error:
        raise ColdTierError(f"--cold-tier: {error}") from error
    return HotTier(client, budget_bytes=config.hot_bytes), cold


async def find_adapters(config: StoreConfig, client: keys.Client, supervisor: Supervisor) -> None:
    """Find out whether Valkey can be used, and its adapters lie where this store looks; later, if Valkey is away.

    Raises:
        ColdTierError: If they lie elsewhere. The service ends with it if that is found out later.
        UnservedValkeyError: If Valkey is a cluster.
    """
    await refuse_cluster(client)
    settle = partial(settle_place, client, str(config.cold_tier or ""))
    try:
        await settle()
    except LoraplexError:
        supervisor.spawn_once(until_done(settle, name="look for the adapters"), name="tiers")
