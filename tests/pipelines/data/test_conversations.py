"""Records become rows: both formats, every notation of images, every reason for rejection."""

import base64
import io

import pytest
from PIL import Image

from pipelines.data.conversations import parse_row
from pipelines.data.images import FileImage, InlineImage
from pipelines.data.rows import BadRow, Message

HUMAN = {"from": "human", "value": "<image>\nWhat colour is it?"}
GPT = {"from": "gpt", "value": "red"}
SYSTEM = {"role": "system", "content": "Be brief."}
IMAGE_PART = {"type": "image"}


def parse(value):
    return parse_row(value, key="a", image_root="/root", max_pixels=100)


def llava(*turns, **fields):
    return {"conversations": list(turns), **fields}


def chat(*messages, **fields):
    return {"messages": list(messages), **fields}


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def texts(row):
    return [message.text for message in row.messages]


def test_llava_turns_become_messages():
    system = {"from": "system", "value": "Be brief."}
    row = parse(llava(system, HUMAN, GPT, image="a.png", task="colour"))
    assert row.messages == (
        Message("system", "Be brief."),
        Message("user", "<image>\nWhat colour is it?"),
        Message("assistant", "red"),
    )
    assert (row.key, row.images, row.task) == ("a", (FileImage("/root/a.png", 100),), "colour")


def test_parts_become_lines_and_images_placeholders():
    parts = [{"type": "text", "text": "Compare"}, IMAGE_PART, {"type": "text", "text": "with"}, IMAGE_PART]
    row = parse(chat(SYSTEM, user(parts), assistant("same"), images=["a", "b"]))
    assert texts(row) == ["Be brief.", "Compare\n<image>\nwith\n<image>", "same"]
    assert [image.path for image in row.images] == ["/root/a", "/root/b"]


@pytest.mark.parametrize(
    ("last", "images"),
    [("Sure?", 2), ("And <image>?", 3), ([IMAGE_PART, {"type": "text", "text": "And this?"}], 3)],
)
@pytest.mark.parametrize("system", [[], [SYSTEM]], ids=["", "system"])
def test_a_question_at_the_end_is_left_out_with_its_images(last, images, system):
    turns = [*system, user("<image> or <image>?"), assistant("the first"), user(last)]
    row = parse(chat(*turns, images=["a", "b", "c"][:images]))
    assert row.messages[-1] == Message("assistant", "the first")
    assert [image.path for image in row.images] == ["/root/a", "/root/b"]


def test_a_question_at_the_end_in_the_format_of_llava():
    row = parse(llava(HUMAN, GPT, {"from": "human", "value": "Sure?"}, image="a.png"))
    assert [message.role for message in row.messages] == ["user", "assistant"]


@pytest.mark.parametrize(
    "absent", [{}, {"image": None}, {"image": ""}, {"images": []}, {"image": "", "images": None}]
)
def test_rows_without_an_image(absent):
    assert parse(chat(user("Hello"), assistant("Hi"), **absent)).images == ()


def png():
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(buffer, "PNG")
    return buffer.getvalue()


BASE64 = base64.b64encode(png()).decode()
DATA_URL = f"data:image/png;base64,{BASE64}"


@pytest.mark.parametrize(
    ("given", "path"),
    [
        ("a.png", "/root/a.png"),
        ("/b/a.png", "/b/a.png"),
        ("s3://bucket/a.png", "s3://bucket/a.png"),
        (["a.png"], "/root/a.png"),
        ({"path": "a.png"}, "/root/a.png"),
        ({"url": "https://host/a.png"}, "https://host/a.png"),
        ({"bytes": None, "path": "a.png"}, "/root/a.png"),
    ],
)
def test_images_by_reference(given, path):
    assert parse(llava(HUMAN, GPT, image=given)).images == (FileImage(path, 100),)


@pytest.mark.parametrize("given", [DATA_URL, {"url": DATA_URL}, {"bytes": BASE64, "path": "elsewhere.png"}])
def test_images_in_the_row(given):
    (image,) = parse(llava(HUMAN, GPT, image=given)).images
    assert image == InlineImage(png(), "#1 of row a", 100)
    assert image.open().getpixel((0, 0)) == (255, 0, 0)


