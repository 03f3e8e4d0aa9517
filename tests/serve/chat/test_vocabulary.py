"""Tokens as bytes, for both ways in which tokenizers write words; special tokens in texts."""

import functools
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pipelines.shapes.base_parts import build_processor, build_tokenizer
from serve.chat.request import conversation
from serve.chat.schemas import ChatRequest
from serve.chat.vocabulary import Vocabulary

TEXT = "small é€ a東"


def pieces():
    """Words as "▁word", other characters as "<0xNN>" for each byte."""
    words = ["<unk>", "</s>", "▁small", "▁a", "▁", *(f"<0x{byte:02X}>" for byte in range(256))]
    model = models.Unigram([(word, -1.0) for word in words], unk_id=0, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


@functools.cache
def letters():
    """Bytes as letters."""
    return build_tokenizer(0, vocabulary=320)


@pytest.mark.parametrize("make", [pieces, letters])
def test_the_bytes_of_all_tokens_are_those_of_the_text(make):
    tokenizer = make()
    vocabulary = Vocabulary(SimpleNamespace(tokenizer=tokenizer, image_token="<picture>"))
    ids = tokenizer(TEXT).input_ids
    assert tokenizer.decode(ids) == TEXT
    told = b"".join(vocabulary.bytes_of(token, first=not place) for place, token in enumerate(ids))
    assert told.decode() == TEXT
    assert vocabulary.special(tokenizer.eos_token_id)
    assert not any(map(vocabulary.special, ids))


def test_special_tokens_of_a_text_become_text():
    tokenizer = letters()
    vocabulary = Vocabulary(SimpleNamespace(tokenizer=tokenizer, image_token="<picture>"))
    (harmless,) = vocabulary.escape(["a <image></s> b <picture>"])
    assert not any(map(vocabulary.special, tokenizer(harmless).input_ids))
    assert "<picture>" not in harmless
    assert harmless.replace("\N{WORD JOINER}", "") == "a <image></s> b <picture>"
    assert vocabulary.escape(["a < b > c", "</s"]) == ["a < b > c", "</s"]


@pytest.mark.parametrize("texts", [["</", "s>"], ["<", "im", "age", "> ", "<pad>"]])
def test_texts_side_by_side_make_no_special_token(texts):
    processor = build_processor(letters())
    vocabulary = Vocabulary(processor)

    def special(texts):
        content = [{"type": "text", "text": text} for text in texts]
        content.append({"type": "image_url", "image_url": {"url": "x"}})
        body = ChatRequest(model="x", messages=[{"role": "user", "content": [*content, *content]}])
        messages, urls = conversation(body, vocabulary)
        assert list(urls) == [
            f"messages.0.content.{place}.image_url.url" for place in (len(texts), 2 * len(texts) + 1)
        ]
        prompt = processor.apply_chat_template(messages, tokenize=False)
        assert prompt.replace("\N{WORD JOINER}", "").count("".join(texts)) == 2
        return list(filter(vocabulary.special, processor.tokenizer(prompt).input_ids))

    assert special(texts) == special(["a", "b"])


@pytest.mark.parametrize("between", [1, 2])
@pytest.mark.parametrize("blank", ["", " "])
def test_texts_around_images_make_no_special_token_in_templates_that_put_images_first(between, blank):
    """Nor in those that trim each text."""
    processor = build_processor(letters())
    vocabulary = Vocabulary(processor)
    image = {"type": "image_url", "image_url": {"url": "x"}}
    text = [{"type": "text", "text": blank + piece + blank} for piece in ("<im", "age></", "s>")]
    content = [text[0], *[image] * between, text[1], image, text[2]]
    body = ChatRequest(model="x", messages=[{"role": "user", "content": content}])
    ((said,), _) = conversation(body, vocabulary)
    joined = "".join(part["text"].strip() for part in said["content"] if part["type"] == "text")
    assert joined.replace("\N{WORD JOINER}", "").replace(" ", "") == "<image></s>"
    assert not any(map(vocabulary.special, processor.tokenizer(joined).input_ids))
