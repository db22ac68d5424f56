"""The parties of a deployment, the callers each lets in, and what each may do in Valkey: least rights, in one table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from loraplex_common.auth import Role

DOMAIN: Final = "loraplex.internal"
LOCAL_HOSTS: Final = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Party:
    """One participant; its folder holds all that it needs and nothing of another's.

    Attributes:
        folder: Name of its folder.
        role: Role of its API key; None for one that calls no service of ours.
        tls_name: Name that its certificate holds besides its hosts; empty for one that only calls. All certificates are good
            for calling: Valkey's replicas and health checks do, too.
        has_certificate: Whether it has one at all; callers of the gateway's public ports need none.
        admits: Roles whose API keys are in its keys file; empty for one that has no keys file.
        valkey_rights: Rules of its user in Valkey; empty for one that has none.
    """

    folder: str
    role: Role | None = None
    tls_name: str = ""
    has_certificate: bool = True
    admits: tuple[Role, ...] = ()
    valkey_rights: str = ""


# `+@all -@admin -@dangerous` leaves data commands and scripts; INFO says which run of the server an answer comes from.
_COMMANDS: Final = "+@all -@admin -@dangerous +info"
# The catalog (`loraplex:store:*`) and the adapters (`a:*`) are written by the store alone; the others write what is theirs.
_GATEWAY_KEYS: Final = "%R~loraplex:* ~loraplex:claim* ~loraplex:gateway* ~loraplex:resume* ~loraplex:quota* ~loraplex:usage* ~loraplex:nothing"
_ENGINE_KEYS: Final = "~loraplex:engine* ~loraplex:nothing"

GATEWAY: Final = Party(
    folder="gateway",
    role=Role.GATEWAY,
    tls_name=f"gateway.{DOMAIN}",
    admits=(Role.TENANT, Role.ADMIN, Role.METRICS),
    valkey_rights=f"resetchannels {_GATEWAY_KEYS} {_COMMANDS}",
)
ENGINE: Final = Party(
    folder="engine",
    role=Role.ENGINE,
    tls_name=f"engine.{DOMAIN}",
    admits=(Role.GATEWAY, Role.ADMIN, Role.METRICS),
    valkey_rights=f"resetchannels {_ENGINE_KEYS} {_COMMANDS}",
)
ADAPTER_STORE: Final = Party(
    folder="adapter_store",
    tls_name=f"adapter-store.{DOMAIN}",
    admits=(Role.GATEWAY, Role.ENGINE, Role.ADMIN, Role.METRICS),
    valkey_rights=f"resetchannels ~loraplex:* ~a:* {_COMMANDS}",
)
VALKEY: Final = Party(
    folder="valkey",
    tls_name=f"valkey.{DOMAIN}",
    valkey_rights="allkeys allchannels +@all",  # its operator: ACL LOAD, CONFIG, SHUTDOWN
)
ADMIN: Final = Party(
    folder="admin",
    role=Role.ADMIN,
    valkey_rights="resetchannels %R~loraplex:engine* %R~loraplex:usage +@read +@connection +info",
)
METRICS: Final = Party(folder="metrics", role=Role.METRICS, has_certificate=False)
TENANT: Final = Party(folder="tenant", role=Role.TENANT, has_certificate=False)

PARTIES: Final = (GATEWAY, ENGINE, ADAPTER_STORE, VALKEY, METRICS, TENANT, ADMIN)
LOG_READER: Final = "user default reset off ~* &* +@all"
"""The user by whose rights Valkey reads its own append-only file: without all rights it drops transactions at a restart (valkey#3983).

It is off: no connection can be it, and one that names no user may do nothing.
"""
HEALTH_CHECKER: Final = "user health reset on nopass resetchannels +ping"
"""Valkey's user of health checks: it can find out that the server answers, and no more. Any password is right."""
