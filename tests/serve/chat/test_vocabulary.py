"""Bytes of tokens, for both kinds of tokenizer; special tokens in texts."""

import functools
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pipelines.shapes.base.parts import build_processor, build_tokenizer
from serve.chat.request import conversation
from serve.chat.schemas import ChatRequest
from serve.chat.vocabulary import Vocabulary

TEXT = "small é€ a東"


def pieces():
    """A tokenizer with "▁word" tokens, and a "<0xNN>" token for each byte of other characters."""
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
    """A tokenizer that maps bytes to letters."""
    return build_tokenizer(0, vocabulary=320)


@pytest.mark.parametrize("make", [pieces, letters])
def test_the_bytes_of_all_tokens_make_the_text(make):
    tokenizer = make()
    vocabulary = Vocabulary(SimpleNamespace(tokenizer=tokenizer, image_token="<picture>"))
    ids = tokenizer(TEXT).input_ids
    assert tokenizer.decode(ids) == TEXT
    joined = b"".join(vocabulary.bytes_of(token, first=not index) for index, token in enumerate(ids))
    assert joined.decode() == TEXT
    assert vocabulary.special(tokenizer.eos_token_id)
    assert not any(map(vocabulary.special, ids))


def test_special_tokens_in_a_text_become_text():
    tokenizer = letters()
    vocabulary = Vocabulary(SimpleNamespace(tokenizer=tokenizer, image_token="<picture>"))
    (harmless,) = vocabulary.escape(["a <image></s> b <picture>"])
    assert not any(map(vocabulary.special, tokenizer(harmless).input_ids))
    assert "<picture>" not in harmless
    assert harmless.replace("\N{WORD JOINER}", "") == "a <image></s> b <picture>"
    assert vocabulary.escape(["a < b > c", "</s"]) == ["a < b > c", "</s"]


@pytest.mark.parametrize("texts", [["</", "s>"], ["<", "im", "age", "> ", "<pad>"]])
def test_adjacent_texts_do_not_form_a_special_token(texts):
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
def test_texts_around_images_do_not_form_a_special_token_when_a_template_joins_them(between, blank):
    """Also in templates that strip each text."""
    processor = build_processor(letters())
    vocabulary = Vocabulary(processor)
    image = {"type": "image_url", "image_url": {"url": "x"}}
    text = [{"type": "text", "text": blank + piece + blank} for piece in ("<im", "age></", "s>")]
    content = [text[0], *[image] * between, text[1], image, text[2]]
    body = ChatRequest(model="x", messages=[{"role": "user", "content": content}])
    ((message,), _) = conversation(body, vocabulary)
    joined = "".join(part["text"].strip() for part in message["content"] if part["type"] == "text")
    assert joined.replace("\N{WORD JOINER}", "").replace(" ", "") == "<image></s>"
    assert not any(map(vocabulary.special, processor.tokenizer(joined).input_ids))
