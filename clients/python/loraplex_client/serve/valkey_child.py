"""The embedded Valkey server in the shape of the other children."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from loraplex_common.valkey import EmbeddedValkey, ValkeyError

from loraplex_client.credentials.private_files import make_private_folder
from loraplex_client.serve.child import LOG_TAIL_LINES, ChildError
from loraplex_client.valkey_access import ValkeyAccess

if TYPE_CHECKING:
    from pathlib import Path

POLL_S: Final = 0.2


class ValkeyChild:
    """Runs the embedded Valkey server; its address does not change over restarts."""

    def __init__(self, data_dir: Path) -> None:
        self.name = "valkey"
        try:
            make_private_folder(data_dir)  # its files have all adapters, and the key of resume tokens
            self._server = EmbeddedValkey(data_dir)
        except OSError as error:
            raise ChildError(f"{data_dir}: {error.strerror}") from error
        self.access = ValkeyAccess(url=self._server.address, password_file=self._server.password_path)

    async def start(self) -> None:
        """Start the server and return once it answers, its data loaded.

        Blocks the event loop meanwhile: the server's life is tied to the thread that starts it.

        Raises:
            ChildError: If it ends or stays silent.
        """
        try:
            self._server.start()
        except ValkeyError as error:
            raise ChildError(str(error)) from error

    async def wait(self) -> str:
        """Wait until the server ends; return how."""
        while self._server.is_running:  # noqa: ASYNC110 -- it has no event to wait for
            await asyncio.sleep(POLL_S)
        return "no reason given"

    async def stop(self, timeout_s: float) -> None:
        """Stop the server after it has written its data."""
        await asyncio.to_thread(self._server.close)

    def kill(self) -> None:
        """End the server at once."""
        self._server.kill()

    def log_tail(self) -> str:
        """Return the last lines of the log."""
        return self._server.log_tail(LOG_TAIL_LINES)
