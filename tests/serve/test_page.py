"""The page at `/`: its files, the overlay that it draws, and its use in a real browser."""

import base64
import json
import re
from importlib.util import find_spec
from pathlib import Path

import httpx2 as httpx
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import serve.page
from serve.reporting import problem_of
from skipvision import SkipConfig, UnsupportedModelError, load_adapter
from skipvision.analysis import patches_of
from skipvision.attach import attachment_of
from skipvision.engine import Request, prepare
from skipvision.merge import MERGES
from skipvision.select import CRITERIA
from tests.serve.browser import CHROMIUM, DRIVER, MISSING, Page, browser
from tests.serve.conftest import SKIP, eventually, noise, question

FOLDER = Path(serve.page.__file__).parent
FILES = sorted(path.name for path in FOLDER.iterdir() if path.suffix in {".css", ".js"})

in_browser = pytest.mark.skipif(not (CHROMIUM and DRIVER and find_spec("selenium")), reason=MISSING)


def overlay(endpoint, messages, **fields):
    body = {"model": "red", "messages": messages, **fields}
    return httpx.post(f"{endpoint.url}/v1/overlay", json=body, timeout=60)


# ------------------------------------------------------------------------------------ what is served


@pytest.mark.parametrize("path", ["/", *(f"/page/{name}" for name in FILES)])
def test_files_are_served_under_a_strict_policy(endpoint, path):
    found = httpx.get(endpoint.url + path)
    assert found.status_code == 200
    assert found.text == (FOLDER / (path.removeprefix("/page/") if path != "/" else "index.html")).read_text()
    policy = found.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    kinds = {".css": "text/css", ".js": "text/javascript", "": "text/html"}
    assert found.headers["content-type"].startswith(kinds[Path(path).suffix])


@pytest.mark.parametrize("path", ["/", "/page/page.js"])
def test_a_browser_that_has_a_file_is_not_sent_it_again(endpoint, path):
    first = httpx.get(endpoint.url + path)
    for name, given in (("If-None-Match", "etag"), ("If-Modified-Since", "last-modified")):
        again = httpx.get(endpoint.url + path, headers={name: first.headers[given]})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == first.headers["etag"]
    other = httpx.get(endpoint.url + path, headers={"If-None-Match": '"another"'})
    assert (other.status_code, other.content) == (200, first.content)


def test_no_other_files_are_served(endpoint):
    for name in ("__init__.py", "..%2fkeys.py", "index.html", "nothing.js"):
        assert httpx.get(f"{endpoint.url}/page/{name}").status_code == 404, name
    operations = {
        path: set(methods)
        for path, methods in httpx.get(f"{endpoint.url}/openapi.json").json()["paths"].items()
    }
    assert (operations["/"], operations["/v1/overlay"]) == ({"get"}, {"post"})


def test_the_defaults_of_the_page_are_those_of_skipconfig():
    text = re.search(r"const DEFAULTS = '(.*)';", (FOLDER / "settings.js").read_text())[1]
    assert SkipConfig(**json.loads(text)["skip"]).model_dump_json() == SkipConfig().model_dump_json()


# --------------------------------------------------------------------------------------- the overlay


def test_the_overlay_equals_the_librarys(endpoint):
    found = overlay(endpoint, question("what?", 1, 2))
    assert found.status_code == 200
    base = AutoModelForImageTextToText.from_pretrained(endpoint.model)
    processor, config = AutoProcessor.from_pretrained(endpoint.model), base.config
    model = load_adapter(base, endpoint.adapters["red"])
    chat = [{"role": "user", "content": [{"type": "image"}] * 2 + [{"type": "text", "text": "what?"}]}]
    images = [noise(1), noise(2)]
    inputs = prepare(processor, Request(chat, images)).inputs
    with torch.no_grad():
        model(**inputs)
    right = patches_of(attachment_of(model).plan, inputs, [image.size for image in images], processor, config)
    assert found.json()["data"] == [
        {"object": "overlay", **json.loads(json.dumps(one.as_json()))} for one in right
    ]


