"""Which IP addresses belong to the public internet, and which hosts an allow-list names.

The networks are listed here because ``is_global`` of `ipaddress` differs between patch releases of Python.
It is also true of multicast, of IPv4 embedded in IPv6, and of some metadata services of providers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

from yarl import URL

IPAddress = IPv4Address | IPv6Address

_NOT_PUBLIC = tuple(
    IPv4Network(network)
    for network in (
        "0.0.0.0/8",  # "this network"
        "10.0.0.0/8",  # private
        "100.64.0.0/10",  # carrier-grade NAT
        "127.0.0.0/8",  # loopback
        "168.63.129.16/32",  # Azure's platform services, reachable from its machines only
        "169.254.0.0/16",  # link-local, with most providers' metadata services
        "172.16.0.0/12",  # private
        "192.0.0.0/24",  # protocol assignments, Oracle's metadata service
        "192.0.2.0/24",  # documentation
        "192.88.99.0/24",  # relays to 6to4
        "192.168.0.0/16",  # private
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, broadcast
    )
)
# Every address allocated so far is in this network. Outside it: loopback, unspecified, IPv4-mapped,
# IPv4-compatible, NAT64, discard-only, segment routing, unique local, link-local, site-local, multicast.
_PUBLIC_IPV6 = IPv6Network("2000::/3")
_NOT_PUBLIC_IPV6 = tuple(
    IPv6Network(network)
    for network in (
        "2001::/23",  # protocol assignments, among them Teredo, which embeds IPv4
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4, which embeds IPv4
        "3fff::/20",  # documentation
    )
)


def is_public(address: IPAddress) -> bool:
    """Return whether an address belongs to a machine on the public internet.

    IPv6 addresses that embed an IPv4 address (mapped, NAT64, 6to4, Teredo) do not count as public, whatever
    the IPv4 address: an unknown gateway decides where they lead.
    """
    if isinstance(address, IPv4Address):
        return not any(address in network for network in _NOT_PUBLIC)
    if address.scope_id is not None:
        return False
    return address in _PUBLIC_IPV6 and not any(address in network for network in _NOT_PUBLIC_IPV6)


# ------------------------------------------------------------------------------------- allow-lists


def normal_host(host: str) -> str:
    """Return the canonical spelling of a host: lower case, punycode, no trailing dot, short addresses.

    Raises:
        ValueError: it is neither a name nor an address.
    """
    try:
        return str(ip_address(host.strip("[]")))
    except ValueError:
        name = (URL.build(scheme="http", host=host).raw_host or "").removesuffix(".")
    if len(name) > 253 or not re.fullmatch(r"[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*", name):
        raise ValueError(f"{host!r} is not a host")
    return name


def normal_pattern(pattern: str) -> str:
    """Return the canonical spelling of an allow-list entry. Raise `ValueError` if it is not one."""
    if pattern == "*":
        return pattern
    star = "*." if pattern.startswith("*.") else ""
    try:
        return star + normal_host(pattern.removeprefix(star))
    except ValueError:
        raise ValueError(
            f"{pattern!r} is not a host: write images.example.org, *.example.org, an IP address, or *"
        ) from None


def host_allowed(host: str, patterns: Sequence[str]) -> bool:
    """Return whether an allow-list names a (canonical) host: exactly, by ``*.parent``, or by ``*``."""
    return any(
        pattern in ("*", host) or (pattern.startswith("*.") and host.endswith(pattern[1:]))
        for pattern in patterns
    )
