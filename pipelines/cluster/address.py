"""The address of an existing Ray in ``$RAY_ADDRESS``, and the folder of a Ray that is started here."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from skipvision.errors import ConfigError

_HOST_AND_PORT = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+):([0-9]{1,5})")
_LONGEST_SOCKET = 107
"""Bytes in the path of a Unix socket."""
_SOCKET = "/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
"""Ray's longest socket, below its folder."""
_SHORT_FOLDER = Path("/tmp/ray")  # noqa: S108 — Ray's own default
_DASHBOARD_SOCKET = "/pymp-00000000/listener-00000000"
"""The socket of a process that Ray's dashboard starts, below ``$TMPDIR``."""


def ray_address() -> str | None:
    """Return the address of the Ray to join; None if ``$RAY_ADDRESS`` is unset, empty or ``local``.

    Raises:
        ConfigError: it is not an address that a job can join.
    """
    address = os.environ.get("RAY_ADDRESS", "").strip()
    if address in ("", "local"):
        return None
    if address == "auto":
        return address
    scheme, separator, rest = address.rpartition("://")
    if scheme in ("http", "https"):
        raise ConfigError(
            f"RAY_ADDRESS = {address}: this is the address of Ray's dashboard, which takes submitted jobs. "
            "Submit this one: `ray job submit --working-dir . -- python jobs/…`. Or set RAY_ADDRESS to "
            "HOST:6379 of the head node, or unset it to start a Ray for this job"
        )
    found = _HOST_AND_PORT.fullmatch(rest.partition("/")[0].partition("?")[0])
    if scheme not in ("", "ray") or (separator and not scheme) or not found or not 0 < int(found[2]) < 2**16:
        raise ConfigError(
            f"RAY_ADDRESS = {address}: this is no address of a Ray: give HOST:PORT of the head node, "
            "ray://HOST:PORT, auto or local, or unset it to start a Ray for this job"
        )
    return address


def host_and_port(address: str) -> tuple[str, int]:
    """Return host and port of an address from `ray_address`."""
    host, _, port = address.rpartition("://")[2].partition("/")[0].partition("?")[0].rpartition(":")
    return host.strip("[]"), int(port)


def default_folder() -> Path:
    """Return the folder in which Ray keeps logs and sockets unless it is given another."""
    given = os.environ.get("RAY_TMPDIR", os.environ.get("TMPDIR"))
    return _SHORT_FOLDER if given is None else Path(given, "ray")


def short_folder() -> str | None:
    """Return a folder for Ray if the paths of sockets in `default_folder` are too long; otherwise None."""
    longest = f"{default_folder().absolute()}{_SOCKET}"
    return str(_SHORT_FOLDER) if len(longest.encode()) > _LONGEST_SOCKET else None


@contextmanager
def short_tmpdir() -> Iterator[None]:
    """Replace ``$TMPDIR`` for the block if it is too long for the sockets of processes that start there."""
    given = os.environ.get("TMPDIR", "")
    if len(f"{Path(given).absolute()}{_DASHBOARD_SOCKET}".encode()) <= _LONGEST_SOCKET:
        yield
        return
    os.environ["TMPDIR"] = str(_SHORT_FOLDER.parent)
    try:
        yield
    finally:
        os.environ["TMPDIR"] = given
