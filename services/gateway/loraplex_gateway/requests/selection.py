"""Which base model and which adapter a request means."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from loraplex_common.errors import AdapterIncompatibleError

if TYPE_CHECKING:
    from loraplex_common.auth import Principal

    from loraplex_gateway.adapters.names import NameTable, ResolvedAdapter
    from loraplex_gateway.text.models import ModelCatalog, ServedModel

NAME_PATIENCE_S: Final = 0.25


async def select(
    catalog: ModelCatalog, names: NameTable, *, model: str, adapter: str, caller: Principal
) -> tuple[ServedModel, ResolvedAdapter | None]:
    """Return the base model and the adapter, None for no adapter.

    Args:
        catalog: Base models.
        names: Adapter names.
        model: The base model's name; empty means the adapter's or, without an adapter, the only one.
        adapter: As `NameTable.resolve` takes it; empty means none.
        caller: The principal that asks.

    Raises:
        InvalidParameterError: If a name is malformed, or both are empty and several base models are served.
        AdapterNotFoundError: And the other refusals of `NameTable.resolve`.
        ModelNotFoundError: If there is no such base model.
        AdapterIncompatibleError: If the adapter is for another base model.
    """
    if not adapter:
        return catalog.select(model), None
    resolved = await names.resolve(adapter, caller=caller, patience_s=NAME_PATIENCE_S)
    own = catalog.by_fingerprint(resolved.base_fingerprint)
    wanted = catalog.select(model) if model else own
    # Compared by what they are: one model may be served under two names.
    if wanted is not None and wanted.fingerprint == resolved.base_fingerprint:
        return wanted, resolved
    known = ", ".join(served.name for served in catalog.models) if wanted is None else wanted.name
    made_for = f"{own.name}, another base model" if own else f"fingerprint {resolved.base_fingerprint[:12]}"
    remedy = (
        ""
        if own
        else (
            "; if that is an earlier state of it, or was imported before fingerprints covered the weights, import the "
            "adapter again"
        )
    )
    raise AdapterIncompatibleError(
        f"adapter {adapter!r} was made for {made_for}, not for {known}{remedy}",
        metadata={"adapter": adapter, "base_fingerprint": resolved.base_fingerprint},
    )
