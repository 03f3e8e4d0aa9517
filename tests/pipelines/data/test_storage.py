"""Files at HTTP URLs of servers of all kinds; refusals and temporary failures; local names of all kinds."""

import io
import json
import threading
import time
import unicodedata
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.data import storage
from pipelines.data.images import FileImage, ImageError
from pipelines.data.storage import forget_downloads
from pipelines.data.training_rows import read_training_rows
from skipvision.errors import DataError

CONVERSATION = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red"}]


def png(size=(8, 6)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (255, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


class Site:
    """A server whose behaviour a test sets: the abilities it lacks, and the answers before it is well."""

    def __init__(self):
        self.files, self.lacks, self.answers, self.headers = {"/a.png": png()}, set(), [], {}
        self.seen = []
        site = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments):
                pass

            def do_HEAD(self):
                self.answer(head=True)

            def do_GET(self):
                self.answer(head=False)

            def answer(self, head):
                site.seen.append((self.command, self.path))
                status, reach = 200, self.headers.get("Range")
                if head and "HEAD" in site.lacks:
                    status = 405
                elif site.answers:
                    status = site.answers[0] if len(site.answers) == 1 else site.answers.pop(0)
                body = site.files.get(self.path)
                if status == 200 and body is None:
                    status = 404
                if status == "silence":
                    time.sleep(1.5)
                    self.close_connection = True
                    return
                if status == "half":
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body[: len(body) // 2])
                    self.close_connection = True
                    return
                if status == "broken":
                    self.close_connection = True
                    return
                if status != 200:
                    body = b"no"
                elif reach and "ranges" not in site.lacks:
                    first, _, last = reach.removeprefix("bytes=").partition("-")
                    whole, status = body, 206
                    body = body[int(first) : int(last) + 1]
                self.send_response(status)
                for name, value in site.headers.items():
                    self.send_header(name, value)
                if status == 206:
                    self.send_header(
                        "Content-Range", f"bytes {first}-{int(first) + len(body) - 1}/{len(whole)}"
                    )
                if "says so" in site.lacks:
                    self.send_header("Accept-Ranges", "none")
                if "length" in site.lacks and status == 200:
                    self.send_header("Transfer-Encoding", "chunked")
                    body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
                else:
                    self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if not head:
                    self.wfile.write(body)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def site(monkeypatch):
    monkeypatch.setattr(storage, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(storage, "_LONGEST_PAUSE", 0.05)
    forget_downloads()
    site = Site()
    yield site
    site.server.shutdown()
    site.server.server_close()
    forget_downloads()


# ------------------------------------------------------------------------------- servers that lack abilities


LACKING = {
    "nothing": set(),
    "length": {"length"},
    "ranges": {"ranges"},
    "ranges, said": {"ranges", "says so"},
    "HEAD": {"HEAD"},
    "HEAD and length": {"HEAD", "length"},
    "HEAD and ranges": {"HEAD", "ranges"},
    "all": {"HEAD", "ranges", "length"},
}
lacking = pytest.mark.parametrize("lacks", LACKING.values(), ids=LACKING)


@lacking
def test_images(site, lacks):
    site.lacks = lacks
    image = FileImage(f"{site.url}/a.png")
    assert image.open().size == (8, 6)
    assert image.read() == png()
    image.check_exists()


@lacking
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.parquet"])
def test_files_of_rows(site, lacks, name):
    rows = [{"image": "a.png", "conversations": CONVERSATION}] * 3
    content = io.BytesIO()
    if name == "rows.parquet":
        pq.write_table(pa.Table.from_pylist([{**row, "image": png()} for row in rows]), content)
    else:
        lines = map(json.dumps, rows) if name == "rows.jsonl" else [json.dumps(rows)]
        content.write("\n".join(lines).encode())
    site.files[f"/{name}"] = content.getvalue()
    site.lacks = lacks
    data = read_training_rows(f"{site.url}/{name}")
    assert (len(data.rows), data.rejects) == (3, [])
    assert data.rows[2].images[0].open().size == (8, 6)


def test_an_image_is_one_request(site):
    FileImage(f"{site.url}/a.png").open()
    assert site.seen == [("GET", "/a.png")]


# ------------------------------------------------------------------------------ refusals and failures


KINDS = {
    404: ("missing image", 1),
    410: ("missing image", 1),
    400: ("refused image", 1),
    401: ("refused image", 1),
    403: ("refused image", 1),
    451: ("refused image", 1),
    408: ("unreachable image", 4),
    425: ("unreachable image", 4),
    429: ("unreachable image", 4),
    500: ("unreachable image", 4),
    502: ("unreachable image", 4),
    503: ("unreachable image", 4),
    501: ("refused image", 1),
    504: ("unreachable image", 4),
    505: ("refused image", 1),
    507: ("unreachable image", 4),
    520: ("unreachable image", 4),
    524: ("unreachable image", 4),
    529: ("unreachable image", 4),
    598: ("unreachable image", 4),
    "broken": ("unreachable image", 4),
    "half": ("unreachable image", 4),
}


@pytest.mark.parametrize("status", KINDS)
@pytest.mark.parametrize("lacks", [set(), {"HEAD", "length"}], ids=["able", "unable"])
def test_failures_have_kinds_of_their_own(site, status, lacks):
    kind, tries = KINDS[status]
    site.answers, site.lacks = [status], lacks
    with pytest.raises(ImageError) as caught:
        FileImage(f"{site.url}/a.png").open()
    assert caught.value.kind == kind
    assert f"{site.url}/a.png" in str(caught.value)
    assert "does not exist" in str(caught.value) or kind != "missing image"
    assert isinstance(status, str) or kind == "missing image" or str(status) in str(caught.value)
    assert len([path for method, path in site.seen if method == "GET"]) >= tries
    if status != "half":  # only the status is read
        with pytest.raises(ImageError) as caught:
            FileImage(f"{site.url}/a.png").check_exists()
        assert caught.value.kind == kind


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504, 520, 524, "broken", "half"])
@pytest.mark.parametrize("times", [1, 3])
def test_temporary_failures_are_repeated(site, status, times):
    site.answers = [status] * times + [200]
    assert FileImage(f"{site.url}/a.png").open().size == (8, 6)
    assert len(site.seen) == times + 1


@pytest.mark.parametrize("lacks", [set(), {"HEAD", "length"}], ids=["able", "unable"])
def test_endless_redirects(site, lacks):
    site.answers, site.lacks, site.headers["Location"] = [302], lacks, "/a.png"
    for read in (FileImage.open, FileImage.read, FileImage.check_exists):
        with pytest.raises(ImageError, match="the server redirects without end") as caught:
            read(FileImage(f"{site.url}/a.png"))
        assert caught.value.kind == "refused image"
    with pytest.raises(DataError, match="the server redirects without end"):
        read_training_rows(f"{site.url}/rows.jsonl")


@pytest.mark.parametrize("scheme", ["http", "HTTP", "Http"])
def test_schemes_in_any_case(site, tmp_path, scheme):
    url = site.url.replace("http", scheme)
    site.files["/rows.jsonl"] = json.dumps({"image": "a.png", "conversations": CONVERSATION}).encode()
    assert FileImage(f"{url}/a.png").open().size == (8, 6)
    assert FileImage(f"{url}/a.png").read() == png()
    assert read_training_rows(f"{url}/rows.jsonl").rejects == []
    (tmp_path / "a.png").write_bytes(png())
    row = {"image": f"FILE://{tmp_path}/a.png", "conversations": CONVERSATION}
    (tmp_path / "rows.json").write_text(json.dumps([row, {**row, "image": f"{url}/a.png"}]))
    assert read_training_rows(f"FILE://{tmp_path}/rows.json").rejects == []


def test_silence_is_a_temporary_failure(site, monkeypatch):
    import aiohttp

    monkeypatch.setattr(storage, "_TIMEOUT", aiohttp.ClientTimeout(total=0.3))
    site.answers = ["silence", 200]
    assert FileImage(f"{site.url}/a.png").open().size == (8, 6)


def test_a_port_that_nobody_listens_on_is_unreachable(site):
    site.server.shutdown()
    site.server.server_close()
    with pytest.raises(ImageError) as caught:
        FileImage(f"{site.url}/a.png").open()
    assert (caught.value.kind, "4 tries" in str(caught.value)) == ("unreachable image", True)


@pytest.mark.parametrize(
    ("given", "pause"),
    [("2", 2), ("0", 0), ("86400", 30), ("9" * 40, 30), ("soon", 1), ("-5", 1), ("", 1), ("date", 7)],
)
def test_retry_after_is_honoured_within_bounds(site, monkeypatch, given, pause):
    pauses = []
    monkeypatch.setattr(storage, "_FIRST_PAUSE", 1.0)
    monkeypatch.setattr(storage, "_LONGEST_PAUSE", 30.0)
    monkeypatch.setattr(storage.time, "sleep", pauses.append)
    site.headers["Retry-After"] = formatdate(time.time() + 8, usegmt=True) if given == "date" else given
    site.answers = [503, 200]
    FileImage(f"{site.url}/a.png").open()
    assert pauses == [pytest.approx(pause, abs=1.1 if given == "date" else 0)]


def test_a_dead_host_does_not_cost_all_its_repetitions_for_every_image(site):
    site.answers = [503]
    for number in range(6):
        with pytest.raises(ImageError):
            FileImage(f"{site.url}/{number}.png").open()
    assert len(site.seen) == 3 * 4 + 3
    site.answers = []
    FileImage(f"{site.url}/a.png").open()
    site.answers = [503, 200]
    assert FileImage(f"{site.url}/a.png").open().size == (8, 6)


@pytest.mark.parametrize(
    ("status", "reason"), [(403, "403 Forbidden"), (503, "503 Service"), (404, "does not")]
)
def test_files_of_rows_that_a_server_does_not_give(site, status, reason):
    site.answers = [status]
    with pytest.raises(DataError, match=reason):
        read_training_rows(f"{site.url}/rows.jsonl")


def test_rejects_name_the_kind(site, tmp_path):
    (tmp_path / "a.json").write_text(
        json.dumps([{"image": f"{site.url}/a.png", "conversations": CONVERSATION}])
    )
    site.answers = [403]
    for check in ("decode", "exists"):
        (reject,) = read_training_rows(str(tmp_path / "a.json"), check_images=check).rejects
        assert (reject.kind, "403 Forbidden" in reject.reason) == ("refused image", True)


def test_a_local_image_without_permission_is_refused(unprivileged):
    (unprivileged / "a.png").write_bytes(png())
    (unprivileged / "a.png").chmod(0)
    with pytest.raises(ImageError) as caught:
        FileImage(str(unprivileged / "a.png")).open()
    assert caught.value.kind == "refused image"


# ---------------------------------------------------------------------------------------- local names

NAMES = {
    "cloud drive": "My Drive/été #1 100%",
    "brackets": "set [v2]",
    "question mark": "what?",
    "star": "a*b",
    "colon": "12:30",
    "two colons": "a::b",
    "protocol": "zip:x",
    "quotes": 'it\'s "new"',
    "dash": "-rf",
    "trailing space": "photos ",
    "leading space": " photos",
    "braces": "{a,b}",
    "dollar": "$HOME",
    "tilde": "~x",
    "percent escape": "a%20b",
    "ampersand": "R&D;x",
    "backslash": "a\\b",
    "line break": "a\nb",
    "composed": unicodedata.normalize("NFC", "été"),
    "decomposed": unicodedata.normalize("NFD", "été"),
    "Japanese": "写真",
    "emoji": "📷",
}
names = pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)


