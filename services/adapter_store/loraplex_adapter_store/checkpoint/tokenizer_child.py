"""Compares untrusted tokenizer files with the base model's, in a process of its own: see `tokenizer_check`.

Standard input is a line of JSON, then the files' bytes one after another; standard output is the verdict as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import IO

from loraplex_common.errors import AdapterCorruptUploadError, AdapterIncompatibleError

from loraplex_adapter_store.checkpoint.tokenizer_files import check_tokenizer_files


def verdict(stream: IO[bytes]) -> dict[str, str]:
    """Read the question and return the error's class and message; empty if the files are accepted."""
    question = json.loads(stream.readline())
    files = {name: stream.read(num_bytes) for name, num_bytes in question["files"]}
    try:
        check_tokenizer_files(files, Path(question["base_directory"]))
    except (AdapterIncompatibleError, AdapterCorruptUploadError) as error:
        return {"error": type(error).__name__, "message": error.message}
    return {}


if __name__ == "__main__":
    print(json.dumps(verdict(sys.stdin.buffer)))
