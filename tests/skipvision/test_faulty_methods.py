"""A criterion or merge of another package whose results no plan can use raises an error that names it."""

import re

import pytest
import torch

import skipvision as sv
from skipvision.anatomy.probe import Probe
from skipvision.merge import MERGES
from skipvision.select import CRITERIA, by_reading
from skipvision.testing.llava import tiny_inputs, tiny_llava
from tests.skipvision.methods import scoped

CONFIG = {"retained": 4, "skipped": 3, "select": "similarity", "merge": "similarity"}


@pytest.fixture(scope="module")
def model():
    return tiny_llava(dtype=torch.float64)


def of_shape(*shape, dtype=torch.float64):
    return torch.zeros(shape, dtype=dtype)


def everywhere(value, dtype=torch.long):
    return lambda tokens, retained, skipped: torch.full(retained.shape, value, dtype=dtype)


def themselves(tokens, retained, skipped):
    return torch.arange(retained.shape[1]).expand(retained.shape)


@pytest.mark.parametrize(
    ("score", "returned"),
    [
        (
            lambda tokens, counts, seed: tokens.redundancy * torch.nan,
            "nan for token 0 of image 0, and is not",
        ),
        (lambda tokens, counts, seed: tokens.redundancy + torch.inf, "inf for token 0 .* at 16 of 16 tokens"),
        (lambda tokens, counts, seed: of_shape(16), r"a torch.float64 tensor of shape \(16,\) on cpu"),
        (
            lambda tokens, counts, seed: of_shape(1, 15),
            r".* of shape \(1, 15\) on cpu; .* = \(1, 16\) on cpu",
        ),
        (
            lambda tokens, counts, seed: of_shape(1, 16, dtype=torch.long),
            r"a torch.int64 .* on cpu",
        ),
        (lambda tokens, counts, seed: [0.0] * 16, "list instead of a tensor"),
        (lambda tokens, counts, seed: None, "NoneType instead of a tensor"),
    ],
)
def test_a_criterion_that_returns_unusable_scores_is_named(score, returned, model):
    with scoped(sv.register_criterion("faulty", score), CRITERIA), pytest.raises(sv.ConfigError) as caught:
        run_model(model, {"select": "faulty"})
    assert re.match(f"criterion 'faulty' returned {returned}", str(caught.value))
    assert "expected finite scores of every token" in str(caught.value)


@pytest.mark.parametrize(
    ("read", "returned"),
    [
        (lambda run: of_shape(run.real.shape[1]), r"a torch.float64 tensor of shape \(\d+,\) on cpu"),
        (lambda run: of_shape(1, 3), r"a torch.float64 tensor of shape \(1, 3\) on cpu"),
        (lambda run: of_shape(*run.real.shape, 8), r"a torch.float64 tensor of shape \(1, \d+, 8\)"),
        (lambda run: run.real, "a torch.bool tensor"),
        (lambda run: of_shape(*run.real.shape).to("meta"), ".* on meta"),
        (lambda run: [0.0], "list instead of a tensor"),
        (lambda run: None, "NoneType instead of a tensor"),
    ],
)
def test_a_probe_that_returns_unusable_readings_is_named(read, returned, model):
    method = sv.register_criterion("faulty", by_reading, reads="decoder", probe=Probe(read))
    with scoped(method, CRITERIA), pytest.raises(sv.ConfigError) as caught:
        run_model(model, {"select": "faulty"})
    assert re.match(f"the probe of criterion 'faulty' returned {returned}", str(caught.value)), caught.value
    assert "a number for every token" in str(caught.value)


@pytest.mark.parametrize(
    ("ends", "returned"),
    [
        (everywhere(99), "99 as the end of token .*; expected the index of a token of the same image, or -1"),
        (everywhere(-2), "-2 as the end of token .*; expected the index of a token of the same image, or -1"),
        (
            themselves,
            "12 tokens of image 0 that end in themselves; expected exactly 3 of the tokens that are",
        ),
        (everywhere(-1), "0 tokens of image 0 that end in themselves; expected exactly 3"),
        (
            lambda tokens, retained, skipped: themselves(tokens, retained, skipped).roll(1, dims=1),
            "expected a token that ends in itself or is retained",
        ),
        (
            lambda tokens, retained, skipped: of_shape(16, dtype=torch.long),
            r"a torch.int64 .* \(16,\) on cpu",
        ),
        (everywhere(0.0, torch.float32), "a torch.float32 tensor .*: an integer tensor"),
        (everywhere(False, torch.bool), "a torch.bool tensor"),
        (lambda tokens, retained, skipped: None, "NoneType instead of a tensor"),
    ],
)
def test_a_merge_that_returns_unusable_ends_is_named(ends, returned, model):
    with scoped(sv.register_merge("faulty", ends), MERGES), pytest.raises(sv.ConfigError) as caught:
        run_model(model, {"merge": "faulty"})
    assert re.match(f"merge 'faulty' returned .*{returned}", str(caught.value)), caught.value


def test_ends_at_padding_and_retained_tokens_do_not_count(model):
    """The rest here drops all but the first three; anything may stand elsewhere."""

    def ends(tokens, retained, skipped):
        rest = tokens.valid & ~retained
        survives = rest & (rest.cumsum(dim=1) <= skipped[:, None])
        kept = torch.where(survives, torch.arange(rest.shape[1]), -1)
        return torch.where(rest, kept, 12345)

    with scoped(sv.register_merge("sound", ends), MERGES):
        plan = run_model(model, {"merge": "sound"})
    assert int((plan.roles == sv.TokenRole.SKIPPED).sum()) == 3


def run_model(model, methods):
    inputs = tiny_inputs([["image", 5]], dtype=torch.float64)
    with torch.no_grad(), sv.attach(model, sv.SkipConfig(**CONFIG | methods)) as skip:
        model(**inputs)
    return skip.plan
