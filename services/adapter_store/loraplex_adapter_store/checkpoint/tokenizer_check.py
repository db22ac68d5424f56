"""Compares untrusted tokenizer files in a child process, with its share of time and memory.

Reading such a file compiles its patterns (Oniguruma) and parses its templates (Jinja), which may take any time and
memory. Files that equal the base model's byte by byte need no child; verdicts are remembered.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Final

from loraplex_common.errors import AdapterCorruptUploadError, AdapterIncompatibleError

from loraplex_adapter_store.checkpoint.base_tokenizer import files_state
from loraplex_adapter_store.checkpoint.bounds import TOKENIZER_SHARE, VERDICTS_KEPT

if TYPE_CHECKING:
    from collections.abc import Mapping

    from loraplex_adapter_store.checkpoint.bounds import Share
    from loraplex_adapter_store.checkpoint.confinement import Confinement

_CHILD: Final = Path(__file__).with_name("tokenizer_child.py")
_ERRORS: Final = {cls.__name__: cls for cls in (AdapterIncompatibleError, AdapterCorruptUploadError)}
_verdicts: OrderedDict[str, dict[str, str]] = OrderedDict()
_lock: Final = threading.Lock()


def check_strange_tokenizer(
    files: Mapping[str, bytes], base_directory: Path, confinement: Confinement, *, share: Share = TOKENIZER_SHARE
) -> None:
    """Compare the tokenizer files of an adapter with its base model's; blocks.

    Args:
        files: The same as for `check_tokenizer_files`.
        base_directory: The base model's files.
        confinement: Owner of the child process.
        share: The child's resources.

    Raises:
        AdapterIncompatibleError: In the cases of `check_tokenizer_files`; also if reading takes too long or too much
            memory.
        AdapterCorruptUploadError: In the cases of `check_tokenizer_files`.
        ConfinementClosedError: If the import has ended.
    """
    if all(_is_same(base_directory / name, data) for name, data in files.items()):
        return
    base_directory = base_directory.resolve()
    listed = [(name, len(data)) for name, data in sorted(files.items())]
    question = json.dumps({"base_directory": str(base_directory), "files": listed}).encode() + b"\n"
    pieces = [question, *(data for _, data in sorted(files.items()))]
    key = _digest([repr(files_state(base_directory)).encode(), *pieces])
    with _lock:
        found = _verdicts.get(key)
    if found is None:
        found = _ask(pieces, confinement, share)
        with _lock:
            _verdicts[key] = found
            while len(_verdicts) > VERDICTS_KEPT:
                _verdicts.popitem(last=False)
    if found:
        raise _ERRORS[found["error"]](found["message"])


def _ask(pieces: list[bytes], confinement: Confinement, share: Share) -> dict[str, str]:
    outcome = confinement.run(_CHILD, pieces, share, needs_packages=True)
    if outcome.end != "done":
        took = f"{share.time_s:g} s" if outcome.end == "time" else f"{share.memory_bytes // 2**20} MiB of memory"
        raise AdapterIncompatibleError(
            f"tokenizer files beside the adapter: comparing them with the base model's takes more than {took}. Adapters are "
            "served with the base model's tokenizer and chat template; remove the files if the adapter does not depend on them"
        )
    found: dict[str, str] = json.loads(outcome.output)
    return found


def _is_same(path: Path, data: bytes) -> bool:
    return path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data


def _digest(pieces: list[bytes]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()
