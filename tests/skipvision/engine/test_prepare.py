"""Requests of text and images, with a real processor and a real checkpoint."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from pipelines.data.chat import encode
from skipvision import ConfigError, Engine, InputError, Request, Sampling, SkipConfig, attach
from skipvision.engine import prepare

CONFIG = SkipConfig(retained=4, skipped=6)


@pytest.fixture(scope="module")
def parts(tiny_model):
    model = AutoModelForImageTextToText.from_pretrained(tiny_model)
    return model.eval(), AutoProcessor.from_pretrained(tiny_model)


def noise(seed, size=(70, 50)):
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def chat(text, images=1):
    content = [{"type": "image"}] * images + [{"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


def test_text_and_messages_are_answered_as_generate_does(parts):
    model, processor = parts
    requests = [
        Request("<image> what is it?", [noise(0)], key="text"),
        Request(chat("what is it?"), [noise(1)], key="chat"),
        Request(chat("which is it?", 2), [noise(2), noise(3, (40, 90))], key="two"),
        Request("only words", key="words"),
    ]
    with Engine(model, processor, CONFIG) as engine:
        completions = {c.key: c for c in engine.run(requests)}
    for request in requests:
        prompt = request.prompt
        if not isinstance(prompt, str):
            prompt = processor.apply_chat_template(prompt, add_generation_prompt=True)
        inputs = processor(text=[prompt], images=list(request.images) or None, return_tensors="pt")
        with attach(model, CONFIG):
            output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
        answer = output[0, inputs["input_ids"].shape[1] :]
        completion = completions[request.key]
        assert completion.error is None
        assert completion.choices[0].token_ids == tuple(answer.tolist())
        assert completion.text == processor.decode(answer, skip_special_tokens=True)
        assert completion.usage.prompt_tokens == inputs["input_ids"].shape[1]
        assert completion.usage.visual_total == 16 * len(request.images)


def test_a_request_prepared_elsewhere_has_the_same_answer(parts):
    model, processor = parts
    request = Request(chat("what is it?"), [noise(0)], sampling=Sampling(max_new_tokens=9))
    ready = prepare(processor, request)
    assert ready.inputs is not None
    assert all(isinstance(value, torch.Tensor) and len(value) == 1 for value in ready.inputs.values())
    assert prepare(processor, ready) is ready
    with Engine(model, None, CONFIG) as engine:
        (here,) = engine.run([ready])
    with Engine(model, processor, CONFIG) as engine:
        (there,) = engine.run([request])
    assert here.choices[0].token_ids == there.choices[0].token_ids
    assert (here.text, bool(there.text)) == ("", True)


def test_a_template_with_a_bos_token_gets_no_second_one(parts):
    _, processor = parts
    tokenizer = processor.tokenizer
    tokenizer.bos_token = "<pad>"
    special = []

    class Watched:
        tokenizer = processor.tokenizer

        def apply_chat_template(self, messages, **options):
            return "<pad>" + processor.apply_chat_template(messages, **options)

        def __call__(self, **options):
            special.append(options.get("add_special_tokens", True))
            return processor(**options)

    try:
        prepare(Watched(), Request(chat("hm"), [noise(0)]))
        prepare(Watched(), Request("<pad><image> hm", [noise(0)]))
    finally:
        tokenizer.bos_token = None
    assert special == [False, True]


def test_an_error_of_the_processor_is_an_input_error(parts):
    model, processor = parts
    with Engine(model, processor, CONFIG) as engine:
        good, bad = (
            Request(chat("hm"), [noise(0)], key="good"),
            Request(chat("hm", 2), [noise(0)], key="bad"),
        )
        completions = {c.key: c for c in engine.run([good, bad, good])}
    assert completions["good"].error is None
    assert isinstance(completions["bad"].error, InputError)
    with Engine(model, None, CONFIG) as engine, pytest.raises(InputError, match="no processor"):
        engine.submit(good)


def test_a_tokenizer_that_panics_refuses_one_request(tiny_model, tmp_path):
    """Its pattern takes too many steps, and the Rust library raises a BaseException."""
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    pattern = {"Regex": "(a+)+$"}
    tokenizer["pre_tokenizer"] = {
        "type": "Split",
        "pattern": pattern,
        "behavior": "Isolated",
        "invert": False,
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    processor = AutoProcessor.from_pretrained(folder)
    with pytest.raises(
        InputError, match=r"the processor rejects this request \(PanicException\): .*retry-limit"
    ):
        prepare(processor, Request("a" * 40 + "!"))
    assert prepare(processor, Request("what?")).inputs is not None
    with pytest.raises(ConfigError, match="the tokenizer of LlavaProcessor fails on a text"):
        encode(processor, ["a" * 40 + "!"], [[]], padding_side="left")
