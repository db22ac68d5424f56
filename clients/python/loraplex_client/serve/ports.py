"""The ports of a stack on one machine: which part has which, and whether they are free.

Needs nothing but the standard library and `loraplex_common.ports`, so that ``make serve`` can run it before it installs
anything: ``python ports.py [ARGUMENTS OF LORAPLEX SERVE]``.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, TypedDict, cast

from loraplex_common.ports import problem_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

DEFAULT_BASE_PORT: Final = 8500
DEFAULT_HOST: Final = "127.0.0.1"
LAST_PORT: Final = 65535
MAX_NUM_ENGINES: Final = 64
ENGINE_STEP: Final = 2
"""From a port of one engine to the same one of the next."""


class PortError(RuntimeError):
    """A port cannot be had; the message names port, part and flag."""


class Ports(TypedDict):
    """The ports of `ServeConfig`; 0 picks a free one."""

    grpc_port: int
    http_port: int
    metrics_port: int
    store_port: int
    store_metrics_port: int
    engine_port: int
    engine_metrics_port: int


@dataclass(frozen=True, slots=True)
class StackPort:
    """One port.

    Attributes:
        field: Of `ServeConfig`.
        flag: Of ``loraplex serve``.
        offset: From the base port.
        part: What listens there, for people.
        is_public: Whether it listens on ``--host``; the others stay on the loopback.
        is_engine: Whether each of several engines has one.
    """

    field: str
    flag: str
    offset: int
    part: str
    is_public: bool = False
    is_engine: bool = False


STACK_PORTS: Final = (
    StackPort("grpc_port", "--port", 0, "the gateway's gRPC", is_public=True),
    StackPort("http_port", "--http-port", 1, "the gateway's HTTP", is_public=True),
    StackPort("metrics_port", "--metrics-port", 2, "the gateway's /metrics", is_public=True),
    StackPort("store_port", "--store-port", 10, "the adapter store's gRPC"),
    StackPort("store_metrics_port", "--store-metrics-port", 11, "the adapter store's /metrics"),
    StackPort("engine_port", "--engine-port", 20, "the engine's gRPC", is_engine=True),
    StackPort("engine_metrics_port", "--engine-metrics-port", 21, "the engine's /metrics", is_engine=True),
)
MAX_BASE_PORT: Final = LAST_PORT - max(port.offset for port in STACK_PORTS)


def engine_port(first: int, number: int) -> int:
    """Return the port of an engine with a number, of which the first engine has ``first``; 0 picks free ones."""
    return first + ENGINE_STEP * number if first else 0


def assign_ports(base_port: int, given: Mapping[str, int | None], num_engines: int = 1) -> Ports:
    """Return the ports: what was given, else the base port and the part's offset; base port 0 picks free ones.

    Args:
        base_port: The first.
        given: By field of `Ports`.
        num_engines: Engines that need room behind the first one's ports.

    Raises:
        PortError: If a number is no port.
    """
    room = ENGINE_STEP * (num_engines - 1)
    if not 0 <= base_port <= MAX_BASE_PORT - room:
        raise PortError(f"--base-port {base_port} is not within 0 to {MAX_BASE_PORT - room}{_engines(num_engines)}")
    ports: dict[str, int] = {}
    for port in STACK_PORTS:
        number = given.get(port.field)
        if number is None:
            number = base_port + port.offset if base_port else 0
        last = LAST_PORT - (room if port.is_engine else 0)
        if not 0 <= number <= last:
            raise PortError(f"{port.flag} {number} is not within 0 to {last}{_engines(num_engines)}")
        ports[port.field] = number
    return cast("Ports", ports)


def require_free_ports(host: str, ports: Ports, num_engines: int = 1) -> None:
    """Check that the ports of a stack with so many engines can be listened on.

    Raises:
        PortError: If not; the message names all that cannot, and what to do.
    """
    problems: list[str] = []
    owners: dict[int, StackPort] = {}
    numbers = cast("Mapping[str, int]", ports)
    for port, number in _wanted(numbers, num_engines):
        if number in owners:
            problems.append(f"port {number} ({port.part}, {port.flag}) is that of {owners[number].part} too")
        elif problem := problem_of(host if port.is_public else DEFAULT_HOST, number):
            problems.append(f"port {number} ({port.part}, {port.flag}) {problem}")
        if number:
            owners[number] = port
    if problems:
        raise PortError("\n".join([*problems, "choose others with the flags named, or all with --base-port N"]))


def _wanted(numbers: Mapping[str, int], num_engines: int) -> Iterator[tuple[StackPort, int]]:
    """Yield every port of a stack with its number, those of further engines behind the others."""
    for port in STACK_PORTS:
        yield port, numbers[port.field]
    for engine in range(1, num_engines):
        for port in STACK_PORTS:
            if port.is_engine:
                part = port.part.replace("the engine", f"engine {engine}")
                yield replace(port, part=part), engine_port(numbers[port.field], engine)


def _engines(number: int) -> str:
    return f" with --engines {number}" if number > 1 else ""


def main(argv: Sequence[str]) -> None:
    """Check the ports that ``loraplex serve`` with these arguments would want."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--host", default=DEFAULT_HOST)
    parser.add_argument("--base-port", type=int, default=DEFAULT_BASE_PORT)
    parser.add_argument("--engines", type=int, default=1)
    for port in STACK_PORTS:
        parser.add_argument(port.flag, dest=port.field, type=int)
    known = vars(parser.parse_known_args(argv)[0])  # the others are for serve itself
    try:
        num_engines = max(1, min(known["engines"], MAX_NUM_ENGINES))  # serve itself refuses another number
        require_free_ports(known["host"], assign_ports(known["base_port"], known, num_engines), num_engines)
    except PortError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
