"""Imports an adapter, tries the new revision by its digest, then moves the label that clients use.

make serve            # in another terminal
python examples/import_and_roll_out.py examples/demo/adapters/json
"""

from __future__ import annotations

import sys
from pathlib import Path

from loraplex_client import Client, ImportProgress


def main() -> None:
    """Roll out the PEFT directory named on the command line."""
    directory = Path(sys.argv[1])
    name = directory.name

    def progress(state: ImportProgress) -> None:
        print(f"\r{state.stage.value}: {state.bytes_done} of {state.bytes_total} bytes", end="", file=sys.stderr)

    with Client("127.0.0.1:8500", store_target="127.0.0.1:8510") as client:
        revision = client.adapters.upload(name, directory, progress=progress).revision
        print(f"\n{name}@{revision.digest}: rank {revision.max_rank}, {', '.join(revision.target_modules)}")

        trial = client.generate_once(prompt="Hello", adapter=f"{name}@{revision.digest}", max_new_tokens=8)
        print(f"tried: {trial.text!r}")

        # Atomic: requests under way finish on the revision they started with.
        client.adapters.alias(name, "prod", revision.digest)
        print(f"clients that ask for {name}:prod get it from now on")


if __name__ == "__main__":
    main()
