"""The line between rank 0 and another rank of its host: a socket that keeps messages whole, and whose end is noticed at once.

Rank 0 says once what the rank is (`RankSetup`). The rank says that it is ready, which loads it has finished, now and then that it
lives, and, if it fails, why. A process that ends in whatever way closes its end of the socket.
"""

from __future__ import annotations

import enum
import json
import struct
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    import socket

MAX_BYTES: Final = 64 * 1024
_HEAD: Final = struct.Struct("<Bq")


class Word(enum.IntEnum):
    """What a rank says."""

    READY = 1
    LIVES = 2
    LOADED = 3
    LOAD_FAILED = 4
    FAILED = 5


class Said(NamedTuple):
    """A message of a rank.

    Attributes:
        number: Number of the load that it is about.
        text: What went wrong.
    """

    word: Word
    number: int = 0
    text: str = ""

    def to_bytes(self) -> bytes:
        """Encode it."""
        return _HEAD.pack(self.word, self.number) + self.text.encode()[: MAX_BYTES - _HEAD.size]

    @classmethod
    def from_bytes(cls, data: bytes) -> Said:
        """Decode what `to_bytes` wrote."""
        word, number = _HEAD.unpack_from(data)
        return cls(Word(word), number, data[_HEAD.size :].decode(errors="replace"))


@dataclass(frozen=True, kw_only=True, slots=True)
class RankSetup:
    """What a rank other than 0 is, and what it computes with.

    Attributes:
        rank: Its number.
        degree: Ranks of the group.
        model: Directory of the base model.
        text_only: Whether a multimodal model means its text part.
        fingerprint: The base model's, which rank 0 has computed.
        dtype: Compute type.
        kv_dtype: Type of keys and values; empty: the compute type.
        weight_form: Value of the `WeightForm`.
        num_pages: Pages of the pool.
        num_arena_slots: Slots of the rank's part of the arena.
        max_model_len: Longest sequence in tokens.
        max_num_seqs: Most sequences of one step.
        max_num_batched_tokens: Most tokens of one step.
        max_added_tokens: Most tokens that an adapter may add.
        pair_split: How ranks choose to divide adapters' pairs, as `rank_split.choice_text` writes it.
        num_threads: Compute threads.
        log_level: As the engine's.
        log_format: As the engine's.
    """

    rank: int
    degree: int
    model: str
    text_only: bool
    fingerprint: str
    dtype: str
    kv_dtype: str
    weight_form: str
    num_pages: int
    num_arena_slots: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_added_tokens: int
    pair_split: str
    num_threads: int
    log_level: str
    log_format: str

    def to_bytes(self) -> bytes:
        """Encode it as JSON."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> RankSetup:
        """Decode what `to_bytes` wrote."""
        return cls(**json.loads(data))


def say(line: socket.socket, said: Said) -> None:
    """Send a message; from any thread. Raises `OSError` if rank 0 is gone."""
    line.send(said.to_bytes())
