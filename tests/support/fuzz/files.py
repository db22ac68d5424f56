"""Files of strangers: what reads a checkpoint, a canonical form, a file of the disk cache, an image's description, a signature."""

from __future__ import annotations

import asyncio
import hashlib
import json
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from random import Random
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from loraplex_adapter_store.bases import KnownBases
from loraplex_adapter_store.disk.cache_file import MAGIC
from loraplex_adapter_store.disk.disk_index import DiskIndex
from loraplex_adapter_store.disk.disk_tier import DiskTier
from loraplex_adapter_store.imports.checker import CheckpointChecker
from loraplex_adapter_store.imports.files import from_contents
from loraplex_adapter_store.measures import measure
from loraplex_adapter_store.metrics import StoreMetrics
from loraplex_adapter_store.page_image import Image, ImageKey
from loraplex_adapter_store.signatures.bundles import NotTrustedError, statement_of
from loraplex_adapter_store.signatures.check import Signatures
from loraplex_adapter_store.signatures.trust import Signer
from loraplex_common.adapter_image import AdapterSpec, layout
from loraplex_common.base_model import load_base_model
from loraplex_common.errors import LoraplexError
from loraplex_common.exposition import new_registry
from loraplex_common.tree_digest import piece_digests, tree_root
from support.adapters import Recipe, adapter_files
from support.fuzz.mutations import mutated_bytes, mutated_canonical, mutated_json, mutated_safetensors, mutated_text
from support.model_signatures import key, signed
from support.store_rig import tiny_base_dir
from support.waiting import eventually

if TYPE_CHECKING:
    from pathlib import Path

    from loraplex_adapter_store.checkpoint.canonical import CanonicalForm

CONFIG, WEIGHTS, SIGNATURE = "adapter_config.json", "adapter_model.safetensors", "model.sig"
RECIPES: Final = (Recipe(), Recipe(seed=1, rank=2), Recipe(seed=2, dtype="bfloat16"))


@dataclass(frozen=True)
class Target:
    """Something that reads.

    Attributes:
        read: Reads one input; returns how it ended, and raises only what is a bug.
        corpus: Valid inputs.
        mutate: Changes one of them.
    """

    name: str
    read: Callable[[bytes], str]
    corpus: list[bytes]
    mutate: Callable[[Random, bytes, list[bytes]], bytes]


class FileTargets:
    """The targets that read files, in this process.

    Args:
        directory: An empty directory.
    """

    def __init__(self, directory: Path) -> None:
        self._loop = asyncio.new_event_loop()
        self._executor = ThreadPoolExecutor(1)
        self._bases = KnownBases.load((tiny_base_dir(),), name=None, aliases=(), text_only=False)
        self._checker = CheckpointChecker(self._bases, lambda: (), lambda _: {}, self._executor, Signatures())
        self._files = [adapter_files(tiny_base_dir(), recipe) for recipe in RECIPES]
        self._forms = [self._loop.run_until_complete(self._check(files)) for files in self._files]
        self._geometry = load_base_model(tiny_base_dir()).geometry(dtype="float32", page_bytes=4096)
        self._image_key = ImageKey("f" * 64, self._geometry, 0)
        self._disk = directory / "cache"
        index = DiskIndex(self._disk, 2**30)
        self._index, self._tier = index, DiskTier(index, self._executor, StoreMetrics(new_registry("adapter_store")))

    def close(self) -> None:
        """Let go of threads and files."""
        self._loop.run_until_complete(self._tier.close())
        self._executor.shutdown()
        self._loop.close()

    def targets(self) -> list[Target]:
        """Return them."""
        canonical = [b"".join(form.chunks()) for form in self._forms]
        signatures = [signed(files, key("fuzz"))[SIGNATURE] for files in self._files]
        specs = [form.spec.to_json() for form in self._forms]
        return [
            Target("safetensors", self._read_weights, [each[WEIGHTS] for each in self._files], mutated_safetensors),
            Target("adapter_config", self._read_config, [each[CONFIG] for each in self._files], mutated_text),
            Target("canonical form", self._read_canonical, canonical, mutated_canonical),
            Target("image description", self._read_spec, specs, mutated_text),
            Target("cache file", self._read_cache_file, [self._cache_file()], _mutated_cache_file),
            Target("signature", self._read_signature, signatures, mutated_text),
        ]

    async def _check(self, contents: dict[str, bytes]) -> CanonicalForm:
        return await self._checker.check(from_contents(contents, "upload"), "")

    def _read(self, **contents: bytes) -> str:
        try:
            self._loop.run_until_complete(self._check(self._files[0] | contents))
        except LoraplexError as error:
            if error.reason == "INTERNAL":
                raise
            return error.reason
        return "OK"

    def _read_weights(self, data: bytes) -> str:
        return self._read(**{WEIGHTS: data})

    def _read_config(self, data: bytes) -> str:
        return self._read(**{CONFIG: data})

    def _read_canonical(self, data: bytes) -> str:
        """Read it as if it had been stored: its digest is right, so only a newer version can have written it."""
        try:
            measure(data, hashlib.sha256(data).hexdigest())
        except (
            LoraplexError,
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
            struct.error,
            RecursionError,
        ) as error:
            return type(error).__name__
        return "OK"

    def _read_spec(self, data: bytes) -> str:
        try:
            layout(self._geometry, AdapterSpec.from_json(data).sizes)
        except (ValueError, KeyError, TypeError) as error:  # as an engine does
            return type(error).__name__
        return "OK"

    def _cache_file(self) -> bytes:
        image = Image(self._forms[0].spec, "base", np.zeros((3, 4096), dtype=np.uint8), "")
        image = replace(image, tree_sha256=tree_root([b"".join(piece_digests(page.data) for page in image.pages)]))

        async def write() -> None:
            self._tier.keep_image(self._image_key, image)
            await eventually(self._index.files)

        self._loop.run_until_complete(write())
        self._cache_path = self._disk / self._index.files()[0][0]
        return self._cache_path.read_bytes()

    def _read_cache_file(self, data: bytes) -> str:
        path = self._cache_path
        path.unlink(missing_ok=True)
        path.write_bytes(data)
        self._index.add(path.name, len(data))
        image = self._loop.run_until_complete(self._tier.image(self._image_key))
        if image is None:
            assert not path.exists(), "a damaged file stays"
            return "damaged"
        image.pages.sum()
        return "OK"

    def _read_signature(self, data: bytes) -> str:
        try:
            statement_of(data, Signer(name="fuzz", public_key=key("fuzz").public_pem.encode()))
        except NotTrustedError:
            return "not trusted"
        return "OK"


def _mutated_cache_file(rng: Random, data: bytes, corpus: list[bytes]) -> bytes:
    """Change bytes, or the header with its digest made right again."""
    if rng.random() < 0.3:
        return mutated_bytes(rng, data, corpus)
    start = len(MAGIC) + 4
    (length,) = struct.unpack_from("<I", data, len(MAGIC))
    text = json.dumps(mutated_json(rng, json.loads(data[start : start + length]))).encode()
    head: Any = MAGIC + struct.pack("<I", len(text)) + text + hashlib.sha256(text).digest()
    return bytes(head + bytes(-len(head) % 4096) + data[-3 * 4096 :])