@pytest.mark.parametrize(
    ("skip", "fates"),
    [
        (None, {"retained": 4, "skipped": 6, "merged": 6}),
        ("full", {"retained": 16}),
        (
            {"retained": 0.5, "skipped": 2, "merge": "drop", "select": "ffn_ratio"},
            {"retained": 8, "skipped": 2, "dropped": 6},
        ),
    ],
)
def test_the_overlay_has_the_counts_of_the_answer(endpoint, skip, fates):
    (found,) = overlay(endpoint, question(), skip=skip).json()["data"]
    drawn = [patch["fate"] for patch in found["patches"]]
    assert {fate: drawn.count(fate) for fate in set(drawn)} == fates
    body = {"model": "red", "messages": question(), "skip": skip, "max_tokens": 1}
    answer = httpx.post(f"{endpoint.url}/v1/chat/completions", json=body, timeout=60).json()
    visual = answer["usage"]["visual_tokens"]
    assert (visual["retained"], visual["skipped"]) == (fates["retained"], fates.get("skipped", 0))


def test_a_request_may_name_a_criterion_that_only_the_environment_of_the_endpoint_names(endpoint):
    """Ingress and engine import the module in `SKIPVISION_METHODS`; see `local_ray`."""
    assert "earliest" not in CRITERIA
    skip = {"retained": 4, "skipped": 6, "select": "earliest"}
    body = {"model": "tiny", "messages": question(), "skip": skip, "max_tokens": 1}
    answer = httpx.post(f"{endpoint.url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    (found,) = overlay(endpoint, question(), model="tiny", skip=skip).json()["data"]
    retained = [number for number, patch in enumerate(found["patches"]) if patch["fate"] == "retained"]
    assert retained == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"messages": [{"role": "user", "content": "no image"}]}, 400, "needs an image"),
        ({"model": "green"}, 404, "'green' does not exist"),
        ({"skip": {"retained": -1}}, 400, "skip.retained"),
        ({"skip": "some"}, 400, "full"),
    ],
)
def test_requests_without_a_possible_overlay_are_refused(endpoint, change, status, message):
    body = {"model": "red", "messages": question(), **change}
    found = httpx.post(f"{endpoint.url}/v1/overlay", json=body, timeout=60)
    assert found.status_code == status
    assert message in found.json()["error"]["message"]


def test_an_unsupported_model_family_is_a_bad_request():
    problem = problem_of(UnsupportedModelError("how fuyu cuts an image is not known"))
    assert (problem.status, problem.message) == (400, "how fuyu cuts an image is not known")


# --------------------------------------------------------------------------------- in a real browser


@pytest.fixture(scope="module")
def driver():
    with browser() as driver:
        yield driver


@pytest.fixture
def photo(tmp_path):
    """An image that is two patches wider than high, so that it is cropped."""
    file = tmp_path / "photo.png"
    noise(7, (84, 56)).save(file)
    return file


@in_browser
def test_a_question_is_answered_twice(endpoint, driver, photo):
    page = Page(driver, f"{endpoint.url}/")
    page.ready()
    assert page.find("#model").get_attribute("value") == "red"
    assert page.find("#retained").get_attribute("value") == str(SKIP["retained"])
    page.ask(photo, "what <b>is</b> it?")
    assert not page.find("#error").is_displayed()

    whole, reduced = page.numbers("full"), page.numbers("skip")
    assert (whole["visual"], whole["retained"], whole["cached"]) == (16, 16, 16)
    assert (reduced["visual"], reduced["retained"], reduced["skipped"], reduced["cached"]) == (16, 4, 6, 6)
    assert reduced["kv"] < whole["kv"]
    for numbers in (whole, reduced):
        assert 0 < numbers["first"] <= numbers["total"]
        assert numbers["answer"] > 0
    assert page.counts() == {"retained": 4, "skipped": 6, "merged": 6}
    # Another client gets the same answers from the API.
    url = f"data:image/png;base64,{base64.b64encode(photo.read_bytes()).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what <b>is</b> it?"}]
    for pane, skip in (("full", "full"), ("skip", None)):
        body = {"model": "red", "messages": [{"role": "user", "content": parts}], "temperature": 0}
        body |= {"max_tokens": 64, "skip": skip}
        answer = httpx.post(f"{endpoint.url}/v1/chat/completions", json=body, timeout=60).json()
        text = answer["choices"][0]["message"]["content"]
        assert page.find(f"#{pane} .answer").get_attribute("textContent").strip() == text.strip()
        assert page.numbers(pane)["prompt"] == answer["usage"]["prompt_tokens"]
        assert page.numbers(pane)["kv"] == answer["usage"]["kv_bytes"]

    description = page.point("g.merged rect")
    assert re.fullmatch(r"Row \d, column \d: merged into row \d, column \d, which is \w+", description)
    assert driver.find_elements("css selector", "rect.at, line.group")
    page.find("#legend label").click()
    assert "no-retained" in page.find("#panels").get_attribute("class")

    assert page.console() == []
    loaded = page.loaded()
    assert f"{endpoint.url}/v1/overlay" in loaded
    assert [url for url in loaded if not url.startswith((endpoint.url, "data:"))] == []


