"""Baselines at equal cost keep exactly as many tokens as a share of the prefill pays for."""

import pytest
import torch

from skipvision import ConfigError, SkipConfig, attach, predict_cost
from skipvision.baselines import BASELINES, at_cost, language_share, of_size
from skipvision.testing.llava import tiny_inputs, tiny_llava

SIDE, WORDS = 8, 12


@pytest.fixture(scope="module")
def model():
    return tiny_llava(side=SIDE, hidden_size=64, intermediate_size=224)


@pytest.mark.parametrize("fraction", [0.6, 0.85, 1.0])
@pytest.mark.parametrize("name", BASELINES)
def test_a_method_keeps_as_many_tokens_as_its_budget_allows(model, name, fraction):
    def share(skip):
        return language_share(predict_cost(model.config, skip, text_tokens=WORDS, new_tokens=1))

    skip = at_cost(model.config, name, fraction, text_tokens=WORDS)
    left = skip.retained + skip.skipped
    assert share(skip) <= fraction
    assert left == SIDE**2 or share(of_size(skip, left + 1)) > fraction
    assert skip.select == BASELINES[name].select
    with torch.no_grad(), attach(model, skip) as attached:
        model(**tiny_inputs([["image", WORDS]], side=SIDE))
    counts = skip.counts(SIDE**2)
    kept = counts.retained + counts.skipped
    assert int((attached.plan.group >= 0).sum()) == kept
    full_path = int(attached.plan.ffn_mask.sum()) - WORDS
    assert full_path == kept or name == "skip-vision", (
        "every token that a baseline keeps takes the whole decoder"
    )


def test_a_config_keeps_its_proportions(model):
    skip = at_cost(model.config, SkipConfig(retained=30, skipped=10, select="norm"), 0.7, text_tokens=WORDS)
    assert skip.select == "norm"
    assert skip.retained == pytest.approx(3 * skip.skipped, abs=2)


def test_impossible_budgets_and_methods_are_refused(model):
    with pytest.raises(ConfigError, match="no baseline 'fast'; choose one of random, uniform, downscaled"):
        at_cost(model.config, "fast", 0.5)
    with pytest.raises(ConfigError, match=r"'fastv' with 1 visual tokens costs .* 5\.0% is too little"):
        at_cost(model.config, "fastv", 0.05)
    with pytest.raises(ConfigError, match=r"retained=0 and skipped=0 leave no tokens"):
        at_cost(model.config, SkipConfig(retained=0, skipped=0, merge="drop"), 0.5)
