"""Smaller images: their costs, and that the model reads them as transformers does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaConfig

import skipvision as sv
from pipelines.data.training_rows import read_rows
from pipelines.evaluation.answering import answer_rows
from pipelines.tradeoff.pixels import (
    PIXELS_WITH_TOWER,
    ImageSizes,
    accept_smaller_images,
    save_with_side,
    with_side,
)
from skipvision.errors import ConfigError
from skipvision.testing.configs import tiny_config

TEXT = 20


@pytest.fixture(scope="module")
def sizes(tiny_model: Path) -> ImageSizes:
    return ImageSizes(LlavaConfig.from_pretrained(tiny_model), TEXT)


def test_costs_are_those_of_a_model_of_this_size(sizes, tiny_model):
    assert (sizes.patch, sizes.patches) == (14, 4)
    whole = sizes.costs(56)
    assert (whole.language_flops, whole.prefill_flops, whole.kv_bytes) == (1, 1, 1)
    config = LlavaConfig.from_pretrained(tiny_model)
    full = sv.predict_cost(config, None, text_tokens=TEXT)
    config.vision_config.image_size, config.image_seq_length = 28, 4
    small = sv.predict_cost(config, None, text_tokens=TEXT)
    found = sizes.costs(28)
    assert found.prefill_flops == pytest.approx(small.prefill_flops / full.prefill_flops)
    decoder = (small.prefill_flops - small.vision_flops) / (full.prefill_flops - full.vision_flops)
    assert found.language_flops == pytest.approx(decoder)
    assert found.kv_bytes == pytest.approx((4 + TEXT) / (16 + TEXT))


def test_the_largest_image_within_a_budget_is_found(sizes, capsys):
    spent = sv.SkipConfig(retained=8, skipped=0, merge="drop", summary_tokens=0, select="norm")
    # With the tower counted, a smaller image may spend what its own tower saves.
    assert list(sizes.within(0.99, spent)) == [("pixels", 42), (PIXELS_WITH_TOWER, 42)]
    assert list(sizes.within(sizes.costs(28).language_flops, None)) == [("pixels", 28)]
    assert list(sizes.within(0.01, None)) == []
    assert "pixels: an image of one patch costs more than 1.0% of the full prefill" in capsys.readouterr().out
    sizes.check(28)
    for side in (30, 0, 70):
        with pytest.raises(ConfigError, match=f"pixel_sides: {side} is not a multiple of the patch size 14"):
            sizes.check(side)


def test_a_smaller_image_is_read_as_with_interpolated_positions(tiny_model, shapes_data):
    processor = AutoProcessor.from_pretrained(tiny_model)
    model = AutoModelForImageTextToText.from_pretrained(tiny_model, dtype=torch.float64).eval()
    [row, *_] = read_rows(str(shapes_data / "test.json"))
    image = row.images[0].open()
    smaller = with_side(processor, 28)
    inputs = smaller(text=["<image> ?"], images=[image], return_tensors="pt")
    pixels = inputs["pixel_values"].double()
    assert pixels.shape[2:] == (28, 28)
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 4
    assert processor(text=["<image> ?"], images=[image], return_tensors="pt")["pixel_values"].shape[2:] == (
        56,
        56,
    )
    with torch.no_grad():
        tower = model.model.vision_tower
        expected = tower(pixels, interpolate_pos_encoding=True).last_hidden_state
        accept_smaller_images(model)
        assert torch.equal(tower(pixels).last_hidden_state, expected)
        model(input_ids=inputs["input_ids"], pixel_values=pixels)


def test_answers_to_images_of_the_own_size_do_not_change(tiny_model, shapes_data):
    rows = read_rows(str(shapes_data / "test.json"))[:2]
    processor = AutoProcessor.from_pretrained(tiny_model)

    def answers(engine: sv.Engine, side: int) -> list[str]:
        found = answer_rows(engine, rows, max_new_tokens=6, processor=with_side(processor, side))
        return [one.answer for one in found]

    model = AutoModelForImageTextToText.from_pretrained(tiny_model, dtype=torch.float64)
    with sv.Engine(model, processor, sv.SkipConfig.full(), max_sequences=4) as engine:
        expected = [one.answer for one in answer_rows(engine, rows, max_new_tokens=6)]
        accept_smaller_images(model)
        assert answers(engine, 56) == expected
        assert len(answers(engine, 28)) == 2


def test_a_model_of_another_size_computes_what_the_hooked_one_does(tiny_model, shapes_data, tmp_path):
    save_with_side(str(tiny_model), 28, tmp_path / "small")
    small = AutoModelForImageTextToText.from_pretrained(tmp_path / "small", dtype=torch.float64).eval()
    model = AutoModelForImageTextToText.from_pretrained(tiny_model, dtype=torch.float64).eval()
    accept_smaller_images(model)
    [row, *_] = read_rows(str(shapes_data / "test.json"))
    given = {"text": ["<image> ?"], "images": [row.images[0].open()], "return_tensors": "pt"}
    inputs = AutoProcessor.from_pretrained(tmp_path / "small")(**given)
    other = with_side(AutoProcessor.from_pretrained(tiny_model), 28)(**given)
    assert all(torch.equal(inputs[name], other[name]) for name in ("input_ids", "pixel_values"))
    pixels = inputs["pixel_values"].double()
    with torch.no_grad():
        found, expected = (
            one(input_ids=inputs["input_ids"], pixel_values=pixels).logits for one in (small, model)
        )
    assert torch.allclose(found, expected, atol=1e-6)
    assert small.config.image_seq_length == 4
    with pytest.raises(ConfigError, match="pixel_sides: 30 is not a multiple"):
        save_with_side(str(tiny_model), 30, tmp_path / "none")


def test_towers_that_cannot_read_smaller_images_are_refused():
    with pytest.raises(ConfigError, match="pixels: qwen2_5_vl does not read images of one size"):
        ImageSizes(tiny_config("qwen2_5_vl"), TEXT)
    with pytest.raises(ConfigError, match="tower cannot interpolate the positions"):
        accept_smaller_images(torch.nn.Linear(1, 1))