BAD_RECORDS = [
    (["no", "object"], "the row is of type list, expected an object"),
    ({"conversations": "text"}, "`conversations` is of type str, expected a list"),
    (llava("text"), "message 1 is of type str, expected an object"),
    (llava({"from": "human", "value": 3}), "`value` of message 1 is of type int, expected text"),
    (llava({"from": "human"}), "`value` of message 1 is missing"),
    (chat(user([{"type": "song"}])), "part that is neither text nor image: {'type': 'song'}"),
    (chat(user([{"type": "text"}])), "part that is neither text nor image: {'type': 'text'}"),
    (chat(user(["text"])), "part that is neither text nor image: 'text'"),
    (llava(HUMAN, GPT, image=3), "image #1 of row a is of type int"),
    (llava(HUMAN, GPT, image=["a.png", None]), "image #2 of row a is missing"),
    (llava(HUMAN, GPT, image={"file": "a.png"}), "image #1 of row a is missing"),
    (llava(HUMAN, GPT, image={"bytes": [1, 2]}), "image #1 of row a is of type list"),
    (llava(HUMAN, GPT, image="a", images=["b"]), "the row has both `image` and `images`"),
    (llava(HUMAN, GPT, image="a", task=3), "`task` is of type int, expected text"),
]
BAD_CONVERSATIONS = [
    ({}, "neither `conversations` nor `messages`"),
    (llava(), "the conversation is empty"),
    (chat(SYSTEM), "the conversation is empty"),
    (llava(HUMAN), "no assistant answer"),
    (chat(SYSTEM, user("Hello")), "no assistant answer"),
    (llava(GPT, HUMAN), "message 1 is by assistant, expected user"),
    (chat(SYSTEM, assistant("Hi")), "message 2 is by assistant, expected user"),
    (llava(HUMAN, HUMAN, GPT), "message 2 is by user, expected assistant"),
    (chat(user("Hello"), assistant("Hi"), SYSTEM), "message 3 is by system, expected user"),
    (llava({"from": "bot", "value": "Hi"}), "unknown `from` 'bot'; known: human, user, gpt"),
    (chat({"role": "narrator", "content": "Hi"}), "unknown `role` 'narrator'"),
    (chat({"role": ["user"], "content": "Hi"}), "unknown `role` ['user']"),
    (chat({"content": "Hi"}), "unknown `role` None"),
    (llava(HUMAN, {"from": "gpt", "value": " \n"}), "message 2 (assistant) has no text"),
    (chat(user([]), assistant("Hi")), "message 1 (user) has no text"),
]
BAD_PLACEHOLDERS = [
    (chat(user("What?"), assistant("red"), images=["a"]), "0 <image> placeholders for 1 image; put"),
    (chat(user("What?"), assistant("red"), images=["a"]), r'put "<image>\n" at the start of the first user'),
    (llava(HUMAN, GPT), "1 <image> placeholder for 0 images"),
    (llava(HUMAN, GPT, image=["a", "b"]), "1 <image> placeholder for 2 images"),
    (llava(HUMAN, GPT, HUMAN, GPT, image="a"), "2 <image> placeholders for 1 image"),
    (chat(user("What?"), assistant("<image>"), images=["a"]), "<image> is in message 2 (assistant)"),
    (chat(user([IMAGE_PART]), assistant("<image>"), images=["a"]), "<image> is in message 2 (assistant)"),
]
BAD_IMAGES = [
    (llava(HUMAN, GPT, image="data:image/png,abc"), "data URL that is not base64: 'data:image/png'"),
    (llava(HUMAN, GPT, image="data:image/png;base64"), "data URL that is not base64"),
    (llava(HUMAN, GPT, image="data:image/png;base64,a?c"), "image #1 of row a is not valid base64"),
    (llava(HUMAN, GPT, image={"bytes": "é"}), "image #1 of row a is not valid base64"),
]


@pytest.mark.parametrize(
    ("kind", "value", "reason"),
    [("broken record", *case) for case in BAD_RECORDS]
    + [("conversation", *case) for case in BAD_CONVERSATIONS]
    + [("placeholders", *case) for case in BAD_PLACEHOLDERS]
    + [("unreadable image", *case) for case in BAD_IMAGES],
)
def test_bad_rows_are_rejected_with_a_reason(kind, value, reason):
    with pytest.raises(BadRow) as caught:
        parse(value)
    assert caught.value.kind == kind
    assert reason in caught.value.reason
