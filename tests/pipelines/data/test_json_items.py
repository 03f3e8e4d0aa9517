"""A list read in windows has the same elements as a list read whole."""

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.data import json_items as module
from pipelines.data.json_items import json_items

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(VALUES, max_size=6), st.integers(1, 9), st.booleans(), st.sampled_from([None, 1]))
def test_the_elements_do_not_depend_on_the_windows(values, chunk, ascii_only, indent):
    text = json.dumps(values, ensure_ascii=ascii_only, indent=indent).encode("utf-8", "surrogatepass")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK", chunk)
        if b"\xed" in text:  # perhaps a lone surrogate, which is not UTF-8
            return
        assert list(json_items(io.BytesIO(text))) == values


@pytest.mark.parametrize(
    "text", ["", "{}", "[1", "[1,]", "[1 2]", "[1] 2", '["a]', "[,]", '[{"a": }]', "[1]]"]
)
def test_anything_but_a_list_is_rejected(text):
    with pytest.raises(ValueError, match=r": line 1, character \d+ of the file|utf-8"):
        list(json_items(io.BytesIO(text.encode())))


def test_only_a_window_of_the_stream_is_in_memory():
    class Endless(io.RawIOBase):
        def __init__(self):
            self.given = 0

        def read(self, size=-1):
            assert 0 < size < 10 * module._CHUNK
            self.given += size
            return (b"[" if self.given == size else b"") + b'"' + b"x" * (size - 4) + b'",'

    items = json_items(Endless())
    assert [len(next(items)) > 1000 for _ in range(50)] == [True] * 50


def test_an_error_after_many_windows_has_its_position(monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 100)
    text = b"[" + b"1,\n" * 10_000 + b"oops]"
    with pytest.raises(ValueError, match="line 10001, character 30002"):
        list(json_items(io.BytesIO(text)))
