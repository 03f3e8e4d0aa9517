"""Which SkipConfig applies to a request of vLLM, and which ones are refused. These tests run without vLLM."""

import pytest

from skipvision import SkipConfig, register_criterion
from skipvision.errors import ConfigError
from skipvision.integrations.vllm.image_settings import ImageSettings, from_tensors
from skipvision.integrations.vllm.settings import Settings
from skipvision.select import CRITERIA
from skipvision.testing.llava import tiny_llava

PRUNED = SkipConfig(retained=5, skipped=0)


@pytest.fixture(scope="module")
def model_config():
    return tiny_llava().config


@pytest.fixture
def server():
    return Settings(PRUNED, summary_tokens=1, positions="shared")


def test_a_request_without_settings_gets_the_default(server, model_config):
    assert server.of_request(None, model_config) is PRUNED


def test_fields_of_a_request_replace_those_of_the_default(server, model_config):
    assert server.of_request({"retained": 3}, model_config) == SkipConfig(retained=3, skipped=0)


@pytest.mark.parametrize("value", ["full", {"retained": 1.0, "skipped": 0, "summary_tokens": 0}])
def test_full_tokens_have_one_form(value, server, model_config):
    assert server.of_request(value, model_config) == SkipConfig.full()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("ful", "'ful': expected 'full' or an object"),
        (64, "=64: expected 'full' or an object"),
        ({"retained": -1}, "retained=-1"),
        ({"retain": 3}, "retain=3: no such field"),
        ({"select": "attention"}, "'attention' reads the decoder"),
        ({"select": "vision_attention"}, "'vision_attention' reads the vision tower"),
        ({"drop_after": 1}, "drop_after=1: in vLLM all layers have the same tokens"),
        ({"size_bias": True}, "size_bias=True: vLLM's paged attention takes no bias"),
        ({"select": "relevance"}, "'relevance' reads the prompt"),
        ({"select": "views"}, "this model sees one view"),
        ({"summary_tokens": 2}, "has 1: use 0 or 1"),
        ({"skipped": 4, "map_skipped": 1}, "map_skipped=1: expected true or false"),
    ],
)
def test_wrong_values_are_named(value, message, server, model_config):
    with pytest.raises(ConfigError, match=message):
        server.of_request(value, model_config)


def test_skipped_tokens_are_refused_with_the_retained_count_of_equal_flops(server, model_config):
    with pytest.raises(ConfigError, match=r"skipped=8: .*The same FLOPs pay for retained=\d+, skipped=0"):
        server.of_request({"skipped": 8}, model_config)


def test_skipped_tokens_are_mapped_on_request(server, model_config):
    mapped = server.of_request({"skipped": 8, "map_skipped": True}, model_config)
    assert mapped.skipped == 0
    assert 5 < mapped.retained < 13


def test_without_skip_ffn_a_skipped_token_costs_as_much_as_a_retained_one(server, model_config):
    mapped = server.of_request({"skipped": 8, "map_skipped": True, "skip_ffn": False}, model_config)
    assert mapped.retained == 13


def test_a_merge_that_makes_skipped_tokens_is_mapped_to_one_that_does_not(server, model_config):
    mapped = server.of_request({"skipped": 8, "merge": "pool", "map_skipped": True}, model_config)
    assert (mapped.merge, mapped.skipped) == ("similarity", 0)


@pytest.mark.parametrize(("positions", "refused"), [("none", "original"), ("own", "contiguous")])
def test_positions_that_the_server_cannot_give_are_refused(positions, refused, model_config):
    server = Settings(SkipConfig.full(), positions=positions)
    with pytest.raises(ConfigError, match=f"positions='{refused}'"):
        server.of_request({"retained": 3, "positions": refused}, model_config)


def test_a_server_that_cannot_prune_says_why_and_still_answers_with_full_tokens(model_config):
    server = Settings(SkipConfig.full(), refused="of the weather")
    assert server.of_request("full", model_config) == SkipConfig.full()
    with pytest.raises(ConfigError, match="because of the weather"):
        server.of_request({"retained": 3}, model_config)


def test_a_criterion_of_another_package_runs_only_as_the_default(model_config, monkeypatch):
    def by_chance(tokens, counts, seed):
        return tokens.features.sum(-1)

    by_chance.__module__ = "elsewhere"
    monkeypatch.setattr(CRITERIA, "_methods", dict(CRITERIA._methods))  # other tests list them
    register_criterion("elsewhere", by_chance)
    own = SkipConfig(retained=3, skipped=0, summary_tokens=0, select="elsewhere")
    assert Settings(own, positions="shared").of_request({"retained": 2}, model_config).retained == 2
    with pytest.raises(ConfigError, match="select='elsewhere' belongs to another package"):
        Settings(PRUNED, positions="shared", summary_tokens=1).of_request(
            {"select": "elsewhere"}, model_config
        )


def test_settings_survive_the_way_to_another_process(server):
    assert Settings.from_json(server.as_json()) == server


def test_settings_of_images_survive_the_way_to_the_worker():
    images = [ImageSettings(256, PRUNED), ImageSettings(576, SkipConfig(retained=0.5, skipped=0))]
    assert from_tensors([image.as_tensor() for image in images]) == images


@pytest.mark.parametrize(
    ("config", "kept", "span", "full"),
    [
        (PRUNED, 6, 16, False),
        (SkipConfig(retained=5, skipped=0, positions="contiguous"), 6, 6, False),
        (SkipConfig.full(), 16, 16, True),
        (SkipConfig(retained=40, skipped=0, summary_tokens=0), 16, 16, True),
    ],
)
def test_an_image_knows_its_tokens_and_positions(config, kept, span, full):
    image = ImageSettings(16, config)
    assert (image.kept, image.span, image.is_full) == (kept, span, full)