@in_browser
@pytest.mark.parametrize(
    ("target", "event"),
    [
        ("#stage", "new DragEvent('drop', {dataTransfer: files, bubbles: true, cancelable: true})"),
        ("#question", "new ClipboardEvent('paste', {clipboardData: files, bubbles: true, cancelable: true})"),
    ],
)
def test_an_image_may_be_dropped_or_pasted(endpoint, driver, photo, target, event):
    page = Page(driver, f"{endpoint.url}/")
    page.ready()
    content = base64.b64encode(photo.read_bytes()).decode()
    page.driver.execute_script(
        f"""const bytes = Uint8Array.from(atob(arguments[0]), (one) => one.charCodeAt(0));
        const files = new DataTransfer();
        files.items.add(new File([bytes], "photo.png", {{ type: "image/png" }}));
        const event = {event};
        document.querySelector(arguments[1]).dispatchEvent(event);""",
        content,
        target,
    )
    page.until(f"document.querySelector('#panels img')?.src === 'data:image/png;base64,{content}'")
    page.find("#ask").click()
    page.until("document.getElementById('ask').textContent === 'Ask'")
    assert page.counts() == {"retained": 4, "skipped": 6, "merged": 6}


@in_browser
def test_an_answer_may_be_stopped(endpoint, driver, photo):
    page = Page(driver, f"{endpoint.url}/")
    page.ready()
    page.find("#file").send_keys(str(photo))
    page.until("document.querySelector('#panels img') !== null")
    page.find("#max-tokens").clear()
    page.find("#max-tokens").send_keys("400")
    page.driver.execute_script(
        """const stop = (_, observer) => { observer.disconnect(); document.getElementById("ask").click(); };
        const answer = document.querySelector("#full .answer");
        new MutationObserver(stop).observe(answer, { childList: true, characterData: true });"""
    )
    page.find("#ask").click()
    page.until("document.getElementById('full').dataset.state === 'stopped'")
    page.until("document.getElementById('ask').textContent === 'Ask'")
    assert "Stopped." in page.find("#full").text
    assert page.find("#full .answer").text
    assert page.find("#skip").get_attribute("data-state") == "empty"
    assert not page.find("#error").is_displayed()

    def running():
        return httpx.get(f"{endpoint.url}/healthz").json()["models"]["tiny"]["running"]

    eventually(lambda: not running())


@in_browser
def test_the_page_offers_every_method_that_the_endpoint_knows(endpoint, driver):
    """Also those of other packages, of which this process knows nothing."""
    page = Page(driver, f"{endpoint.url}/")
    page.ready()
    for name, methods, further in (("select", CRITERIA, ["earliest"]), ("merge", MERGES, [])):
        offered = driver.execute_script(
            f"return [...document.getElementById('{name}').options].map(o => o.value)"
        )
        assert offered == [*methods, *further]
        assert page.find(f"#{name}").get_attribute("value") == "similarity"


