"""Hosts, addresses and redirects that images are not fetched from."""

import asyncio
import ssl
from datetime import UTC, datetime, timedelta

import pytest
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from serve.errors import MediaError
from serve.media.config import MediaConfig
from serve.media.fetch import MediaFetcher
from tests.serve.media.site import (
    PNG,
    Names,
    assert_refused,
    assert_url_refused,
    fetcher,
    image_response,
    redirect,
    serving,
)


def test_no_host_is_allowed_by_default():
    message = assert_url_refused(
        "https://images.example.org/cat.png",
        "media_host_not_allowed",
        "not fetched from the network here; send it as a data URL",
    )
    assert "images.example.org" in message


def test_hosts_outside_the_allow_list_are_refused():
    settings = {"allowed_hosts": ["*.example.org"]}
    for host in ("example.net", "example.org", "example.org.evil.test", "10.0.0.1", "[::1]"):
        assert_url_refused(
            f"https://{host}/", "media_host_not_allowed", "not fetched from this host", **settings
        )


def test_ports_outside_the_allow_list_are_refused():
    settings = {"allowed_hosts": ["*"]}
    assert_url_refused("http://8.8.8.8:22/", "media_host_not_allowed", "port 22 is not allowed", **settings)


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "localhost", "127.0.0.1.", "10.0.0.1", "169.254.169.254", "0.0.0.0", "100.64.0.1"),
        *(
            "[::1]",
            "[::]",
            "[::ffff:127.0.0.1]",
            "[64:ff9b::7f00:1]",
            "[2002:7f00:1::]",
            "[fe80::1%25lo]",
            "[fd00::1]",
        ),
        *("2130706433", "0x7f000001", "0177.0.0.1", "127.1", "１２７.0.0.1", "①27.0.0.1"),
    ],
)
def test_private_addresses_are_refused_in_every_spelling(host):
    async def run():
        async with serving(image_response) as site:
            config = MediaConfig(allowed_hosts=["*"], allowed_ports=[site.port])
            async with MediaFetcher(config) as media:
                with pytest.raises(MediaError) as caught:
                    await media.fetch(f"http://{host}:{site.port}/")
            return caught.value.code, site.requests

    code, requests = asyncio.run(run())
    assert code in ("media_host_not_allowed", "media_url_invalid", "media_unreachable")
    assert not requests


@pytest.mark.parametrize(
    "addresses", [["10.0.0.1"], ["::1"], ["10.0.0.1", "10.0.0.2", "fd00::1"], ["::ffff:127.0.0.1"]]
)
def test_names_of_private_addresses_are_refused_without_revealing_them(addresses):
    message = assert_refused(image_response, "media_host_not_allowed", names=Names(images=[addresses]))
    assert not any(address in message for address in addresses)


def test_dns_rebinding_does_not_reach_a_private_address():
    async def run():
        def answer(_):
            return web.Response(body=PNG, headers={"Connection": "close"})

        names = Names(images=[["127.0.0.1"], ["127.0.0.2"]])  # 127.0.0.2 is not allowed
        async with serving(answer) as site, fetcher(site, names=names) as media:
            url = f"http://images.test:{site.port}/"
            assert (await media.fetch(url)).size == (4, 3)
            connector = media._session.connector
            connector.clear_dns_cache()
            with pytest.raises(MediaError) as caught:
                await media.fetch(url)
            return caught.value.code, names.queries, len(site.requests)

    assert asyncio.run(run()) == ("media_host_not_allowed", ["images.test"] * 2, 1)


@pytest.mark.parametrize(
    ("target", "code"),
    [
        ("http://127.0.0.2:{port}/", "media_host_not_allowed"),
        ("http://127.0.0.1:{port}/", "media_host_not_allowed"),
        ("http://inside.test:{port}/", "media_host_not_allowed"),
        ("http://evil.example:{port}/", "media_host_not_allowed"),
        ("http://images.test:22/", "media_host_not_allowed"),
        ("//evil.example:{port}/", "media_host_not_allowed"),
        ("http://me:secret@images.test:{port}/", "media_url_invalid"),
        ("file:///etc/passwd", "media_url_invalid"),
        ("data:image/png;base64,AAAA", "media_url_invalid"),
        ("http://[", "media_url_invalid"),
    ],
)
def test_redirects_to_forbidden_targets_are_refused(target, code):
    def answer(request):
        return web.Response(status=307, headers={"Location": target.format(port=request.url.port)})

    message = assert_refused(answer, code, names=Names(inside=[["10.0.0.1"]]))
    assert "secret" not in message
    assert "evil" not in message


def test_redirects_to_private_addresses_are_refused():
    def answer(request):
        return redirect(f"http://127.0.0.2:{request.url.port}/")

    assert_refused(answer, "media_host_not_allowed", "private addresses", allowed_hosts=["*"])


def test_endless_redirects_are_refused():
    assert_refused(
        lambda request: redirect(request.path + "x"), "media_unreachable", "redirects more than 3 times"
    )


def certificate(folder):
    """A self-signed certificate for images.test, as a server's context and a trusting client's."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.now(UTC)
    signed = (
        x509.CertificateBuilder(
            name, name, key.public_key(), x509.random_serial_number(), now, now + timedelta(1)
        )
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("images.test")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    file = folder / "certificate.pem"
    file.write_bytes(
        signed.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(file)
    return server, ssl.create_default_context(cafile=file)


def test_certificates_are_verified_and_https_is_not_downgraded(tmp_path):
    server, trusting = certificate(tmp_path)

    async def run():
        async with serving(image_response) as plain:

            def answer(request):
                return (
                    redirect(f"http://images.test:{plain.port}/")
                    if request.path == "/away"
                    else image_response(request)
                )

            async with serving(answer, server) as site:
                outcomes = []
                for tls, url in [
                    (trusting, f"https://images.test:{site.port}/"),
                    (trusting, f"https://images.test:{site.port}/away"),
                    (None, f"https://images.test:{site.port}/"),
                ]:
                    async with fetcher(plain, site, tls=tls) as media:
                        try:
                            outcomes.append((await media.fetch(url)).size)
                        except MediaError as error:
                            outcomes.append((error.code, str(error).partition(": ")[2]))
                return outcomes, plain.requests

    (good, away, untrusted), requests = asyncio.run(run())
    assert good == (4, 3)
    assert away[0] == "media_host_not_allowed"
    assert "a redirect from https to http is not followed" in away[1]
    assert untrusted == ("media_unreachable", "the host has no valid certificate")
    assert not requests
