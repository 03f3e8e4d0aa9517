"""Which addresses are public, and which hosts an allow-list names."""

from ipaddress import ip_address

import pytest

from serve.media.addresses import host_allowed, is_public, normal_host, normal_pattern


@pytest.mark.parametrize(
    "address",
    [
        *("0.0.0.0", "0.1.2.3", "10.1.2.3", "100.64.0.1", "100.100.100.200", "127.0.0.1", "127.255.255.255"),
        *("168.63.129.16", "169.254.169.254", "172.16.0.1", "172.31.255.255", "192.0.0.192", "192.0.2.1"),
        *("192.88.99.1", "192.168.1.1", "198.18.0.1", "198.51.100.7", "203.0.113.7"),
        *("224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255"),
        *(
            "::",
            "::1",
            "::127.0.0.1",
            "::8.8.8.8",
            "::ffff:127.0.0.1",
            "::ffff:8.8.8.8",
        ),  # compatible, mapped
        *("64:ff9b::7f00:1", "64:ff9b::808:808", "64:ff9b:1::a00:1"),  # NAT64
        *("2002:7f00:1::", "2002:808:808::1", "2001:0:808:808::1"),  # 6to4, Teredo
        *(
            "100::1",
            "2001:db8::1",
            "3fff::1",
            "5f00::1",
            "fc00::1",
            "fd12::1",
            "fe80::1",
            "fec0::1",
            "ff0e::1",
        ),
        *("fe80::1%eth0", "2600::1%eth0"),
    ],
)
def test_special_addresses_are_not_public(address):
    assert not is_public(ip_address(address))


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "1.1.1.1", "100.128.0.1", "172.32.0.1", "2600::1", "2001:4860:4860::8888"]
)
def test_other_addresses_are_public(address):
    assert is_public(ip_address(address))


@pytest.mark.parametrize(
    ("pattern", "host", "allowed"),
    [
        ("images.example.org", "images.example.org", True),
        ("Images.Example.org.", "IMAGES.example.ORG.", True),
        ("images.example.org", "example.org", False),
        ("images.example.org", "cat.images.example.org", False),
        ("images.example.org", "images.example.org.evil.test", False),
        ("*.example.org", "images.example.org", True),
        ("*.example.org", "a.b.example.org", True),
        ("*.example.org", "example.org", False),
        ("*.example.org", "badexample.org", False),
        ("*", "anything.test", True),
        ("bücher.example", "xn--bcher-kva.example", True),
        ("8.8.8.8", "8.8.8.8", True),
        ("[2600:0::1]", "2600::1", True),
    ],
)
def test_a_host_is_allowed_if_a_pattern_matches(pattern, host, allowed):
    assert host_allowed(normal_host(host), ["other.test", normal_pattern(pattern)]) is allowed


@pytest.mark.parametrize(
    "pattern",
    ["", ".", "*.", "*example.org", "a.*.org", "https://example.org", "example.org:80", "a/b", "a..b"],
)
def test_malformed_patterns_are_refused(pattern):
    with pytest.raises(ValueError, match="is not a host"):
        normal_pattern(pattern)
