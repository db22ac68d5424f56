"""A report as a store sends it."""

from __future__ import annotations

from loraplex.v1.adapter_store_pb2 import AdapterReport


def adapter_report() -> AdapterReport:
    """Return one with a base norm that is known, one that is not, and magnitudes."""
    pair = AdapterReport.Part(kind="low_rank", size=8, scale=2.0, norm=1.5, largest=0.5)
    compared = AdapterReport.Part(relative_norm=0.25)
    compared.MergeFrom(pair)
    magnitudes = AdapterReport.Part(kind="out_vector", size=1, largest=3.0, magnitude=True)
    return AdapterReport(
        notes=AdapterReport.ImportNotes(
            method="LORA",
            rules=["read as MLX-LM [writes] it"],
            folded=["nothing"],
            warnings=["odd"],
            num_omitted=2,
        ),
        modules=[
            AdapterReport.Module(layer=0, projection="q_proj", parts=[compared], base_norm=6.0),
            AdapterReport.Module(layer=0, projection="v_proj", parts=[pair, magnitudes]),
        ],
        images=[
            AdapterReport.Image(dtype="bfloat16", page_bytes=2 << 20, tp_degree=2, num_pages=3, num_bytes=6 << 20),
        ],
    )
