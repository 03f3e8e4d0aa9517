"""Decoding on a pruned cache equals decoding on the full one with masked keys, in every family."""

from __future__ import annotations

import torch
from packaging.version import Version

from skipvision import SkipConfig, attach
from skipvision.testing.families import tiny_batch
from tests.skipvision.cases import train_summary
from tests.skipvision.families import reference
from tests.skipvision.families.matrix import (
    DROPPING,
    FAMILIES,
    LOSSY_STATES,
    MERGING,
    ROWS,
    TOLERANCE,
    combinations,
    model_of,
)
from tests.skipvision.families.running import close, new_cache, say, states_of
from tests.skipvision.family_table import VERSION


def compare(model, config, converse):
    """Return the states of all tokens after the first prompt; ``converse`` takes the tokens of each turn."""
    with attach(model, config) as skip:
        train_summary(skip.summary)
        torch.manual_seed(0)
        got, words = states_of(model, lambda: converse([4, 3]))
        assert not skip.plan.is_identity
    seen = reference.watch(model, lambda: converse(words))
    fate = reference.decide([skip.plan], seen)
    expected = reference.hidden_states(model, seen, fate, config, skip.summary)
    prompt = skip.plan.merged_into.shape[1]
    tolerance = 10 * TOLERANCE if model.config.model_type in LOSSY_STATES else TOLERANCE
    close(got[:, prompt:], expected[:, prompt:], tolerance)
    return got[:, prompt:]


@combinations(turn=1, halved=True)
def test_pruned_decoding_is_masked_decoding(family, attention, dtype):
    model = model_of(family, attention, dtype)
    batch = tiny_batch(model, ROWS)

    def converse(turns):
        return [say(model, batch, turns[0])[0]]

    remembering = MERGING.model_copy(update={"skip_kv": False})
    forgetful, complete = (compare(model, config, converse) for config in (MERGING, remembering))
    assert not torch.equal(forgetful, complete)


@combinations(turn=2, halved=True)
def test_a_second_turn_after_a_pruned_cache(family, attention, dtype):
    model = model_of(family, attention, dtype)
    batch = tiny_batch(model, ROWS)
    question = tiny_batch(model, [[25]] * len(ROWS), seed=1)["input_ids"]

    def converse(turns):
        words, out = say(model, batch, turns[0])
        # The last token is not in the cache yet.
        ids = torch.cat([words[:, -1:], question], dim=1)
        mask = torch.cat([batch["attention_mask"], torch.ones_like(words), torch.ones_like(question)], dim=1)
        second = {"input_ids": ids, "attention_mask": mask}
        return [words, say(model, second, turns[1], past_key_values=out.past_key_values)[0]]

    compare(model, DROPPING, converse)
    compare(model, MERGING, converse)


@torch.no_grad()
def another_image(model, config, first_image, second_image, words=25):
    """Run a turn with an image after a pruned cache, at positions of one joint call; return both plans."""
    begins, goes_on = [3, first_image, words], [2, second_image, 24]
    first, second = tiny_batch(model, [begins]), tiny_batch(model, [goes_on], seed=1)
    whole = tiny_batch(model, [begins + goes_on])
    begin, end = first["input_ids"].shape[1], first["input_ids"].shape[1] + second["input_ids"].shape[1]
    positions = reference.watch(model, lambda: model(**whole)).positions
    if positions.ndim == 2:
        positions = torch.arange(end)[None]
    assert positions.shape[-1] == end
    second["attention_mask"] = torch.ones(1, end, dtype=torch.long)
    plans = []

    def run():
        cache = model(**first, use_cache=True, past_key_values=new_cache(model)).past_key_values
        plans.append(skip.plan)
        return model(**second, position_ids=positions[..., begin:], past_key_values=cache, use_cache=True)

    with attach(model, config) as skip:
        train_summary(skip.summary)
        got, _ = states_of(model, run)
        both = [plans[0], skip.plan]
    seen = reference.watch(model, run)
    fate = reference.decide(both, seen)
    close(got, reference.hidden_states(model, seen, fate, config, skip.summary), TOLERANCE)
    return both


BIDIRECTIONAL = {"gemma3", "shieldgemma2"} if Version("5.17") > VERSION else set()
"""Families that cannot read a second image after a cache in transformers 5.16: their masks do not fit."""


@combinations(turn=3, halved=True, families=[name for name in FAMILIES if name not in BIDIRECTIONAL])
def test_a_second_turn_with_another_image(family, attention, dtype):
    another_image(model_of(family, attention, dtype), MERGING, "image", "image")


@combinations(turn=3, families=["exaone4_5", "gemma4", "gemma4_unified", "muse_glimmer"])
def test_a_second_turn_with_an_image_that_is_kept_whole(family, attention, dtype):
    model = model_of(family, attention, dtype)
    small = tiny_batch(model, [["small image"]])["input_ids"] == model.config.image_token_id
    config = SkipConfig(retained=int(small.sum()), skipped=1, select="norm", summary_tokens=0)
    first, second = another_image(model, config, "large image", "small image", words=4)
    assert second.is_identity
    assert not first.is_identity
