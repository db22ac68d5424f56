"""Where checkpoints are fetched from: directories of this machine, and the hub."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from loraplex_common.errors import InvalidParameterError

if TYPE_CHECKING:
    from loraplex_adapter_store.credentials import Credentials
    from loraplex_adapter_store.imports.directory import ImportRoots
    from loraplex_adapter_store.imports.hub import Hub, HubSource
    from loraplex_adapter_store.imports.importer import Fetch


class Sources:
    """Finds out how a source is fetched.

    Args:
        roots: Directories below which imports are allowed.
        hub: The Hugging Face hub.
        credentials: Tokens for private repositories, by name.
        max_adapter_bytes: Largest checkpoint that is fetched.
    """

    def __init__(self, roots: ImportRoots, hub: Hub, credentials: Credentials, *, max_adapter_bytes: int) -> None:
        self._roots = roots
        self._hub = hub
        self._credentials = credentials
        self._max_adapter_bytes = max_adapter_bytes

    def fetcher(self, source: str | HubSource, credential: str) -> tuple[str, Fetch]:
        """Return the identity of a source, which is equal for equal ones, and what fetches it.

        Args:
            source: A ``file:`` URI, or a repository of the hub.
            credential: Name of the credential for the hub; may be empty.

        Raises:
            InvalidParameterError: If the source is malformed or outside the import roots, or the credential is unknown.
        """
        if isinstance(source, str):
            if credential:
                raise InvalidParameterError("a directory needs no credential", field="credential_ref")
            self._roots.locate(source)  # refuse at once what can be refused at once
            return source, partial(self._roots.fetch, source, self._max_adapter_bytes)
        source.check()
        token = self._credentials.get(credential)
        # Not shared between credentials: one may see what the other may not.
        return f"{source}#{credential}", partial(self._hub.fetch, source, token, self._max_adapter_bytes)