@names
def test_images_and_rows_in_folders_with_any_name(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir(parents=True)
    (folder / "a.png").write_bytes(png())
    (folder / f"{folder.name}.png").write_bytes(png())
    rows = [{"image": image, "conversations": CONVERSATION} for image in ("a.png", f"{folder.name}.png")]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for source in (folder / "rows.jsonl", folder / "*.jsonl", f"file://{folder}/rows.jsonl"):
        data = read_training_rows(str(source))
        assert (len(data.rows), data.rejects) == (2, [])
    inside = [{"image": f"{folder}/a.png", "conversations": CONVERSATION}]
    (tmp_path / "outside.json").write_text(json.dumps(inside))
    assert read_training_rows(str(tmp_path / "outside.json"), check_images="exists").rejects == []


@pytest.mark.parametrize("stored", ["NFC", "NFD"])
@pytest.mark.parametrize("given", ["NFC", "NFD"])
def test_a_name_is_found_in_either_normal_form(tmp_path, stored, given):
    folder = tmp_path / unicodedata.normalize(stored, "été") / "é"
    folder.mkdir(parents=True)
    (folder / unicodedata.normalize(stored, "ü.png")).write_bytes(png())
    path = unicodedata.normalize(given, f"{tmp_path}/été/") + folder.name + "/ü.png"
    assert FileImage(path).open().size == (8, 6)


def test_a_file_url_may_be_escaped(tmp_path):
    (tmp_path / "My Drive").mkdir()
    (tmp_path / "My Drive/a.png").write_bytes(png())
    row = {"image": f"file://{tmp_path}/My%20Drive/a.png", "conversations": CONVERSATION}
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    assert read_training_rows(str(tmp_path / "rows.json")).rejects == []
