"""Runs one of several processes of a gateway: ``python -m loraplex_gateway.worker SETUP FLAGS``, as its parent does."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import msgspec
from loraplex_common import log, settings
from loraplex_common.descriptors import raise_limit
from loraplex_common.heap import keep_heap_small

from loraplex_gateway.config import GatewayConfig
from loraplex_gateway.process import STARTING_ERRORS, run, serve
from loraplex_gateway.workers.setup import WorkerSetup


def main() -> None:
    """Read the configuration and serve on the ports of the parent."""
    setup = msgspec.json.decode(sys.argv[1], type=WorkerSetup)
    flags = settings.load(GatewayConfig, service="gateway", argv=sys.argv[2:])
    models = tuple(Path(directory) for directory in setup.models)
    config = replace(flags, model=models, served_model_name=setup.served_model_name)
    log.configure("gateway", config.log_level, config.log_format)
    raise_limit()
    keep_heap_small()
    try:
        run(serve(config, setup))
    except STARTING_ERRORS as error:
        sys.exit(f"loraplex-gateway: {error}")


if __name__ == "__main__":
    main()
