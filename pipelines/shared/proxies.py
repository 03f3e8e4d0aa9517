"""Requests to this machine must not go to a proxy."""

from __future__ import annotations

import os

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_NAMES = ("no_proxy", "NO_PROXY")


def bypass_proxies_on_loopback() -> None:
    """Exclude this machine's loopback addresses from the proxies of this process and of its children.

    Ray's dashboard, an MLflow server and a judge may listen there. ``http_proxy`` and ``ALL_PROXY`` would
    send their clients' requests to a proxy, which cannot reach them.
    """
    given = [host.strip() for name in _NAMES for host in os.environ.get(name, "").split(",")]
    hosts = dict.fromkeys(filter(None, [*given, *_LOOPBACK]))
    if "*" in hosts:
        return
    for name in _NAMES:  # some clients read one, some the other
        os.environ[name] = ",".join(hosts)
