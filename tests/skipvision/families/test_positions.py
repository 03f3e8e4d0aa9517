"""Positions in prefill and after it: the caller's, or without gaps on every axis."""

import torch

from skipvision import attach
from skipvision.anatomy.families import dissect
from skipvision.testing.families import tiny_batch
from tests.skipvision.families import reference
from tests.skipvision.families.matrix import MERGING, ROWS, combinations, model_of
from tests.skipvision.families.running import say


def positions_of(model, run):
    """Record the decoder's positions in each of its calls."""
    given = []
    handle = dissect(model).decoder.register_forward_pre_hook(
        lambda decoder, args, keywords: given.append(keywords["position_ids"]), with_kwargs=True
    )
    try:
        run()
    finally:
        handle.remove()
    return given


def generated(model, batch, config):
    with attach(model, config) as skip:
        prefill, *steps = positions_of(model, lambda: say(model, batch, 4))
        return prefill, torch.cat(steps, dim=-1), skip.plan


@combinations(turn=1, halved=True)
def test_survivors_keep_their_positions(family, attention, dtype):
    model = model_of(family, attention, dtype)
    batch = tiny_batch(model, ROWS)
    seen = reference.watch(model, lambda: say(model, batch, 4))
    prefill, steps, plan = generated(model, batch, MERGING)
    prompt = batch["input_ids"].shape[1]
    assert torch.equal(steps.broadcast_to(seen.positions[..., prompt:].shape), seen.positions[..., prompt:])
    for row, source in enumerate(plan.position_source):
        there = source >= 0
        assert torch.equal(prefill[..., row, there], seen.positions[..., row, source[there]])


@combinations(halved=True)
def test_contiguous_positions_have_no_gaps_on_any_axis(family, attention, dtype):
    model = model_of(family, attention, dtype)
    batch = tiny_batch(model, ROWS)
    prefill, steps, plan = generated(model, batch, MERGING.model_copy(update={"positions": "contiguous"}))
    for row, there in enumerate(plan.attention_mask):
        own = torch.cat(
            [prefill[..., row, there], steps[..., row, :].expand(*prefill.shape[:-2], -1)], dim=-1
        )
        first = int(own.flatten()[0])
        assert (own == first + torch.arange(own.shape[-1])).all()


@combinations(turn=1, halved=True)
@torch.no_grad()
def test_a_custom_step_continues_after_the_prompt(family, attention, dtype):
    """Without position_ids, after left padding; three axes continue from the longest."""
    model = model_of(family, attention, dtype)
    batch = tiny_batch(model, ROWS)
    word, mask = torch.full((len(ROWS), 2), 40), torch.ones(len(ROWS), 2, dtype=torch.long)
    for positions in ("original", "contiguous"):
        with attach(model, MERGING.model_copy(update={"positions": positions})) as skip:
            first, second = positions_of(
                model,
                lambda: model(
                    input_ids=word,
                    attention_mask=torch.cat([batch["attention_mask"], mask], dim=1),
                    past_key_values=model(**batch, use_cache=True).past_key_values,
                ),
            )
        for row, there in enumerate(skip.plan.attention_mask):
            behind = first[..., row, there].max() + 1 + torch.arange(2)
            assert (second[..., row, :] == behind).all()
