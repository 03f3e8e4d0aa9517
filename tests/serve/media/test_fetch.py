"""Images by URL, from a real server: what is fetched, and everything that is refused."""

import asyncio
import base64
import contextlib
import gzip
import io
import pickle
import socket
import ssl
import struct
import threading
import time
import zlib
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address

import pytest
from aiohttp import web
from aiohttp.abc import AbstractResolver
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from PIL import Image
from pydantic import ValidationError

import serve.media.fetch
from serve.chat.schemas import ChatRequest
from serve.config import ServeConfig
from serve.errors import MediaError
from serve.ingress.ingress import Ingress
from serve.media.addresses import is_public
from serve.media.fetch import MediaConfig, MediaFetcher
from serve.problem import Problem
from skipvision.errors import InputError

RED = (255, 0, 0)


def saved(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


PNG = saved(Image.new("RGB", (4, 3), RED))


def bomb(width, height):
    """A PNG that promises many pixels in few bytes."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def data_url(data, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


# ------------------------------------------------------------------------------------ a small internet


class Names(AbstractResolver):
    """Every name is 127.0.0.1, unless said otherwise: ``name=[first answer, second answer, …]``."""

    def __init__(self, **answers):
        self.answers = answers
        self.asked = []

    async def resolve(self, host, port=0, family=socket.AF_INET):
        self.asked.append(host)
        answers = self.answers.get(host.partition(".")[0], [["127.0.0.1"]])
        addresses = answers.pop(0) if len(answers) > 1 else answers[0]
        if not addresses:
            raise OSError(None, "no such name on 10.0.0.53")
        return [
            {
                "hostname": host,
                "host": address,
                "port": port,
                "family": socket.AF_INET6 if ":" in address else socket.AF_INET,
                "proto": 0,
                "flags": socket.AI_NUMERICHOST,
            }
            for address in addresses
        ]

    async def close(self):
        pass


def public_or_test_server(address):
    return is_public(address) or address == ip_address("127.0.0.1")


class Site:
    """A server for one answer; counts who asks."""

    def __init__(self, answer):
        self.answer = answer
        self.requests = []
        self.port = 0

    async def __call__(self, request):
        self.requests.append(request)
        answer = self.answer(request)
        return await answer if asyncio.iscoroutine(answer) else answer


@contextlib.asynccontextmanager
async def running(answer, tls=None):
    site = Site(answer)
    runner = web.ServerRunner(web.Server(site), shutdown_timeout=0)
    await runner.setup()
    try:
        place = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls)
        await place.start()
        site.port = runner.addresses[0][1]
        yield site
    finally:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def sending(data):
    """A server that sends these very bytes and hangs up, whatever it is asked."""

    async def send(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(data)
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(send, "127.0.0.1", 0)
    try:
        site = Site(None)
        site.port = server.sockets[0].getsockname()[1]
        yield site
    finally:
        server.close()
        await server.wait_closed()


def config_for(*sites, **settings):
    ports = tuple(site.port for site in sites)
    return MediaConfig(**{"allowed_hosts": ("*.test",), "allowed_ports": ports} | settings)


def fetcher(*sites, names=None, tls=None, **settings):
    return MediaFetcher(
        config_for(*sites, **settings),
        resolver=names or Names(),
        address_allowed=public_or_test_server,
        tls=tls,
    )


def fetched(answer, path="/image", *, names=None, **settings):
    """What comes of one URL at a server with this answer."""

    async def run():
        site = sending(answer) if isinstance(answer, bytes) else running(answer)
        async with site as server, fetcher(server, names=names, **settings) as media:
            return (await media.fetch(f"http://images.test:{server.port}{path}")).open()

    return asyncio.run(run())


def refused(answer, code, message=None, path="/image", **settings):
    with pytest.raises(MediaError, match=message) as caught:
        fetched(answer, path, **settings)
    assert caught.value.code == code
    assert "127.0.0.1" not in str(caught.value)
    return str(caught.value)


def fetched_alone(url, **settings):
    """What comes of a URL with the rules that users have."""

    async def run():
        async with MediaFetcher(MediaConfig(**settings)) as media:
            return (await media.fetch(url)).open()

    return asyncio.run(run())


def refused_alone(url, code, message=None, **settings):
    with pytest.raises(MediaError, match=message) as caught:
        fetched_alone(url, **settings)
    assert caught.value.code == code
    return str(caught.value)


def redirect(target):
    return web.Response(status=302, headers={"Location": target})


def picture(_):
    return web.Response(body=PNG, content_type="image/png")


# ------------------------------------------------------------------------------------ what is fetched


def test_an_image_of_an_allowed_host():
    image = fetched(picture)
    assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", (4, 3), RED)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_every_allowed_format_by_data_url(kind):
    url = data_url(saved(Image.new("RGB", (4, 3)), kind), f"image/{kind.lower()}")
    assert fetched_alone(url).size == (4, 3)
    refused_alone(url, "media_format", formats=["PNG" if kind != "PNG" else "GIF"])


@pytest.mark.parametrize(
    "head", ["DATA:Image/PNG;BASE64", "data:image/png;charset=utf-8;base64", "data:image/jpg;base64"]
)
def test_spellings_of_data_urls(head):
    assert fetched_alone(f"{head},{base64.b64encode(PNG).decode()}").size == (4, 3)


def test_images_are_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert fetched_alone(data_url(saved(Image.new("RGB", (4, 2)), "JPEG", exif=exif))).size == (2, 4)


def test_the_first_frame_of_an_animation():
    frames = [Image.new("RGB", (2, 2), colour) for colour in (RED, "blue")]
    gif = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert fetched_alone(data_url(gif, "image/gif")).getpixel((0, 0)) == RED


def test_images_are_read_outside_the_event_loop(monkeypatch):
    threads = []

    def size_of(*arguments):
        threads.append(threading.current_thread())
        return real(*arguments)

    real = serve.media.fetch.size_of
    monkeypatch.setattr(serve.media.fetch, "size_of", size_of)
    fetched(picture)
    fetched_alone(data_url(PNG))
    assert len(threads) == 2
    assert threading.main_thread() not in threads


def test_one_bad_image_ends_the_other_downloads(tiny_model):
    """In the ingress, which names the field that the bad one stands in."""
    reached, over = asyncio.Event(), asyncio.Event()

    async def answer(request):
        if request.path == "/bad":
            await reached.wait()
        else:
            reached.set()
            await over.wait()
        return web.Response(status=404)

    async def run():
        async with running(answer) as site, fetcher(site) as media:
            ingress = Ingress(ServeConfig(model=str(tiny_model)))
            ingress._media = media
            urls = {name: f"http://images.test:{site.port}/{name}" for name in ("slow", "bad")}
            with pytest.raises(Problem, match="status 404") as caught:
                await ingress._pictures(urls)
            assert caught.value.param == "bad"
            assert not [task for task in asyncio.all_tasks() if "fetch" in str(task.get_coro())]
            over.set()

    asyncio.run(run())


def test_as_many_requests_are_prepared_at_once_as_there_are_threads(tiny_model, monkeypatch):
    now, most = 0, 0

    def open_slowly(image):
        nonlocal now, most
        now += 1
        most = max(most, now)
        time.sleep(0.05)
        now -= 1
        return Image.new("RGB", image.size)

    async def run():
        ingress = Ingress(ServeConfig(model=str(tiny_model), limits={"prepare_threads": 1}))
        monkeypatch.setattr(serve.media.fetch.EncodedImage, "open", open_slowly)
        part = {"type": "image_url", "image_url": {"url": data_url(PNG)}}
        body = ChatRequest(model="x", messages=[{"role": "user", "content": [part, part]}])
        target = ingress._target(tiny_model.name)
        journey = ingress._journeys.begin("x", time.monotonic(), None)
        with journey as begun:
            await asyncio.gather(*(ingress._request(body, target, begun) for _ in range(3)))

    asyncio.run(run())
    assert most == 1


def test_redirects_are_followed_under_the_same_rules():
    def answer(request):
        return picture(request) if request.path == "/there" else redirect("/there")

    assert fetched(answer).size == (4, 3)
    refused(answer, "media_unreachable", "redirects more than 0 times", max_redirects=0)


def test_servers_are_asked_without_cookies_and_for_bytes_as_they_are():
    async def run():
        def answer(request):
            response = picture(request)
            response.set_cookie("who", "someone")
            return response

        async with running(answer) as site, fetcher(site) as media:
            for _ in range(2):
                await media.fetch(f"http://images.test:{site.port}/image?a=1%262#part")
            return site.requests

    for request in asyncio.run(run()):
        assert request.headers["Accept-Encoding"] == "identity"
        assert request.raw_path == "/image?a=1%262"
        assert not {"Cookie", "Authorization", "Referer"} & set(request.headers)


def test_proxies_of_the_environment_are_not_used(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert fetched(picture).size == (4, 3)


@pytest.mark.parametrize(
    ("settings", "most"),
    [({"max_connections": 2}, 2), ({"max_connections_per_host": 1}, 1), ({}, 6)],
)
def test_downloads_at_the_same_time_are_bounded(settings, most):
    async def run():
        at_once, highest = 0, 0

        async def answer(request):
            nonlocal at_once, highest
            at_once += 1
            highest = max(highest, at_once)
            await asyncio.sleep(0.05)
            at_once -= 1
            return picture(request)

        async with running(answer) as site, fetcher(site, **settings) as media:
            await asyncio.gather(*(media.fetch(f"http://a.test:{site.port}/{n}") for n in range(6)))
        return highest

    assert asyncio.run(run()) == most


# ---------------------------------------------------------------------------------- hosts and addresses


def test_nothing_is_fetched_unless_hosts_are_named():
    message = refused_alone(
        "https://images.example.org/cat.png",
        "media_host_not_allowed",
        "not fetched from the network here; send it as a data URL",
    )
    assert "images.example.org" in message


def test_hosts_that_are_not_named():
    settings = {"allowed_hosts": ["*.example.org"]}
    for host in ("example.net", "example.org", "example.org.evil.test", "10.0.0.1", "[::1]"):
        refused_alone(f"https://{host}/", "media_host_not_allowed", "not fetched from this host", **settings)


def test_ports_that_are_not_allowed():
    settings = {"allowed_hosts": ["*"]}
    refused_alone("http://8.8.8.8:22/", "media_host_not_allowed", "port 22 is not allowed", **settings)


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
        async with running(picture) as site:
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
def test_names_of_private_addresses_are_refused_without_telling_them(addresses):
    message = refused(picture, "media_host_not_allowed", names=Names(images=[addresses]))
    assert not any(address in message for address in addresses)


def test_an_answer_that_changes_between_two_look_ups_changes_nothing():
    async def run():
        def answer(_):
            return web.Response(body=PNG, headers={"Connection": "close"})

        names = Names(images=[["127.0.0.1"], ["127.0.0.2"]])  # 127.0.0.2 is served too, and not allowed
        async with running(answer) as site, fetcher(site, names=names) as media:
            url = f"http://images.test:{site.port}/"
            assert (await media.fetch(url)).size == (4, 3)
            connector = media._session.connector
            connector.clear_dns_cache()
            with pytest.raises(MediaError) as caught:
                await media.fetch(url)
            return caught.value.code, names.asked, len(site.requests)

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
def test_redirects_to_what_is_not_allowed(target, code):
    def answer(request):
        return web.Response(status=307, headers={"Location": target.format(port=request.url.port)})

    message = refused(answer, code, names=Names(inside=[["10.0.0.1"]]))
    assert "secret" not in message
    assert "evil" not in message


def test_literal_addresses_behind_a_redirect_are_judged_like_names():
    def answer(request):
        return redirect(f"http://127.0.0.2:{request.url.port}/")

    refused(answer, "media_host_not_allowed", "private addresses", allowed_hosts=["*"])


def test_endless_redirects():
    refused(lambda request: redirect(request.path + "x"), "media_unreachable", "redirects more than 3 times")


def certificate(folder):
    """A certificate for images.test that signs itself: contexts for the server and for those who trust it."""
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


def test_https_is_checked_and_does_not_become_http(tmp_path):
    server, trusting = certificate(tmp_path)

    async def run():
        async with running(picture) as plain:

            def answer(request):
                return (
                    redirect(f"http://images.test:{plain.port}/")
                    if request.path == "/away"
                    else picture(request)
                )

            async with running(answer, server) as site:
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
    assert "https does not become http" in away[1]
    assert untrusted == ("media_unreachable", "the host has no valid certificate")
    assert not requests


# -------------------------------------------------------------------------------------------- the URL


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "has the scheme"),
        ("cat.png", "has the scheme"),
        ("file:///etc/passwd", "has the scheme"),
        ("ftp://images.test/", "has the scheme"),
        ("http:///cat.png", "not a valid URL"),
        ("http://[::1/", "not a valid URL"),
        ("http://images.test:99999/", "not a valid URL"),
        ("http://images.test:0/", "has the port 0"),
        ("https://me:secret@images.test/", "user names and passwords"),
        ("https://me@images.test/", "user names and passwords"),
        ("https://me:secret@images.test:99999/", "not a valid URL"),
        ("https://images.test/" + "x" * 9000, "characters; at most 8,192"),
    ],
)
def test_urls_that_are_not_understood(url, message):
    assert "secret" not in refused_alone(url, "media_url_invalid", message, allowed_hosts=["*"])


@pytest.mark.parametrize(
    "host",
    ["a..test", "x" * 64 + ".test", "x." * 127 + "test", "a b.test", "\ud800.test", "a\x00b.test", "."],
)
def test_hosts_that_cannot_be(host):
    refused_alone(f"http://{host}/", "media_url_invalid", allowed_hosts=["*"])


def test_paths_and_queries_stay_out_of_messages():
    message = refused(
        lambda _: web.Response(status=404), "media_unreachable", "status 404", path="/hidden?token=hidden"
    )
    assert "hidden" not in message
    assert "images.test" in message


@pytest.mark.parametrize(
    ("url", "code", "message"),
    [
        ("data:", "media_url_invalid", "write data:image/png;base64"),
        ("data:image/png,abc", "media_url_invalid", "write data:image/png;base64"),
        ("data:image/png;base64,%%%%", "media_url_invalid", "not valid base64"),
        ("data:image/png;base64,QUJ", "media_url_invalid", "not valid base64"),
        ("data:image/png;base64,QUJ\u00e9", "media_url_invalid", "not valid base64"),
        ("data:image/png;base64,", "media_format", "is empty"),
        ("data:text/html;base64,QUJD", "media_format", "its type is 'text/html'"),
        ("data:image/svg+xml;base64,QUJD", "media_format", "its type is 'image/svg"),
        ("data:;base64,QUJD", "media_format", "its type is ''"),
    ],
)
def test_data_urls_that_are_wrong(url, code, message):
    refused_alone(url, code, message)


# ----------------------------------------------------------------------------------------------- sizes


def test_the_byte_limit_is_exact():
    assert fetched(picture, max_bytes=len(PNG)).size == (4, 3)
    refused(picture, "media_too_large", "more than", max_bytes=len(PNG) - 1)
    assert fetched_alone(data_url(PNG), max_bytes=len(PNG)).size == (4, 3)
    refused_alone(data_url(PNG), "media_too_large", "more than", max_bytes=len(PNG) - 1)


def test_a_length_that_is_too_large_is_refused_before_the_body():
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000000\r\n\r\n"
    refused(head, "media_too_large", "more than 20,971,520 bytes")


def test_an_endless_body_is_cut_off():
    sent = 0

    async def answer(request):
        nonlocal sent
        response = web.StreamResponse()
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            while True:
                await response.write(bytes(10_000))
                sent += 10_000
        return response

    refused(answer, "media_too_large", max_bytes=100_000)
    assert sent < 20_000_000  # what fits into the buffers in between


@pytest.mark.parametrize(
    ("declared", "code"),
    [(len(PNG) + 100, "media_unreachable"), ("many", "media_unreachable")],
)
def test_lengths_that_are_not_true(declared, code):
    refused(f"HTTP/1.1 200 OK\r\nContent-Length: {declared}\r\n\r\n".encode() + PNG, code)


def test_no_more_is_read_than_the_length_says():
    with pytest.raises(MediaError):  # as a cut off image, or as an answer that goes on after its end
        fetched(f"HTTP/1.1 200 OK\r\nContent-Length: {len(PNG) - 20}\r\n\r\n".encode() + PNG)


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "identity, gzip"])
def test_compressed_answers_are_refused_unread(encoding):
    body = gzip.compress(bytes(50_000_000), 1)

    def answer(_):
        return web.Response(body=body, headers={"Content-Encoding": encoding})

    refused(answer, "media_format", "encoded as")


def test_an_answer_that_says_it_is_not_compressed():
    assert fetched(lambda _: web.Response(body=PNG, headers={"Content-Encoding": "Identity"})).size == (4, 3)


@pytest.mark.parametrize("size", [(10_000, 10_000), (1_000_000, 1_000_000)])
def test_many_pixels_in_few_bytes(size):
    assert len(bomb(*size)) < 200
    refused(lambda _: web.Response(body=bomb(*size)), "media_too_large", "pixels")
    refused_alone(data_url(bomb(*size)), "media_too_large", "pixels")


def test_the_pixel_limit_is_exact():
    assert fetched_alone(data_url(PNG), max_pixels=12).size == (4, 3)
    refused_alone(data_url(PNG), "media_too_large", "4 × 3 pixels, more than 11", max_pixels=11)


# --------------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize(
    "body",
    [
        b"<html><body>Not found</body></html>",
        b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        saved(Image.new("RGB", (4, 3)), "TIFF"),
        saved(Image.new("RGB", (4, 3)), "BMP"),
        b"",
    ],
)
def test_what_only_pretends_to_be_an_image(body):
    refused(lambda _: web.Response(body=body, content_type="image/png"), "media_format", "known format|empty")
    refused_alone(data_url(body), "media_format", "known format|empty")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_images_that_are_cut_off(kind):
    whole = saved(Image.effect_noise((64, 64), 90).convert("RGB"), kind)
    refused(lambda _: web.Response(body=whole[: len(whole) // 2]), "media_format", "cannot be decoded")


# ------------------------------------------------------------------------------- servers that do not answer


@pytest.mark.parametrize("before_headers", [True, False])
def test_servers_that_are_slow(before_headers):
    async def answer(request):
        response = web.StreamResponse()
        if not before_headers:
            await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            for _ in range(6):
                await asyncio.sleep(0.1)
                if not before_headers:
                    await response.write(b"x")
        return response

    refused(answer, "media_timeout", "within 0.2 seconds", total_seconds=0.2)


def test_redirects_share_one_time_limit():
    async def answer(request):
        await asyncio.sleep(0.1)
        return redirect(request.path + "x")

    refused(answer, "media_timeout", total_seconds=0.25, max_redirects=100)


def test_a_host_that_does_not_complete_a_connection():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        port = listener.getsockname()[1]
        with contextlib.ExitStack() as stack:
            for _ in range(4):  # the queue is full: further connections are left waiting
                waiting = stack.enter_context(socket.socket())
                waiting.setblocking(False)
                waiting.connect_ex(("127.0.0.1", port))

            async def run():
                site = Site(None)
                site.port = port
                async with fetcher(site, connect_seconds=0.1) as media:
                    await media.fetch(f"http://images.test:{port}/")

            start = time.monotonic()
            with pytest.raises(MediaError) as caught:
                asyncio.run(run())
            assert time.monotonic() - start < 0.9  # and not the 20 seconds that an image may take
    assert caught.value.code == "media_timeout"


def test_a_host_without_a_server():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        site = Site(None)
        site.port = taken.getsockname()[1]

        async def run():
            async with fetcher(site) as media:
                await media.fetch(f"http://images.test:{site.port}/")

        with pytest.raises(MediaError, match="no connection to the host") as caught:
            asyncio.run(run())
    assert caught.value.code == "media_unreachable"
    assert "127.0.0.1" not in str(caught.value)


def test_a_name_that_nobody_knows():
    assert "10.0.0.53" not in refused(picture, "media_unreachable", "no such host", names=Names(images=[[]]))


@pytest.mark.parametrize("status", [204, 206, 304, 401, 404, 500])
def test_answers_that_are_not_the_image(status):
    refused(lambda _: web.Response(status=status), "media_unreachable", f"status {status}")


@pytest.mark.parametrize("answer", [b"\x00\x01\x02 nonsense\r\n\r\n", b"", b"HTTP/1.1 302 Found\r\n\r\n"])
def test_servers_that_speak_something_else(answer):
    refused(answer, "media_unreachable")


# ------------------------------------------------------------------------------------- settings, errors


def test_settings_are_checked_and_described():
    for values in (
        {"allowed_hosts": ["https://a.test"]},
        {"max_bytes": 0},
        {"formats": ["TIFF"]},
        {"unknown": 1},
    ):
        with pytest.raises(ValidationError):
            MediaConfig(**values)
    assert all(field.description for field in MediaConfig.model_fields.values())
    assert "address_allowed" not in MediaConfig.model_fields


def test_errors_are_input_errors_and_survive_pickling():
    with pytest.raises(InputError) as caught:
        fetched_alone("data:")
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (type(copy), str(copy), copy.code) == (MediaError, str(caught.value), "media_url_invalid")