@in_browser
def test_requests_use_the_settings_on_the_page(endpoint, driver, photo):
    page = Page(driver, f"{endpoint.url}/")
    page.ready()
    page.find("#skipping summary").click()
    for name, value in (("retained", "1.0"), ("skipped", "0")):
        page.find(f"#{name}").clear()
        page.find(f"#{name}").send_keys(value)
    assert "retained 100 %, skipped 0" in page.find("#amounts").text
    page.ask(photo, "what is it?")
    assert page.counts() == {"retained": 16}
    page.find("#retained").clear()
    page.find("#retained").send_keys("1")
    page.ask(photo, "what is it?")
    assert page.counts() == {"retained": 1, "merged": 15}


@in_browser
@pytest.mark.parametrize(
    ("reason", "note", "typed", "counts"),
    [
        (
            {},
            "No engine has reported the settings",
            None,
            {"retained": 4, "skipped": 6, "merged": 6},
        ),
        (
            {"not_loaded": "its registry does not respond"},
            "red is not loaded yet: its registry does not respond.",
            "2",
            {"retained": 2, "skipped": 6, "merged": 8},
        ),
    ],
)
def test_a_model_that_no_engine_has_reported_can_be_used(
    endpoint, driver, photo, reason, note, typed, counts
):
    card = {"id": "red", "object": "model", "skip": None, **reason}
    first_card = f"""const real = window.fetch;
        let first = Response.json({json.dumps(card)});
        window.fetch = async (path, ...more) => {{
          if (path !== "v1/models/red" || !first) return real(path, ...more);
          const card = first;
          first = null;
          return card;
        }};"""
    added = driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": first_card})
    page = Page(driver, f"{endpoint.url}/")
    driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)
    page.ready()
    assert note in page.find("#assumed").text
    assert page.find("#retained").get_attribute("value") == "100"
    if typed:
        page.find("#skipping summary").click()
        page.find("#retained").clear()
        page.find("#retained").send_keys(typed)
    page.ask(photo, "what is it?")
    assert not page.find("#error").is_displayed()
    assert not page.find("#assumed").is_displayed()
    assert page.counts() == counts


@in_browser
def test_the_page_shows_the_messages_of_api_errors(endpoint, guarded, driver, photo, tmp_path):
    page = Page(driver, guarded.url.removesuffix("v1"))
    page.until("!document.getElementById('key-field').hidden")
    assert page.find("#error").is_displayed()
    page.find("#key").send_keys("sk-skip-wrong\n")
    refusal = httpx.get(f"{guarded.url}/models", headers={"Authorization": "Bearer sk-skip-wrong"})
    message = refusal.json()["error"]["message"]
    page.until(f"document.getElementById('error').textContent === {json.dumps(message)}")
    page.find("#key").clear()
    page.find("#key").send_keys(guarded.bob + "\n")
    page.ready()
    assert not page.find("#error").is_displayed()
    page.ask(photo, "what is it?")
    assert page.counts()["retained"] == SKIP["retained"]

    other = tmp_path / "image.bmp"  # the browser shows it, the endpoint refuses it
    noise().save(other)
    page.ask(other, "what is it?")
    assert "its type is 'image/bmp'" in page.find("#error").text
    body = page.find("body").text
    assert body.count("its type is") == 1


@in_browser
@pytest.mark.parametrize("content", [b"not an image", b"", b"\x89PNG\r\n\x1a\n"])
def test_a_file_that_is_no_image_is_refused_once_and_not_shown(endpoint, driver, photo, tmp_path, content):
    page = Page(driver, f"{endpoint.url}/")
    page.ready()
    page.find("#file").send_keys(str(photo))
    page.until("document.querySelector('#panels img') !== null")
    broken = tmp_path / "broken.png"
    broken.write_bytes(content)
    before = page.find("#panels img").get_attribute("src")
    page.find("#file").send_keys(str(broken))
    message = "broken.png is not an image that this browser can show"
    page.until(f"document.getElementById('error').textContent.startsWith({json.dumps(message)})")
    assert page.find("body").text.count(message) == 1
    images = driver.find_elements("css selector", "#panels img")
    assert [image.get_attribute("src") for image in images] == [before]
