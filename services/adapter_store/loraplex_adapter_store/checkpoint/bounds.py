"""Every bound on the bytes, numbers, memory and time that an untrusted file may take from the store, in one place.

Reading such a file takes at most these amounts, whatever it contains. Sizes are compared before the file is read, JSON
is counted before it is parsed, and work of unknown length or size (regular expressions, tokenizers, templates) runs in
a child process with a `Share` (see `confinement`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from loraplex_common.errors import AdapterCorruptUploadError

if TYPE_CHECKING:
    from collections.abc import Callable

_MIB: Final = 1024 * 1024

MAX_CONFIG_BYTES: Final = 4 * _MIB
"""Bytes of adapter_config.json."""
MAX_CONFIG_VALUES: Final = 200_000
"""Values, keys not counted, in adapter_config.json: each takes some 100 bytes once it is parsed."""
MAX_GENERATION_VALUES: Final = 10_000
"""Values in generation_config.json."""
MAX_RANK: Final = 65_536
MAX_PATTERNS: Final = 16_384
"""Entries of rank_pattern, of alpha_pattern, of layers_pattern; PEFT writes at most one per module."""
MAX_PATTERN_CHARS: Final = 1000
"""Characters of one regular expression."""

MAX_HEADER_BYTES: Final = 16 * _MIB
"""Bytes of the header of a safetensors file."""
MAX_TENSORS: Final = 100_000
MAX_HEADER_VALUES: Final = 10 * MAX_TENSORS
"""Values in the header; a matrix has eight."""
MAX_DIMENSIONS: Final = 8

MAX_TOKENIZER_BYTES: Final = 64 * _MIB
"""Bytes of any one tokenizer file."""
MAX_SECTION_CHARS: Final = 64 * 1024
"""Bytes of the normaliser or the pre-tokeniser of a tokenizer.json."""
MAX_TEMPLATE_CHARS: Final = 256 * 1024
"""Bytes of a chat template."""

MAX_LISTING_BYTES: Final = 16 * _MIB
"""Bytes of a hub's list of a repository's files."""
MAX_LISTING_VALUES: Final = 1_000_000

MAX_PART_BYTES: Final = 2 * _MIB
"""Bytes of one message of an upload."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """The resources of one child process.

    Attributes:
        memory_bytes: Address space beyond what the child has when it starts.
        time_s: Wall time, and also CPU time.
        output_bytes: Length of the child's answer.
    """

    memory_bytes: int
    time_s: float
    output_bytes: int


PATTERN_SHARE: Final = Share(memory_bytes=512 * _MIB, time_s=5.0, output_bytes=16 * _MIB)
"""Share of all regular expressions of one checkpoint."""
TOKENIZER_SHARE: Final = Share(memory_bytes=2048 * _MIB, time_s=60.0, output_bytes=_MIB)
"""Share of all tokenizer files and chat templates of one checkpoint; a tokenizer.json of 17 MB takes 200 MB, twice."""
TEMPLATE_SHARE: Final = Share(memory_bytes=256 * _MIB, time_s=5.0, output_bytes=_MIB)
"""Share of the trial of a chat template that an adapter brings."""
MAX_RENDERED_CHARS: Final = 1024 * 1024
"""Characters that such a template may write for one of the trial's conversations, which have a few words."""
VERDICTS_KEPT: Final = 256
"""Sets of tokenizer files whose verdict is remembered."""
MAX_CHILDREN: Final = 2
"""Concurrent child processes of all imports together."""


def parse_json(data: bytes | memoryview, *, what: str, max_values: int, pairs: Callable[..., Any] | None = None) -> Any:
    """Parse JSON with at most ``max_values`` values, which are counted before memory is spent on them.

    Args:
        data: Text in UTF-8; its length has been checked.
        what: Name of the text, for messages.
        max_values: Most values.
        pairs: The ``object_pairs_hook`` of `json.loads`.

    Raises:
        AdapterCorruptUploadError: If it is not JSON, is nested too deeply or has more values.
    """
    try:
        text = str(data, "utf-8-sig")
        if text.count(",") + text.count("[") + text.count("{") > max_values:
            raise AdapterCorruptUploadError(f"{what} has more than {max_values} values, no more are read")
        return json.loads(text, object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:
        raise AdapterCorruptUploadError(f"{what} is no JSON: {error}") from error
