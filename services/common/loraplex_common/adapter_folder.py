"""What a PEFT adapter's folder contains, and what another folder is instead; client and store use the same words."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from loraplex_common.errors import AdapterCorruptUploadError, AdapterIncompatibleError, LoraplexError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable
    from pathlib import Path

CONFIG_FILE: Final = "adapter_config.json"
WEIGHTS_FILE: Final = "adapter_model.safetensors"
WEIGHTS_FILES: Final = (WEIGHTS_FILE, "adapters.safetensors")
"""Names of the file with the weights: PEFT's, then MLX-LM's. The first that a folder has is read."""
TOKENIZER_FILES: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
GENERATION_FILE: Final = "generation_config.json"
TEXT_FILES: Final = (*TOKENIZER_FILES, GENERATION_FILE)
READ_FILES: Final = (CONFIG_FILE, *WEIGHTS_FILES, *TEXT_FILES)
SIGNATURE_FILE: Final = "model.sig"
"""The signature of a folder, as OpenSSF's model signing names it; not a part of the adapter."""
PICKLE_SUFFIXES: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
MAX_LISTED: Final = 2000
MAX_DEPTH: Final = 2
_MAX_NAMED: Final = 5

_PICKLED: Final = (
    "pickled weights are never read, because reading them runs code; save the adapter as "
    f"{WEIGHTS_FILE} (PEFT: save_pretrained with safe_serialization)"
)
# (pattern of a file's path, what the folder is, the remedy); the first match is used. PATH in a text is the file's
# path.
_KINDS: Final = tuple(
    (re.compile(pattern), text)
    for pattern, text in (
        (
            r"adapter_model-\d+-of-\d+\.safetensors|adapter_model\.safetensors\.index\.json",
            f"PATH: a sharded adapter is not read; load its shards with safetensors and save them as one {WEIGHTS_FILE}",
        ),
        (
            r"\d+_adapters\.safetensors",
            f"PATH: weights that MLX-LM saved in between; rename the file to adapters.safetensors beside {CONFIG_FILE}",
        ),
        (
            r"(?i).*\.gguf",
            "PATH: a GGUF file (llama.cpp) is not read; import the PEFT folder that it was converted from",
        ),
        (
            r"(.*/)?pytorch_model_fsdp[^/]*(/.*)?|.*\.distcp",
            "PATH: a checkpoint of FSDP's shards is not read; merge it (accelerate merge-weights), load it into the PEFT "
            "model and call save_pretrained",
        ),
        (
            r"(.*/)?(zero_to_fp32\.py|(bf16_)?zero_pp_rank_.*|mp_rank_\d+_model_states\.pt)",
            "PATH: a checkpoint of DeepSpeed's shards is not read; gather it (zero_to_fp32.py), load it into the PEFT model "
            "and call save_pretrained",
        ),
        (r"pytorch_lora_weights\.safetensors", "PATH: a LoRA of a diffusion model (diffusers) is not served"),
        (r"lit_model\.pth.*", "PATH: a LitGPT checkpoint is not read; convert it to a PEFT folder"),
        (r"(?i)adapter[^/]*(" + "|".join(map(re.escape, PICKLE_SUFFIXES)) + ")", f"PATH: {_PICKLED}"),
        (
            r"(model|consolidated|pytorch_model)[^/]*\.(safetensors|bin|pth)(\.index\.json)?",
            "PATH: a whole model, not an adapter; serve it as a base model (--model), or import the adapter as it was before "
            "it was merged",
        ),
        (r"(?i)[^/]*(" + "|".join(map(re.escape, PICKLE_SUFFIXES)) + ")", f"PATH: {_PICKLED}"),
        (
            r"(?i)[^/]*\.(zip|tar|tgz|tar\.\w+|7z)",
            "PATH: an archive is not read; unpack it and import the folder inside",
        ),
    )
)
# First bytes of files that are something else than the safetensors file they should be.
_MAGIC: Final = (
    (
        b"version https://git-lfs.github.com/spec/",
        "only git-lfs's pointer to the file, not its content; fetch it (git lfs pull) and import again",
    ),
    (b"GGUF", "a GGUF file (llama.cpp); import the PEFT folder that it was converted from"),
    (b"PK\x03\x04", f"a pickle; {_PICKLED}"),
    (b"\x80\x02}", f"a pickle; {_PICKLED}"),
    (b"\x1f\x8b", "an archive; unpack it and import the folder inside"),
)
_PAGES: Final = (b"<!doctype html", b"<html", b"<?xml")  # upper or lower case, after a byte order mark or blank lines
_BLANK: Final = b"\xef\xbb\xbf \t\r\n"


