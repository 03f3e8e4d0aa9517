"""Code for older versions of transformers, also where a newer one is installed."""

from __future__ import annotations

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from inspect import signature

import pytest
import torch
from transformers import LlavaModel

from skipvision import SkipConfig, attach
from skipvision._compat import config_sections, takes_encoded
from skipvision.testing.llava import tiny_inputs, tiny_llava

CONFIG = SkipConfig(retained=4, skipped=4, select="norm", summary_tokens=0)


@pytest.fixture
def model():
    return tiny_llava()


class Older(LlavaModel):
    """An outer model that does not take encoded images, as before transformers 5.18."""

    def forward(self, input_ids=None, pixel_values=None, **kwargs):
        return super().forward(input_ids=input_ids, pixel_values=pixel_values, **kwargs)


@pytest.fixture
def older():
    """The same model, but with such an outer model."""
    model = tiny_llava()
    model.model.__class__ = Older
    assert not takes_encoded(model.model)
    return model


def test_images_that_a_model_cannot_take_encoded_are_encoded_once(model, older):
    inputs, runs = tiny_inputs([[2, "image", 3], [4, "image", "image", 1]]), []
    older.model.vision_tower.register_forward_hook(lambda *_: runs.append(1))
    with torch.no_grad(), attach(model, CONFIG), attach(older, CONFIG):
        expected = model(**inputs).logits
        assert torch.equal(older(**inputs).logits, expected)
        assert torch.equal(older(**inputs).logits, expected)
    assert len(runs) == 2


def test_two_threads_on_such_a_model_get_their_own_images(older):
    """Both have encoded their images before either uses them."""
    batches = [tiny_inputs([["image", 2]], seed=seed) for seed in range(2)]
    barrier = threading.Barrier(2, timeout=60)

    def meet(*_):
        barrier.wait()

    def run(inputs):
        with torch.no_grad():
            return older(**inputs).logits

    with attach(older, CONFIG):
        alone = [run(inputs) for inputs in batches]
        older.model.register_forward_pre_hook(meet)
        with ThreadPoolExecutor(2) as pool:
            together = list(pool.map(run, batches))
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("travel", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_such_a_model_encodes_by_itself(older, travel):
    inputs = tiny_inputs([["image", 2]])
    attach(older, CONFIG)
    twin = travel(older)
    expected = older(**inputs).logits
    assert torch.equal(twin(**inputs).logits, expected)
    with torch.no_grad():
        twin.model.multi_modal_projector.linear_1.weight.mul_(2)
    assert not torch.allclose(twin(**inputs).logits, expected)
    assert torch.equal(older(**inputs).logits, expected)


def test_such_a_model_encodes_again_after_a_failure(older):
    def fail(*_):
        raise RuntimeError("out of memory")

    inputs, others = (tiny_inputs([["image", 2]], seed=seed) for seed in range(2))
    before = {*vars(older.model)}
    with torch.no_grad(), attach(older, CONFIG):
        assert "pixel_values" in signature(older.model.get_image_features).parameters
        expected = older.model.get_image_features(others["pixel_values"]).pooler_output
        handle = older.model.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            older(**inputs)
        handle.remove()
        got = older.model.get_image_features(others["pixel_values"]).pooler_output
        assert torch.equal(torch.cat([*got]), torch.cat([*expected]))
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
