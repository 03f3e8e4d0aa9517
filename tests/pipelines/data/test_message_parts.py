"""Images inside messages are read in every common notation; videos, audio and files are refused as such."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.data.conversations import listed_images, parse_row
from pipelines.data.images import FileImage, InlineImage
from pipelines.data.rows import BadRow, TrainingRow
from pipelines.data.training_rows import read_training_rows


def png(colour="red"):
    file = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(file, "PNG")
    return file.getvalue()


BASE64 = base64.b64encode(png()).decode()
DATA_URL = f"data:image/png;base64,{BASE64}"
ANSWER = {"role": "assistant", "content": "red"}
TEXT = {"type": "text", "text": "What?"}
FILE = [FileImage("/root/a.png", 100)]
INLINE = [InlineImage(png(), "#1 of row a", 100)]
TWO = [FileImage("/root/a.png", 100), FileImage("/root/b.png", 100)]


def user(*parts, **fields):
    return {"role": "user", "content": list(parts), **fields}


def chat(*messages, **fields):
    return {"messages": [*messages, ANSWER], **fields}


def parse(value):
    return parse_row(value, key="a", image_root="/root", max_pixels=100)


def part(**fields):
    return chat(user({"type": "image", **fields}, TEXT))


READ = {
    "TRL: image": (part(image="a.png"), FILE),
    "TRL: the row's list": (chat(user({"type": "image"}, TEXT), images=["a.png"]), FILE),
    "TRL: nulls of other parts": (
        chat(
            user(
                {"type": "image", "text": None, "image": "a.png"},
                {"type": "text", "text": "What?", "image": None},
            )
        ),
        FILE,
    ),
    "TRL: an index": (
        chat(
            user({"type": "image", "index": 1}, {"type": "image", "index": 0}, TEXT),
            images=["b.png", "a.png"],
        ),
        TWO,
    ),
    "TRL: an image of the list twice": (
        chat(user({"type": "image", "index": 0}, {"type": "image", "index": 0}, TEXT), images=["a.png"]),
        FILE * 2,
    ),
    "Qwen: a path": (part(image="a.png", min_pixels=3136), FILE),
    "Qwen: a file URL": (part(image="file:///root/a.png"), FILE),
    "Qwen: a data URL": (part(image=DATA_URL), INLINE),
    "Qwen: a part without a type": (chat(user({"image": "a.png"}, {"text": "What?"})), FILE),
    "OpenAI: a URL": (
        chat(user(TEXT, {"type": "image_url", "image_url": {"url": "https://host/a.png", "detail": "low"}})),
        [FileImage("https://host/a.png", 100)],
    ),
    "OpenAI: a data URL": (chat(user(TEXT, {"type": "image_url", "image_url": {"url": DATA_URL}})), INLINE),
    "OpenAI: a URL without its object": (
        chat(user(TEXT, {"type": "image_url", "image_url": DATA_URL})),
        INLINE,
    ),
    "OpenAI: the Responses API": (
        chat(user({"type": "input_text", "text": "What?"}, {"type": "input_image", "image_url": DATA_URL})),
        INLINE,
    ),
    "transformers: path": (part(path="a.png"), FILE),
    "transformers: url": (part(url="https://host/a.png"), [FileImage("https://host/a.png", 100)]),
    "transformers: base64": (part(base64=BASE64), INLINE),
    "Hugging Face: bytes and path": (part(image={"bytes": BASE64, "path": "a.png"}), INLINE),
    "Hugging Face: a path": (part(image={"bytes": None, "path": "a.png"}), FILE),
    "Hugging Face: bytes as such": (part(image={"bytes": png(), "path": None}), INLINE),
    "Anthropic: base64": (
        part(source={"type": "base64", "media_type": "image/png", "data": BASE64}),
        INLINE,
    ),
    "Anthropic: a URL": (
        part(source={"type": "url", "url": "https://host/a.png"}),
        [FileImage("https://host/a.png", 100)],
    ),
    "ShareGPT: image of a turn": (
        {
            "conversations": [
                {"from": "human", "value": "<image>\nWhat?", "image": "a.png"},
                {"from": "gpt", "value": "red"},
            ]
        },
        FILE,
    ),
    "ShareGPT: fields of OpenAI": (
        {"conversations": [user(TEXT, {"type": "image"}), ANSWER], "image": "a.png"},
        FILE,
    ),
    "ShareGPT: under messages": (
        {
            "messages": [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "red"}],
            "image": "a.png",
        },
        FILE,
    ),
    "LLaVA: parts as the value": (
        {
            "conversations": [
                {"from": "human", "value": [{"type": "image", "image": "a.png"}, TEXT]},
                {"from": "gpt", "value": "red"},
            ]
        },
        FILE,
    ),
    "Ollama: images of a message": (chat({"role": "user", "content": "What?", "images": ["a.png"]}), FILE),
    "a system turn of parts": (
        chat(
            {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
            user(TEXT, {"type": "image", "image": "a.png"}),
        ),
        FILE,
    ),
    "a developer turn": (
        chat({"role": "developer", "content": "Be brief."}, user(TEXT, {"type": "image", "image": "a.png"})),
        FILE,
    ),
    "an answer of parts": (
        {
            "messages": [
                user({"type": "image", "image": "a.png"}, TEXT),
                {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
            ]
        },
        FILE,
    ),
    "images in two turns": (
        chat(
            user({"type": "image", "image": "a.png"}, TEXT),
            ANSWER,
            user({"type": "image", "path": "b.png"}, TEXT),
        ),
        TWO,
    ),
    "an image of the part and one of the list": (
        chat(user({"type": "image", "image": "a.png"}, {"type": "image"}, TEXT), images=["b.png"]),
        TWO,
    ),
    "others: image_path": (part(image_path="a.png"), FILE),
    "others: content": (part(content="a.png"), FILE),
    "others: image_base64": (part(image_base64=BASE64), INLINE),
    "others: a nested path": (part(image={"source": {"path": "a.png"}}), FILE),
    "Gemini: inline data": (
        chat(user({"inline_data": {"mime_type": "image/png", "data": BASE64}}, TEXT)),
        INLINE,
    ),
    "Bedrock: bytes": (
        chat(user({"image": {"format": "png", "source": {"bytes": BASE64}}}, {"text": "What?"})),
        INLINE,
    ),
    "TRL: prompt and completion": (
        {
            "prompt": [user({"type": "image"}, TEXT)],
            "completion": [ANSWER],
            "images": ["a.png"],
        },
        FILE,
    ),
    "TRL: texts": ({"prompt": "<image>What?", "completion": "red", "image": "a.png"}, FILE),
    "ms-swift: query and response": (
        {"query": "<image>What?", "response": "red", "images": ["a.png"], "system": "Be brief."},
        FILE,
    ),
    "ms-swift: a history": (
        {"query": "<image>What?", "response": "red", "images": ["a.png"], "history": [["Hi", "Hello"]]},
        FILE,
    ),
    "Alpaca": (
        {"instruction": "<image>", "input": "What?", "output": "red", "images": ["a.png"]},
        FILE,
    ),
    "the list repeats the parts": (
        chat(user({"type": "image", "image": "a.png"}, TEXT), images=["a.png"]),
        FILE,
    ),
}


@pytest.mark.parametrize("name", READ)
def test_images_inside_messages_are_read(name):
    row, images = READ[name]
    parsed = parse(row)
    assert list(parsed.images) == images
    assert sum(message.text.count("<image>") for message in parsed.messages) == len(images)
    assert "What?" in parsed.messages[-2].text
    assert parsed.messages[-1].text == "red"


@pytest.mark.parametrize("name", READ)
def test_captioning_sees_the_same_images(name):
    row, images = READ[name]
    assert len(listed_images(row)) == len(images)


def test_the_images_of_parts_in_a_parquet_file(tmp_path: Path):
    image = {"bytes": png(), "path": None}
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "image", "text": None, "image": image},
                {"type": "text", "text": "What?", "image": None},
            ],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "red", "image": None}]},
    ]
    pq.write_table(pa.Table.from_pylist([{"messages": messages}]), tmp_path / "rows.parquet")
    (row,) = read_training_rows(str(tmp_path / "rows.parquet")).rows
    assert row.images[0].open().getpixel((0, 0)) == (255, 0, 0)


REFUSED_PARTS = {
    "an index that is too large": (
        chat(user({"type": "image", "index": 1}, TEXT), images=["a"]),
        "placeholders",
        "index 1, but the row lists 1",
    ),
    "more in the list than in the parts": (
        chat(user({"type": "image", "image": "a"}, TEXT), images=["b"]),
        "placeholders",
        "1 <image> placeholder for 2 images",
    ),
    "two images in a part": (part(image="a.png", base64=BASE64), "broken record", "several images"),
    "a file of a provider": (
        chat(user({"type": "input_image", "file_id": "file-1"}, TEXT)),
        "broken record",
        "no image: expected `image`, `path`, `url`, `base64` or `source`; it has `file_id`",
    ),
    "a file of a provider in an object": (
        chat(user({"type": "image_file", "image_file": {"file_id": "file-1"}}, TEXT)),
        "broken record",
        "it has `image_file`",
    ),
    "an unknown field": (part(picture="a.png"), "broken record", "it has `picture`"),
    "preferences": ({"prompt": "<image>", "chosen": "a", "rejected": "b"}, "conversation", "`completion`"),
    "a history that is none": (
        {"query": "a", "response": "b", "history": ["c"]},
        "broken record",
        "`history` is not a list of pairs",
    ),
    "an image of the assistant": (
        {"messages": [user(TEXT), {"role": "assistant", "content": [{"type": "image", "image": "a.png"}]}]},
        "placeholders",
        "message 2 (assistant)",
    ),
    "an image of the system": (
        chat({"role": "system", "content": [{"type": "image", "image": "a.png"}]}, user(TEXT)),
        "placeholders",
        "message 1 (system)",
    ),
    "a tool turn": (
        chat(user(TEXT), {"role": "tool", "content": "4"}),
        "conversation",
        "message 2 belongs to a tool call (`role` 'tool')",
    ),
    "a function turn": (chat(user(TEXT), {"role": "function", "content": "4"}), "conversation", "tool call"),
    "an observation": (
        {
            "conversations": [
                {"from": "human", "value": "?"},
                {"from": "function_call", "value": "f()"},
                {"from": "observation", "value": "4"},
                {"from": "gpt", "value": "4"},
            ]
        },
        "conversation",
        "message 2 belongs to a tool call (`from` 'function_call')",
    ),
    "tool calls of the assistant": (
        chat(user(TEXT), {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}),
        "conversation",
        "message 2 belongs to a tool call (`tool_calls`)",
    ),
    "an answer of weight 0": (
        {"messages": [user(TEXT), {**ANSWER, "weight": 0}]},
        "conversation",
        "message 2 has `weight` 0",
    ),
}

HUMAN, GPT = {"from": "human", "value": "What?"}, {"from": "gpt", "value": "a cat"}
LLAVA = {"conversations": [HUMAN, GPT]}


def asked(text):
    return {"conversations": [{"from": "human", "value": text}, GPT]}


OTHER_MEDIA = {
    **{
        f"the field {field}": ({**LLAVA, field: value}, f"the row has `{field}`")
        for field, value in {
            "video": "a.mp4",
            "videos": ["a.mp4"],
            "audio": {"path": "a.wav", "array": [0.0]},
            "audios": ["a.wav"],
            "Video": "a.mp4",
            "video_path": "a.mp4",
            "audio_url": "https://host/a.wav",
            "sound": "a.wav",
            "speech": "a.flac",
            "wav": "a",
            "audio_paths": ["a"],
            "voice": {"path": "a.mp3", "array": [0.1]},
            "frames": ["a.png", "b.png"],
            "video_frames": [{"bytes": b"x"}],
            "clip": "a.mp4",
            "document": "a.pdf",
            "documents": ["https://host/a.pdf?x=1"],
            "pdf": "a",
            "file": "a.pdf",
            "files": ["a.docx"],
            "attachment": "data:application/pdf;base64,AAAA",
            "point_cloud": "a.ply",
            "pcd": "a",
            "mesh": "a.obj",
            "depth": "a.png",
            "media": [{"file_id": "file-1"}],
        }.items()
    },
    "a video next to an image": ({**asked("<image>\nWhat?"), "image": "a.png", "video": "a.mp4"}, "`video`"),
    "a video of a turn": ({"conversations": [{**HUMAN, "video": "a.mp4"}, GPT]}, "message 1 has `video`"),
    "the placeholder <video>": ({**asked("<video>\nWhat?"), "video": "a.mp4"}, "the row has `video`"),
    "only the placeholder <video>": (asked("<video>\nWhat?"), "`value` of message 1 has <video>"),
    "only the placeholder <audio>": (asked("What is in it?\n<audio>"), "has <audio>"),
    "a placeholder glued to the question": (asked("<speech>What?"), "has <speech>"),
    "a placeholder next to that of an image": (
        {**asked("<image> <video>\nWhat?"), "image": "a.png"},
        "<video>",
    ),
    "a numbered placeholder": (asked("<audio_1>\nWhat?"), "has <audio_1>"),
    "the placeholder of PointLLM": (asked("<point>\nWhat?"), "has <point>"),
    "the placeholder of VILA": (asked("<sound>\nWhat?"), "has <sound>"),
    "the placeholder of a point cloud": (asked("<point_cloud>\n"), "has <point_cloud>"),
    "the vision tokens of Qwen": (
        asked("<|vision_start|><|video_pad|><|vision_end|>What?"),
        "has <|video_pad|>",
    ),
    "only the placeholder of Qwen": (asked("<|video_pad|>What?"), "has <|video_pad|>"),
    **{
        f"a part of type {kind}": (chat(user({"type": kind, **fields}, TEXT)), f"part of type {kind!r}")
        for kind, fields in {
            "video": {"video": "a.mp4"},
            "video_url": {"video_url": {"url": "https://host/a.mp4"}},
            "audio": {"audio": "a.wav"},
            "audio_url": {"audio_url": "https://host/a.wav"},
            "input_audio": {"input_audio": {"data": "…", "format": "wav"}},
            "file": {"file": {"file_id": "file-1"}},
            "input_file": {"file_id": "file-1"},
            "document": {"source": {"type": "base64", "data": "…"}},
            "sound": {"sound": "a.wav"},
            "speech": {"speech": "a.wav"},
            "point_cloud": {"point_cloud": "a.ply"},
            "video_file": {"video_file": "a.mp4"},
        }.items()
    },
    "a video part without a type": (chat(user({"video": "a.mp4"}, TEXT)), "part of type 'video'"),
}


@pytest.mark.parametrize("name", REFUSED_PARTS)
def test_other_parts_and_turns_are_refused_by_name(name):
    row, kind, reason = REFUSED_PARTS[name]
    with pytest.raises(BadRow) as caught:
        parse(row)
    assert caught.value.kind == kind
    assert reason in caught.value.reason


@pytest.mark.parametrize("name", OTHER_MEDIA)
def test_rows_with_other_media_are_refused(name):
    row, reason = OTHER_MEDIA[name]
    with pytest.raises(BadRow) as caught:
        parse(row)
    assert caught.value.kind == "other media"
    assert reason in caught.value.reason


@pytest.mark.parametrize(
    "row",
    [
        {**LLAVA, "video": None},
        {**LLAVA, "videos": [], "audio": ""},
        {**LLAVA, "audio": {"path": None, "bytes": None}},
        {**LLAVA, "video_id": 7},
        {"conversations": [HUMAN, {"from": "gpt", "value": "Use the <video> tag."}]},
        asked("How long is a video?"),
        asked("What does the <video> tag do in HTML?"),
        asked("<video> is a tag of HTML. What is <audio>?"),
        asked("Explain:\n<video>\n  <source src='a.mp4'>\n</video>"),
        {**LLAVA, "video": None, "audio": False, "videos": 0},
        {**LLAVA, "document": "A long text about cats.", "speech": "Four score and seven years ago"},
        {**LLAVA, "depth": 3.5, "frames": 16, "points": [[1, 2]], "mesh": "fine", "sound": "barking"},
        {**LLAVA, "file": "coco/1.jpg", "files": ["train.json"], "clip": 0.31, "media": "newspaper"},
    ],
    ids=lambda row: json.dumps(row)[:40],
)
def test_rows_that_only_mention_other_media_are_trained(row):
    assert isinstance(parse(row), TrainingRow)


def written(file, rows):
    """Write rows as JSON lines or parquet, by the file's suffix; return its path."""
    if file.suffix == ".jsonl":
        file.write_text("\n".join(map(json.dumps, rows)))
    else:
        pq.write_table(pa.Table.from_pylist(rows), file)
    return str(file)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_file_of_videos_is_not_trained_as_text(tmp_path, suffix):
    rows = [{**LLAVA, "video": "a.mp4"}, {**LLAVA, "video": None}]
    read = read_training_rows(written(tmp_path / f"rows.{suffix}", rows))
    assert ([reject.kind for reject in read.rejects], len(read.rows)) == (["other media"], 1)


