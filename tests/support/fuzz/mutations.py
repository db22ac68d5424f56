"""Changes of valid inputs: of bytes, of JSON, of safetensors files, of streams of messages."""

from __future__ import annotations

import copy
import json
import struct
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

NESTED: Final = json.loads("[" * 60 + "]" * 60)
VALUES: Final[tuple[Any, ...]] = (
    None, True, False, 0, 1, -1, 2, 7, 255, 65_536, 2**31, 2**32 - 1, 2**53, 2**63, 2**64, -(2**63), 0.5, 1e-300, 1e308,
    float("nan"), float("inf"), "", "0", "LORA", "all-linear", ".*", "(a+)+$", "q_proj", "../x", "\x00", "\ud800", "F32", "BF16",
    "a" * 5000, [], {}, [0], [[]], [-1, 2**40], [0, 0], [1, 1, 1, 1, 1, 1, 1, 1, 1], NESTED, {"a": {}}, ["q_proj"] * 300,
)  # fmt: skip
"""What takes the place of a value in JSON."""
MAX_CHUNK: Final = 4096


def mutated_bytes(rng: Random, data: bytes, corpus: list[bytes]) -> bytes:
    """Return bytes with one to four changes."""
    result = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(result) + 1)
        length = rng.randint(1, MAX_CHUNK) if rng.random() < 0.3 else rng.randint(1, 9)
        match rng.randrange(7):
            case 0 if result:
                result[rng.randrange(len(result))] ^= 1 << rng.randrange(8)
            case 1:
                result[at : at + length] = rng.randbytes(length)
            case 2:
                del result[at : at + length]
            case 3:
                result[at:at] = result[at : at + length]
            case 4:
                del result[at:]
            case 5:
                other = rng.choice(corpus)
                start = rng.randrange(len(other) + 1)
                result[at : at + length] = other[start : start + length]
            case _:
                result[at : at + 8] = struct.pack(
                    "<Q", rng.choice((0, 1, 2, 255, len(data), 2**31, 2**32, 2**63, 2**64 - 1))
                )
    return bytes(result)


def mutated_json(rng: Random, value: Any) -> Any:
    """Return a JSON value with one to three changes somewhere inside."""
    root = [copy.deepcopy(value)]
    for _ in range(rng.randint(1, 3)):
        holder, key = rng.choice(_places(root))
        match rng.randrange(5):
            case 0 if isinstance(holder, dict):
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[str(rng.choice(VALUES))[:200]] = copy.deepcopy(holder[key])
            case 2:
                other_holder, other_key = rng.choice(_places(root))
                holder[key] = copy.deepcopy(other_holder[other_key])
            case _:
                holder[key] = copy.deepcopy(rng.choice(VALUES))
    return root[0]


def _places(root: Any) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    waiting = [root]
    while waiting:
        holder = waiting.pop()
        for key in list(holder) if isinstance(holder, dict) else range(len(holder)):
            found.append((holder, key))
            if isinstance(holder[key], dict | list):
                waiting.append(holder[key])
    return found


def mutated_text(rng: Random, data: bytes, corpus: list[bytes]) -> bytes:
    """Return JSON text, changed as JSON or as bytes."""
    if rng.random() < 0.25:
        return mutated_bytes(rng, data, corpus)
    return json.dumps(mutated_json(rng, json.loads(data))).encode()


def mutated_safetensors(rng: Random, data: bytes, corpus: list[bytes]) -> bytes:
    """Return a safetensors file, its header changed as JSON, or the whole as bytes."""
    return data if rng.random() < 0.02 else _with_header(rng, data, corpus, mutated_json)


def _with_header(rng: Random, data: bytes, corpus: list[bytes], change: Callable[[Random, Any], Any]) -> bytes:
    if rng.random() < 0.3:
        return mutated_bytes(rng, data, corpus)
    (length,) = struct.unpack_from("<Q", data)
    header = json.dumps(change(rng, json.loads(data[8 : 8 + length]))).encode()
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def mutated_canonical(rng: Random, data: bytes, corpus: list[bytes]) -> bytes:
    """Return a canonical form, the JSON inside its header's metadata changed, or as `mutated_safetensors`."""
    if rng.random() < 0.5:
        return mutated_safetensors(rng, data, corpus)

    def change(rng: Random, header: Any) -> Any:
        inside = json.loads(header["__metadata__"]["loraplex"])
        header["__metadata__"]["loraplex"] = json.dumps(mutated_json(rng, inside))
        return header

    return _with_header(rng, data, corpus, change)


def mutated_messages(rng: Random, messages: list[bytes], others: list[bytes]) -> list[bytes]:
    """Return a stream of messages, in another order, with others, or with changed ones."""
    result = list(messages)
    for _ in range(rng.randint(1, 2)):
        at = rng.randrange(len(result)) if result else 0
        match rng.randrange(6):
            case 0:
                del result[at : at + 1]
            case 1:
                result[at:at] = result[at : at + 1]
            case 2:
                rng.shuffle(result)
            case 3:
                result.insert(at, rng.choice(others))
            case 4:
                del result[at:]
            case _:
                result[at : at + 1] = [mutated_bytes(rng, each, others) for each in result[at : at + 1]]
    return result
