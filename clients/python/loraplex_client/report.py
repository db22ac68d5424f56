"""What an adapter is made of: the report of an adapter store, free of wire types."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Final

JSON_FORMAT: Final = 1
"""Rises if a field of `AdapterReport.to_dict` changes its meaning or goes; new fields leave it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportPart:
    """One part of a module.

    Attributes:
        kind: ``low_rank``, ``out_vector``, ``in_vector``, ``bias``, ``sparse_delta`` or ``flora``.
        size: Rank of a pair or of FLoRA, non-zeros of a sparse delta; 1 for a vector.
        scale: Factor on what a pair or a sparse delta adds; None for other kinds.
        norm: Frobenius norm of what it adds, the scale included; None for factors.
        relative_norm: ``norm`` divided by that of the base's weight; None where it is not known or means nothing.
        largest: Largest magnitude among its values, the scale left out.
        deviation: Largest distance of a factor from 1; None for what adds, and for magnitudes.
        is_magnitude: Whether it is DoRA's magnitudes, of which engines compute the factors.
    """

    kind: str
    size: int
    scale: float | None
    norm: float | None
    relative_norm: float | None
    largest: float
    deviation: float | None
    is_magnitude: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportModule:
    """One adapted projection.

    Attributes:
        layer: Decoder layer, from 0.
        projection: For example ``q_proj``.
        base_norm: Frobenius norm of the base's weight; None if no engine has reported it to the store.
        parts: At most one of each kind.
    """

    layer: int
    projection: str
    base_norm: float | None
    parts: tuple[ReportPart, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportImage:
    """The adapter as the engines of one geometry hold it, in host memory and on the device.

    Attributes:
        dtype: ``float32`` or ``bfloat16``.
        tp_degree: Tensor-parallel degree; each rank holds an image of this size.
        num_pages: Pages; 0 if it cannot be laid out.
        problem: Why it cannot be laid out; empty if it can.
    """

    dtype: str
    page_bytes: int
    tp_degree: int
    num_pages: int
    num_bytes: int
    problem: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportNotes:
    """What the import that stored the revision did and found.

    Attributes:
        method: ``peft_type``, for example ``LORA``.
        rules: The rules of dialects by which the file was read; empty for PEFT's own form.
        folded: What was folded into other values.
        warnings: The import's other warnings.
        num_omitted: Notes left out for their size.
        signer: Name of the signer of the files; empty if the store found or looked for no signature that it trusts.
    """

    method: str
    rules: tuple[str, ...]
    folded: tuple[str, ...]
    warnings: tuple[str, ...]
    num_omitted: int
    signer: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterReport:
    """The report on one revision.

    Attributes:
        name: The adapter's name, without label or revision.
        revision: Digest of the revision.
        source: Where it came from.
        canonical_bytes: Bytes that the store keeps.
        text_parts: Names of what it brings besides weights.
        invocation_token_ids: The sequence from whose last occurrence in a prompt it applies; empty: it applies to all of it.
        notes: None if the revision was stored before imports were recorded.
        images: One for each geometry among the engines of its base that are attached to the store.
        modules: By layer, then in the layer's order.
    """

    name: str
    revision: str
    base_fingerprint: str
    source: str
    canonical_bytes: int
    text_parts: tuple[str, ...]
    invocation_token_ids: tuple[int, ...]
    notes: ReportNotes | None
    images: tuple[ReportImage, ...]
    modules: tuple[ReportModule, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return it for JSON, by the names of the attributes, None where something is not known."""
        return {"format": JSON_FORMAT, **asdict(self)}