@pytest.mark.parametrize("field", ["image_path", "img", "image_url", "Image_Paths", "pixel_values", "photo"])
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_images_in_fields_that_are_not_read_are_reported(tmp_path, field, suffix):
    rows = [{**LLAVA, field: "a.png"}, {**LLAVA, field: None}]
    read = read_training_rows(written(tmp_path / f"rows.{suffix}", rows))
    (reject,) = read.rejects
    assert (reject.kind, len(read.rows)) == ("missing image", 1)
    assert f"but `{field}`, which is not read: rename the field" in reject.reason
    both = {**asked("<image>\nWhat?"), "image": "a.png", field: "a.png"}
    assert len(parse(both).images) == 1


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_columns_with_the_names_of_media_may_hold_texts_and_numbers(tmp_path, suffix):
    table = pa.table(
        {
            "conversations": [LLAVA["conversations"]] * 3,
            "speech": ["Four score", "a.wav", None],
            "frames": pa.array([16, 8, 4]),
            "video": pa.array([0, 0, 1]),
            "document": pa.array(
                [None, None, [{"bytes": b"%PDF"}]], pa.list_(pa.struct([("bytes", pa.binary())]))
            ),
        }
    )
    file = str(tmp_path / f"rows.{suffix}")
    if suffix == "parquet":
        pq.write_table(table, file)
    else:
        with pa.OSFile(file, "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    read = read_training_rows(file)
    assert [row.key for row in read.rows] == ["rows-1"]
    assert [reject.reason.split("`")[1] for reject in read.rejects] == ["speech", "document"]
