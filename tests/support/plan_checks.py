"""What every plan must keep to by itself, and beside steps that are under way: the checks of `FakeRunner` that need no state of it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from loraplex_engine.step import FROM_DEVICE, NO_ADAPTER, StepPlan

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray


class PlanError(AssertionError):
    """A plan breaks the contract of step.py."""


def require(condition: bool, message: str) -> None:
    """Raise PlanError unless the condition holds."""
    if not condition:
        raise PlanError(message)


def check_shapes(plan: StepPlan, max_num_batched_tokens: int) -> None:
    """Raise PlanError unless the fields of a plan fit each other and the budget of tokens."""
    num_rows = len(plan.slots)
    require(num_rows > 0 and len(set(plan.slots.tolist())) == num_rows, f"slots {plan.slots} are empty or repeat")
    for name in ("num_tokens", "starts", "adapters", "adapter_scales"):
        require(len(getattr(plan, name)) == num_rows, f"{name} has another length than slots")
    require(len(plan.block_tables) == num_rows, "block_tables has another length than slots")
    for name in ("slots", "num_tokens", "starts", "token_ids", "block_tables", "adapters", "sample_rows"):
        require(getattr(plan, name).dtype == np.int32, f"{name} is not int32")
    require(int(plan.num_tokens.sum()) == len(plan.token_ids), "token_ids does not match num_tokens")
    require(len(plan.token_ids) <= max_num_batched_tokens, f"{len(plan.token_ids)} tokens exceed the budget")
    require(bool((plan.num_tokens > 0).all()), "a row computes nothing")
    more = plan.more_adapters
    require(len(more.rows) == len(more.adapters) == len(more.scales), "more_adapters differ in length")
    require(bool((np.diff(more.rows) >= 0).all()), "rows of more_adapters do not rise")
    require(bool((plan.adapters[more.rows] != NO_ADAPTER).all()), "a row without an adapter has more of them")
    require(all(len(set(i)) == len(i) for i in map(partial(indices_of_row, plan), range(num_rows))), "one comes twice")
    decode = plan.num_decode_rows
    require(bool((plan.num_tokens[:decode] == 1).all()), "a decode row has not one token")
    require(bool((plan.token_ids[:decode] == FROM_DEVICE).all()), "a decode row has a token of the host")
    require(bool((plan.token_ids[decode:] >= 0).all()), "a prefill row lacks a token")
    require(set(range(decode)) <= set(plan.sample_rows.tolist()), "a decode row is not sampled")
    require(bool((plan.masked < len(plan.sample_rows)).all()), "a masked row does not sample")
    for name in plan.sampling.__dataclass_fields__:
        require(len(getattr(plan.sampling, name)) == len(plan.sample_rows), f"sampling.{name} has another length")


def check_pages(
    plan: StepPlan, launched: Sequence[StepPlan], adapter_pages: Iterable[NDArray[np.int32]], block_tokens: int
) -> None:
    """Raise PlanError unless a plan's pages are its own, beside those of steps under way and of adapters."""
    used = plan.block_tables[plan.block_tables >= 0]
    needed = -(-(plan.starts + plan.num_tokens) // block_tokens)
    covered = (plan.block_tables >= 0).sum(axis=1)
    require(bool((covered >= needed).all()), f"block tables cover {covered} blocks, {needed} are needed")
    pages, counts = np.unique(used, return_counts=True)
    shared = set(pages[counts > 1].tolist())
    for page, _, is_read_only in page_uses(plan, block_tokens):
        require(page not in shared or is_read_only, f"page {page} is in two rows and written by one")
    for pages_of_one in adapter_pages:
        require(not np.isin(used, pages_of_one).any(), "a KV page belongs to an adapter")
    begun = {setup.slot for setup in plan.setups}
    for step in launched:
        readers = {page: (slot, is_read_only) for page, slot, is_read_only in page_uses(step, block_tokens)}
        for page, slot, is_read_only in page_uses(plan, block_tokens):
            if page in readers:
                reader, was_read_only = readers[page]
                goes_on = reader == slot and slot not in begun
                both_read = is_read_only and was_read_only
                require(goes_on or both_read, f"page {page} is reused while a step reads it")


def page_uses(plan: StepPlan, block_tokens: int) -> list[tuple[int, int, bool]]:
    """Return (page, slot, whether the step only reads it) for all pages of a plan."""
    uses = []
    for slot, start, table in zip(plan.slots.tolist(), plan.starts.tolist(), plan.block_tables, strict=True):
        for block, page in enumerate(table[table >= 0].tolist()):
            uses.append((page, slot, (block + 1) * block_tokens <= start))
    return uses


def indices_of_row(plan: StepPlan, row: int) -> list[int]:
    """Return the table entries of the adapters that a row adds up, in order."""
    if plan.adapters[row] == NO_ADAPTER:
        return []
    more: list[int] = plan.more_adapters.adapters[plan.more_adapters.rows == row].tolist()
    return [int(plan.adapters[row]), *more]


def indices_of(plan: StepPlan) -> set[int]:
    """Return the table entries of all adapters of a plan."""
    return {*plan.adapters.tolist(), *plan.more_adapters.adapters.tolist()} - {NO_ADAPTER}