def check_present(names: Iterable[str]) -> list[str]:
    """Return which files of a folder are to be read.

    Args:
        names: The folder's files; files of folders inside it as ``folder/file``.

    Raises:
        AdapterIncompatibleError: If config or weights are missing and the folder is something else that is known.
        AdapterCorruptUploadError: If they are missing.
    """
    present = set(names)
    weights = next((name for name in WEIGHTS_FILES if name in present), None)
    if weights is None or CONFIG_FILE not in present:
        raise diagnose(present)
    return [name for name in READ_FILES if name in present and (name == weights or name not in WEIGHTS_FILES)]


def check_present_signed(names: Iterable[str], *, signature: bool) -> list[str]:
    """Return what `check_present` does, with the folder's signature behind it if it is wanted and there.

    Raises:
        LoraplexError: In the cases of `check_present`.
    """
    listed = list(names)
    return check_present(listed) + [SIGNATURE_FILE] * (signature and SIGNATURE_FILE in listed)


def diagnose(names: Collection[str]) -> LoraplexError:
    """Say what a folder is that lacks an adapter's config or weights.

    Args:
        names: The same as for `check_present`.
    """
    inner = sorted(
        {folder for folder, _, name in (name.rpartition("/") for name in names) if folder and name in WEIGHTS_FILES}
    )
    inner = [folder for folder in inner if f"{folder}/{CONFIG_FILE}" in names]
    if inner:
        shown = ", ".join(inner[:_MAX_NAMED]) + (", ..." if len(inner) > _MAX_NAMED else "")
        return AdapterCorruptUploadError(
            f"{CONFIG_FILE} and {WEIGHTS_FILE} are not in this folder but in {shown}: import that folder"
        )
    has_weights = any(name in names for name in WEIGHTS_FILES)
    if not has_weights:
        for pattern, text in _KINDS:
            found = min((name for name in names if pattern.fullmatch(name)), default=None)
            if found is not None:
                return AdapterIncompatibleError(text.replace("PATH", found[:200]))
    missing = [name for name, found in ((CONFIG_FILE, CONFIG_FILE in names), (WEIGHTS_FILE, has_weights)) if not found]
    return AdapterCorruptUploadError(
        f"no PEFT adapter: {' and '.join(missing)} {'are' if missing[1:] else 'is'} missing"
    )


def explain_content(data: bytes | bytearray | memoryview) -> str | None:
    """Return what a file is, if its first bytes show that it is not what it should be."""
    start = bytes(data[:256])
    if start.lstrip(_BLANK).lower().startswith(_PAGES):
        return "a web page, as a download without access brings; fetch the file again"
    return next((text for magic, text in _MAGIC if start.startswith(magic)), None)


def list_folder(directory: Path) -> list[str]:
    """Return the files of a folder and of the folders inside it, in the form for `check_present`.

    Folders inside are read only to name what is there: down to `MAX_DEPTH`, and `MAX_LISTED` files.

    Raises:
        OSError: If the folder cannot be read.
    """
    entries = sorted(directory.iterdir())
    names = [entry.name for entry in entries if entry.is_file()]
    waiting = [(entry, 1) for entry in entries if _is_inside(entry)]
    inner: list[str] = []
    while waiting and len(inner) < MAX_LISTED:
        folder, depth = waiting.pop(0)
        try:
            entries = sorted(folder.iterdir())
        except PermissionError:
            continue  # a folder that cannot be read is not this adapter's
        inner += [entry.relative_to(directory).as_posix() for entry in entries if entry.is_file()]
        if depth < MAX_DEPTH:
            waiting += [(entry, depth + 1) for entry in entries if _is_inside(entry)]
    return names + inner[:MAX_LISTED]


def _is_inside(entry: Path) -> bool:
    return entry.is_dir() and not entry.is_symlink()
