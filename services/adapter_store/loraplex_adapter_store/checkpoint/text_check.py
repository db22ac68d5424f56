"""Examines untrusted texts beside an adapter in child processes, with their share of time and memory.

Reading such a file compiles its patterns (Oniguruma) and parses its templates (Jinja), and a chat template is a program;
either may take any time and memory. Files that equal the base model's byte by byte need no child; verdicts are
remembered.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from loraplex_common.errors import AdapterCorruptUploadError, AdapterIncompatibleError
from loraplex_common.text_parts import TextParts

from loraplex_adapter_store.checkpoint.adapter_texts import BroughtTexts
from loraplex_adapter_store.checkpoint.base_tokenizer import files_state
from loraplex_adapter_store.checkpoint.bounds import TEMPLATE_SHARE, TOKENIZER_SHARE, VERDICTS_KEPT

if TYPE_CHECKING:
    from collections.abc import Mapping

    from loraplex_adapter_store.checkpoint.bounds import Share
    from loraplex_adapter_store.checkpoint.confinement import Confinement, Outcome

_CHILD: Final = Path(__file__).with_name("text_child.py")
_TRIAL: Final = Path(__file__).with_name("template_trial.py")
_ERRORS: Final = {cls.__name__: cls for cls in (AdapterIncompatibleError, AdapterCorruptUploadError)}
_verdicts: OrderedDict[str, dict[str, Any]] = OrderedDict()
_lock: Final = threading.Lock()


def check_strange_texts(
    files: Mapping[str, bytes], base_directory: Path, confinement: Confinement, *, share: Share = TOKENIZER_SHARE
) -> BroughtTexts:
    """Compare the texts beside an adapter with its base model's, and return what they bring of their own; blocks.

    Args:
        files: The same as for `check_tokenizer_files`.
        base_directory: The base model's files.
        confinement: Owner of the child processes.
        share: Resources of the child that compares.

    Raises:
        AdapterIncompatibleError: In the cases of `check_tokenizer_files`; if reading takes too long or too much memory;
            if a chat template renders no conversation, leaves the sandbox, or takes or writes too much.
        AdapterCorruptUploadError: In the cases of `check_tokenizer_files`.
        ConfinementClosedError: If the import has ended.
    """
    if all(_is_same(base_directory / name, data) for name, data in files.items()):
        return BroughtTexts(TextParts())
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
    if "error" in found:
        raise _ERRORS[found["error"]](found["message"])
    return BroughtTexts(
        TextParts.from_fields(found["parts"]),
        found["template_file"],
        found["special_tokens"],
        tuple(found["warnings"]),
    )


def _ask(pieces: list[bytes], confinement: Confinement, share: Share) -> dict[str, Any]:
    outcome = confinement.run(_CHILD, pieces, share, needs_packages=True)
    if outcome.end != "done":
        raise AdapterIncompatibleError(
            f"tokenizer files beside the adapter: comparing them with the base model's takes more than "
            f"{_taken(outcome, share)}. Adapters are served with the base model's tokenizer; remove the files if the adapter "
            "does not depend on them"
        )
    found: dict[str, Any] = json.loads(outcome.output)
    if "parts" in found and (template := found["parts"].get("chat_template")):
        _try(template, found["template_file"], found["special_tokens"], confinement)
    return found


def _try(template: str, file: str, special_tokens: Mapping[str, str], confinement: Confinement) -> None:
    question = json.dumps({"source": template, "special_tokens": special_tokens}).encode()
    outcome = confinement.run(_TRIAL, [question], TEMPLATE_SHARE, needs_packages=True)
    if outcome.end != "done":
        raise AdapterIncompatibleError(
            f"{file} beside the adapter: its chat template takes more than {_taken(outcome, TEMPLATE_SHARE)} for a "
            "conversation of a few words"
        )
    if problem := json.loads(outcome.output)["problem"]:
        raise AdapterIncompatibleError(f"{file} beside the adapter: its chat template cannot be served: {problem}")


def _taken(outcome: Outcome, share: Share) -> str:
    return f"{share.time_s:g} s" if outcome.end == "time" else f"{share.memory_bytes // 2**20} MiB of memory"


def _is_same(path: Path, data: bytes) -> bool:
    return path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data


def _digest(pieces: list[bytes]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()
