from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from support.base_models import write_base_model

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="session")
def model_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The bases of support.cuda_rig by name, ``/plain`` behind those whose next token is plain, ``/bfloat16`` those stored so."""
    pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")
    from support.cuda_rig import BASES, PLAIN_BASES

    folder = tmp_path_factory.mktemp("models")
    plain = {f"{name}/plain": base for name, base in PLAIN_BASES.items()}
    rounded = {f"{name}/bfloat16": replace(base, dtype="bfloat16") for name, base in plain.items()}
    return {name: write_base_model(folder / name, base) for name, base in (BASES | plain | rounded).items()}
