"""Stacks and a lone engine for the tests of this folder, one of each kind at a time per worker."""

from support.lone_engine import engine, session, stub
from support.stack_fixtures import smol_stack, tiny_stack, tiny_world
from support.store_fixtures import redis_url, store_valkey
from support.strict_stack import neighbour, strict_stack

__all__ = [
    "engine",
    "neighbour",
    "redis_url",
    "session",
    "smol_stack",
    "store_valkey",
    "strict_stack",
    "stub",
    "tiny_stack",
    "tiny_world",
]
