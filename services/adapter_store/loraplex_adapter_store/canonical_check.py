"""Checks a canonical form's bytes as they arrive: piece by piece in threads where its tree digest is known, else in order."""

from __future__ import annotations

import hashlib
import threading
from typing import TYPE_CHECKING

from loraplex_common.log import get_logger
from loraplex_common.tree_digest import PIECE_BYTES, piece_digests, tree_root

from loraplex_adapter_store.checkpoint.canonical import check_revision

if TYPE_CHECKING:
    from loraplex_adapter_store.thread_work import ThreadWork

_log = get_logger()


class CanonicalCheck:
    """Hashes one canonical form.

    Args:
        revision: Its sha256, 64 hex digits.
        tree_sha256: Its tree digest, as the import recorded it; empty if it recorded none.
        data: Room for its bytes, contiguous.
        work: Starts the hashing in threads.
    """

    def __init__(self, revision: str, tree_sha256: str, data: memoryview[int], work: ThreadWork) -> None:
        self._revision = revision
        self._tree_sha256 = tree_sha256
        self._data = data
        self._work = work
        self._pieces: list[bytes] = [b""] * -(-len(data) // PIECE_BYTES)
        self._num_begun = 0  # pieces that are being hashed, or are
        self._sha256 = hashlib.sha256()
        self._lock = threading.Lock()
        self._arrived = self._hashed = 0  # bytes, of the hash in order
        self._is_hashing = False

    def add(self, arrived: int) -> None:
        """Note up to where bytes have arrived; called in one thread."""
        if self._tree_sha256:
            stop = len(self._pieces) if arrived == len(self._data) else arrived // PIECE_BYTES
            if stop > self._num_begun:
                self._work.start(self._hash_pieces, self._num_begun, stop)
                self._num_begun = stop
            return
        with self._lock:
            self._arrived = arrived
            is_to_start, self._is_hashing = not self._is_hashing, True
        if is_to_start:
            self._work.start(self._hash_on)

    def finish(self) -> None:
        """Compare, once all bytes are hashed. A tree digest that differs is no proof: the revision's own name decides.

        Raises:
            AdapterCorruptError: If the bytes are not those of the revision.
        """
        if self._tree_sha256:
            if tree_root(self._pieces) == self._tree_sha256:
                return
            self._sha256.update(self._data)
        check_revision(self._revision, self._sha256.hexdigest())
        if self._tree_sha256:
            _log.warning("the tree digest in a manifest is not that of its revision's bytes", revision=self._revision)

    def _hash_pieces(self, start: int, stop: int) -> None:
        for number in range(start, stop):
            first = number * PIECE_BYTES
            self._pieces[number] = piece_digests(self._data[first : first + PIECE_BYTES])

    def _hash_on(self) -> None:
        while True:
            with self._lock:
                begun, self._hashed = self._hashed, self._arrived
                if begun == self._hashed:
                    self._is_hashing = False
                    return
                stop = self._hashed
            self._sha256.update(self._data[begun:stop])
