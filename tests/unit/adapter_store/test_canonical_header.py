"""The header of a canonical form is read once for all adapters that have the same."""

from __future__ import annotations

import functools
import json

import numpy as np
import pytest
from loraplex_adapter_store.checkpoint.canonical import CanonicalForm, CanonicalReader, canonicalise, read_canonical
from loraplex_adapter_store.checkpoint.canonical_header import read_header
from loraplex_adapter_store.checkpoint.reader import read_checkpoint
from loraplex_common.base_model import load_base_model
from loraplex_common.errors import AdapterCorruptUploadError
from support.adapters import Recipe, adapter_files
from support.store_rig import tiny_base_dir


@functools.cache
def form(seed: int, rank: int = 4) -> CanonicalForm:
    files = adapter_files(tiny_base_dir(), Recipe(rank=rank, seed=seed))
    base = load_base_model(tiny_base_dir())
    return canonicalise(
        read_checkpoint(
            files["adapter_config.json"], files["adapter_model.safetensors"], base, base_dir=tiny_base_dir()
        )
    )


def data_of(source: CanonicalForm) -> bytearray:
    return bytearray(b"".join(source.chunks()))


def test_adapters_that_were_trained_alike_share_a_header_and_no_values() -> None:
    one, two = data_of(form(1)), data_of(form(2))

    assert read_header(memoryview(one)) is read_header(memoryview(two))
    assert read_header(memoryview(one)) is not read_header(memoryview(data_of(form(1, rank=8))))
    first, second = (read_canonical(data, source.revision) for data, source in ((one, form(1)), (two, form(2))))
    assert (first.spec.digest, second.spec.digest) == (form(1).revision, form(2).revision)
    key = next(iter(first.tensors))
    assert not np.array_equal(first.tensors[key][0], second.tensors[key][0])


def test_a_layer_needs_the_bytes_up_to_its_last_tensor_and_no_more() -> None:
    data = data_of(form(1))
    reader = CanonicalReader(memoryview(data), form(1).revision)
    expected = reader.layer(0)

    for layer, needed in reader.bytes_needed.items():
        cut = data.copy()
        cut[needed:] = bytes(len(data) - needed)
        _, tensors = CanonicalReader(memoryview(cut), form(1).revision).layer(layer)
        whole = reader.layer(layer)[1]
        assert all(np.array_equal(a, b) for key in whole for a, b in zip(tensors[key], whole[key], strict=True))
    assert reader.layer(0)[0] == expected[0]
    assert max(reader.bytes_needed.values()) == len(data)


def test_the_same_header_over_fewer_bytes_is_refused() -> None:
    data = data_of(form(1))
    read_header(memoryview(data))

    with pytest.raises(AdapterCorruptUploadError, match="lie outside the"):
        read_header(memoryview(data)[:-4])


def test_a_header_that_was_refused_is_refused_again() -> None:
    config = json.dumps({"base": "b", "modules": []})
    header = {"__metadata__": {"loraplex": config}, "a": {"dtype": "BF16", "shape": [3], "data_offsets": [0, 4]}}
    text = json.dumps(header).encode()
    data = bytearray(len(text).to_bytes(8, "little") + text + bytes(4))

    for _ in range(2):
        with pytest.raises(AdapterCorruptUploadError, match="do not hold shape"):
            read_header(memoryview(data))
