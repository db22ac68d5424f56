"""Structured logs on stderr: one line per event, as text or as JSON."""

from __future__ import annotations

import logging
import sys
from typing import Any, Literal, cast

import structlog

from loraplex_common import log_bounds

LogFormat = Literal["console", "json"]


def configure(service: str, level: str = "info", fmt: LogFormat = "console") -> None:
    """Set up logging of the process, the standard library's included.

    Args:
        service: Name that every line gets.
        level: ``debug``, ``info``, ``warning`` or ``error``.
        fmt: ``console`` for people to read, ``json`` for log collectors.

    Raises:
        ValueError: If the level is unknown.
    """
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise ValueError(f"log level {level!r} is not one of debug, info, warning, error")

    def stamp(_logger: Any, _name: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        event["service"] = service
        return event

    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        log_bounds.clip,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        stamp,
    ]
    formatter = structlog.stdlib.ProcessorFormatter
    structlog.configure(
        processors=[*shared, formatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(log_bounds.Flood())
    handler.setFormatter(
        formatter(foreign_pre_chain=shared, processors=[formatter.remove_processors_meta, *_renderers(fmt)])
    )
    logging.basicConfig(handlers=[handler], level=number, force=True)


def _renderers(fmt: LogFormat) -> list[Any]:
    """Return what makes a line of an event; tracebacks are without local variables, which hold prompts and keys."""
    if fmt == "json":
        frames = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
        return [structlog.processors.ExceptionRenderer(frames), structlog.processors.JSONRenderer()]
    plain = structlog.dev.plain_traceback
    return [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=plain)]


def get_logger(**context: Any) -> structlog.typing.FilteringBoundLogger:
    """Return a logger whose lines carry ``context``; usable before `configure`."""
    return cast("structlog.typing.FilteringBoundLogger", structlog.get_logger(**context))
