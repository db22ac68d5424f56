"""``python -m loraplex_client`` is the ``loraplex`` command."""

from loraplex_client.cli import main

main()
