"""Code for older versions of transformers, also where a newer one is installed."""

from __future__ import annotations

import pytest
import torch

from skipvision import SkipConfig, attach
from skipvision._compat import config_sections, takes_encoded
from skipvision.testing.llava import tiny_inputs, tiny_llava

CONFIG = SkipConfig(retained=4, skipped=4, select="norm", summary_tokens=0)


@pytest.fixture
def model():
    return tiny_llava()


@pytest.fixture
def older(model):
    """The same model, but its outer model does not take encoded images, as before transformers 5.18."""
    copy = tiny_llava()
    forward = copy.model.forward

    def takes_pixels(input_ids=None, pixel_values=None, **kwargs):
        return forward(input_ids=input_ids, pixel_values=pixel_values, **kwargs)

    copy.model.forward = takes_pixels
    assert not takes_encoded(copy.model)
    return copy


def test_images_that_a_model_cannot_take_encoded_are_encoded_once(model, older):
    inputs, runs = tiny_inputs([[2, "image", 3], [4, "image", "image", 1]]), []
    older.model.vision_tower.register_forward_hook(lambda *_: runs.append(1))
    with torch.no_grad(), attach(model, CONFIG), attach(older, CONFIG):
        expected = model(**inputs).logits
        assert torch.equal(older(**inputs).logits, expected)
        assert torch.equal(older(**inputs).logits, expected)
    assert len(runs) == 2


def test_nothing_stays_on_such_a_model_after_a_failure(older):
    def fail(*_):
        raise RuntimeError("out of memory")

    before = {*vars(older.model)}
    with attach(older, CONFIG):
        handle = older.model.language_model.layers[0].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            older(**tiny_inputs([["image", 2]]))
        handle.remove()
        assert {*vars(older.model)} == before


def test_sections_of_a_config_have_their_class_and_options():
    config = type(tiny_llava().config)
    sections = config_sections(config, vars(config()), always="vision_config")
    assert {name: section.cls.model_type for name, section in sections.items()} == {
        "text_config": "llama",
        "vision_config": "clip_vision_model",
    }
    assert sections["vision_config"].options["image_size"] == 336
    assert sections["text_config"].options == {}
