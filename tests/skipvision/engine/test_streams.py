"""`TextStream` splits no character and releases no part of a stop string."""

import pytest

from skipvision.engine.streams import TextStream


@pytest.mark.parametrize("text", ["añb→c", "日本語テキスト", "👩‍👩‍👧 ok", "plain"])
def test_no_character_is_split(text):
    data = text.encode()
    stream = TextStream(lambda ids: bytes(ids).decode(errors="replace"))
    released = [stream.push(byte) for byte in data]
    released.append(stream.finish())
    assert "".join(released) == stream.text == text
    assert not any("�" in part for part in released)


def test_half_a_character_at_the_end_becomes_a_replacement_character():
    stream = TextStream(lambda ids: bytes(ids).decode(errors="replace"))
    released = [stream.push(byte) for byte in "aé".encode()[:2]]
    assert released == ["a", ""]
    assert stream.finish() == "�"


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("hello END more", ("END",), "hello "),
        ("hello EN more", ("END",), "hello EN more"),
        ("aaab", ("aab",), "a"),
        ("abcabd", ("abd", "cab"), "ab"),
        ("xEN", ("END",), "xEN"),
        ("END", ("END",), ""),
    ],
)
def test_stop_strings_across_tokens(text, stops, expected):
    for size in (1, 2, 3, 20):
        pieces = [text[at : at + size] for at in range(0, len(text), size)]
        stream = TextStream(lambda ids, pieces=pieces: "".join(pieces[i] for i in ids), stops)
        for number in range(len(pieces)):
            stream.push(number)
            assert expected.startswith(stream.text)
            if stream.stopped:
                break
        stream.finish()
        assert stream.text == expected
        assert stream.stopped == any(stop in text for stop in stops)
