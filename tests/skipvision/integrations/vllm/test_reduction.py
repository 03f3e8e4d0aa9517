"""The plug-in's reduction of encoded images is the library's. These tests run without vLLM."""

import pytest
import torch

import skipvision as sv
from skipvision import SkipConfig
from skipvision.integrations.vllm.image_settings import ImageSettings
from skipvision.integrations.vllm.reduction import reduce_images
from skipvision.summary import SummaryLayer
from skipvision.testing.llava import tiny_inputs, tiny_llava
from tests.skipvision.cases import train_summary

WIDTH = 8
CONFIGS = [
    SkipConfig(retained=5, skipped=0, summary_tokens=2),
    SkipConfig(retained=0.25, skipped=0, summary_tokens=0, select="norm", merge="drop"),
    SkipConfig.full(),
    SkipConfig(retained=5, skipped=0, summary_tokens=2, select="uniform", positions="contiguous"),
]


@pytest.fixture
def summary():
    layer = SummaryLayer(WIDTH, 2)
    train_summary(layer)
    return layer.requires_grad_(False)


def images(sizes, columns=WIDTH):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(size, columns, generator=generator) for size in sizes]


def test_images_of_one_batch_are_reduced_as_each_is_alone(summary):
    features = images([16, 9, 16, 20, 5, 16])
    settings = [ImageSettings(len(one), CONFIGS[n % len(CONFIGS)]) for n, one in enumerate(features)]
    together = reduce_images(features, settings, summary, WIDTH)
    for feature, setting, reduced in zip(features, settings, together, strict=True):
        (alone,) = reduce_images([feature], [setting], summary, WIDTH)
        torch.testing.assert_close(reduced.embeds, alone.embeds)
        assert reduced.source.tolist() == alone.source.tolist()
        assert len(reduced.embeds) == setting.kept


@pytest.mark.parametrize("config", CONFIGS[:2])
def test_reduced_images_are_what_the_decoder_gets_from_the_library(config):
    model = tiny_llava()
    inputs = tiny_inputs([["image", 3]])
    seen = {}
    with sv.attach(model, config) as skip, torch.no_grad():
        train_summary(skip.summary)
        decoder = model.model.language_model
        hook = decoder.register_forward_pre_hook(lambda _, __, kwargs: seen.update(kwargs), with_kwargs=True)
        model(**inputs)
        hook.remove()
        plan = skip.plan
        features = model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output[0]
        setting = ImageSettings(len(features), config)
        (reduced,) = reduce_images([features], [setting], skip.summary, features.shape[1])
    first = int((plan.roles[0] == sv.TokenRole.RETAINED).nonzero()[0])
    torch.testing.assert_close(
        reduced.embeds, seen["inputs_embeds"][0, first : first + setting.kept], rtol=0, atol=0
    )
    expected = plan.position_source[0, first : first + setting.kept] - first
    assert reduced.source.tolist() == expected.tolist()


def test_features_for_early_layers_follow_and_summaries_have_none(summary):
    (whole,) = images([16], columns=3 * WIDTH)
    setting = ImageSettings(16, SkipConfig(retained=5, skipped=0, summary_tokens=2, merge="drop"))
    (reduced,) = reduce_images([whole], [setting], summary, WIDTH)
    torch.testing.assert_close(reduced.embeds[:5], whole[reduced.source[:5]])
    assert not reduced.embeds[5:, WIDTH:].any()
    assert reduced.embeds[5:, :WIDTH].any()


def test_a_base_view_comes_first_by_select_views():
    features = images([12, 6])
    views = [torch.arange(12) >= 8, torch.arange(6) >= 2]
    config = SkipConfig(retained=4, skipped=0, summary_tokens=0, select="views")
    settings = [ImageSettings(len(one), config) for one in features]
    reduced = reduce_images(features, settings, None, WIDTH, views)
    assert [one.source.tolist() for one in reduced] == [[8, 9, 10, 11], [2, 3, 4, 5]]
