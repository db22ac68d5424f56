"""Which base model and which adapters a request means."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from loraplex_common.errors import AdapterIncompatibleError, InvalidParameterError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from loraplex_common.auth import Principal

    from loraplex_gateway.adapters.names import NameTable, ResolvedAdapter
    from loraplex_gateway.text.models import ModelCatalog, ServedModel

NAME_PATIENCE_S: Final = 0.25


async def select(
    catalog: ModelCatalog,
    names: NameTable,
    *,
    model: str,
    adapters: Mapping[str, str],
    caller: Principal,
    sticky_key: str = "",
    local_names: Mapping[str, str] | None = None,
) -> tuple[ServedModel, tuple[ResolvedAdapter, ...]]:
    """Return the base model and the adapters, all labels as they are at one moment.

    Args:
        catalog: Base models.
        names: Adapter names.
        model: The base model's name; empty means the adapters' or, without an adapter, the only one.
        adapters: Adapters, as `NameTable.resolve_all` takes them; empty means none.
        caller: The principal that asks.
        local_names: The same with names in the place of sources, see `SourceResolver.names_of`; None if there are no sources.
        sticky_key: What a split label's revision is chosen by, as `NameTable.resolve_all` takes it.

    Raises:
        InvalidParameterError: If a name is malformed, two names mean one revision, or all names are empty and several base
            models are served.
        AdapterNotFoundError: And the other refusals of `NameTable.resolve_all`.
        ModelNotFoundError: If there is no such base model.
        AdapterIncompatibleError: If an adapter is for another base model.
    """
    if not adapters:
        return catalog.select(model), ()
    resolved = await names.resolve_all(
        local_names or adapters, caller=caller, patience_s=NAME_PATIENCE_S, sticky_key=sticky_key
    )
    _check_distinct(adapters, resolved)
    wanted = catalog.select(model) if model else catalog.by_fingerprint(resolved[0].base_fingerprint)
    for text, adapter in zip(adapters.values(), resolved, strict=True):
        # Compared by what they are: one model may be served under two names.
        if wanted is None or wanted.fingerprint != adapter.base_fingerprint:
            raise _incompatible(catalog, text, adapter, wanted)
    assert wanted is not None  # there is an adapter
    return wanted, resolved


def _check_distinct(adapters: Mapping[str, str], resolved: tuple[ResolvedAdapter, ...]) -> None:
    seen: dict[str, str] = {}
    for (field, text), adapter in zip(adapters.items(), resolved, strict=True):
        if adapter.digest in seen:
            raise InvalidParameterError(
                f"{field} {text!r} is revision {adapter.digest[:12]}, as {seen[adapter.digest]!r} is: name it once and add "
                "their weights",
                field=field,
            )
        seen[adapter.digest] = text


def _incompatible(
    catalog: ModelCatalog, text: str, adapter: ResolvedAdapter, wanted: ServedModel | None
) -> AdapterIncompatibleError:
    own = catalog.by_fingerprint(adapter.base_fingerprint)
    known = ", ".join(served.name for served in catalog.models) if wanted is None else wanted.name
    made_for = f"{own.name}, another base model" if own else f"fingerprint {adapter.base_fingerprint[:12]}"
    remedy = (
        ""
        if own
        else (
            "; if that is an earlier state of it, or was imported before fingerprints covered the weights, import the "
            "adapter again"
        )
    )
    return AdapterIncompatibleError(
        f"adapter {text!r} was made for {made_for}, not for {known}{remedy}",
        metadata={"adapter": text, "base_fingerprint": adapter.base_fingerprint},
    )
