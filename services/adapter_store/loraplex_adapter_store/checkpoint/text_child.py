"""Compares untrusted texts with the base model's, in a process of its own: see `text_check`.

Standard input is a line of JSON, then the files' bytes one after another; standard output is the verdict as JSON:
``error`` and ``message``, or what the files bring.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import IO, Any

from loraplex_common.errors import AdapterCorruptUploadError, AdapterIncompatibleError

from loraplex_adapter_store.checkpoint.tokenizer_files import check_tokenizer_files


def verdict(stream: IO[bytes]) -> dict[str, Any]:
    """Read the question and return the error's class and message, or the fields of a `BroughtTexts`."""
    question = json.loads(stream.readline())
    files = {name: stream.read(num_bytes) for name, num_bytes in question["files"]}
    try:
        brought = check_tokenizer_files(files, Path(question["base_directory"]))
    except (AdapterIncompatibleError, AdapterCorruptUploadError) as error:
        return {"error": type(error).__name__, "message": error.message}
    return {
        "parts": brought.parts.to_fields(),
        "template_file": brought.template_file,
        "special_tokens": dict(brought.special_tokens),
        "warnings": brought.warnings,
    }


if __name__ == "__main__":
    print(json.dumps(verdict(sys.stdin.buffer)))
