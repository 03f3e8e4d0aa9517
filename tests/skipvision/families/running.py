"""Run models in tests: record decoder states, and generate given tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from skipvision.anatomy.families import dissect
from skipvision.testing.families import tiny_batch

Batch = dict[str, torch.Tensor]


@torch.no_grad()
def states_of(model: nn.Module, run: Callable[[], Any]) -> tuple[torch.Tensor, Any]:
    """Return the decoder's (B, T, H) hidden states over all its calls, and the result of ``run``."""
    states: list[torch.Tensor] = []
    handle = dissect(model).decoder.register_forward_hook(
        lambda decoder, args, output: states.append(output.last_hidden_state)
    )
    try:
        returned = run()
    finally:
        handle.remove()
    return torch.cat(states, dim=1), returned


def say(model: Any, batch: Batch, words: torch.Tensor | int, **options: Any) -> tuple[torch.Tensor, Any]:
    """Generate (B, n) given tokens, or a number of sampled ones; also return the result of generate."""
    begin = batch["input_ids"].shape[1]
    count = words if isinstance(words, int) else words.shape[1]
    if isinstance(words, torch.Tensor):
        options["prefix_allowed_tokens_fn"] = lambda row, line: [int(words[row, len(line) - begin])]
    out = model.generate(
        **batch,
        **{"do_sample": isinstance(words, int), **options},
        max_new_tokens=count,
        min_new_tokens=count,
        return_dict_in_generate=True,
    )
    return out.sequences[:, begin:], out


def new_cache(model: nn.Module) -> DynamicCache:
    """Return an empty cache: with ``use_cache=True`` alone, granite4_vision does not create one."""
    return DynamicCache(config=dissect(model).text_config)


def states_in_batch_and_alone(
    model: nn.Module, rows: list[Any], padding: str = "left"
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the (t, H) hidden states of each row's tokens, in the batch and alone."""
    batch = tiny_batch(model, rows, padding=padding)
    states, _ = states_of(model, partial(model, **batch))
    pairs = []
    for number, row in enumerate(rows):
        alone = tiny_batch(model, [row], row_numbers=[number])
        expected, _ = states_of(model, partial(model, **alone))
        pairs.append((states[number, batch["attention_mask"][number].bool()], expected[0]))
    return pairs


def scores_as_beams_and_alone(model: Any, rows: list[Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(2 · B, 4) words of the two best of three beams of each row, (2 · B,) their scores, and those of the
    same words said one after the other."""
    words, out = say(
        model,
        tiny_batch(model, rows),
        4,
        do_sample=False,
        num_beams=3,
        num_return_sequences=2,
        output_scores=True,
    )
    scores = []
    for number, said in enumerate(words):
        alone = tiny_batch(model, [rows[number // 2]], row_numbers=[number // 2])
        _, one = say(model, alone, said[None], output_logits=True)
        steps = torch.cat(one.logits).log_softmax(dim=-1)
        scores.append(steps.gather(1, said[:, None]).mean())
    return words, out.sequences_scores, torch.stack(scores)


def labels_of(model: Any, batch: Batch) -> torch.Tensor:
    """Return every real word of a batch as its own label, −100 at images and padding."""
    words = batch["attention_mask"].bool() & (batch["input_ids"] != model.config.image_token_id)
    return batch["input_ids"].masked_fill(~words, -100)


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Assert that (…, H) are equal up to rounding, in bfloat16 for most tokens: rounding may change experts.

    States are about 1, so those of another token would be apart by as much, in each token.
    """
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    if actual.dtype == torch.bfloat16:
        apart = (actual.float() - expected.float()).abs()
        assert float(apart.median()) < 0.1, f"median difference {float(apart.median()):.3g}"
        tokens = float((apart > 0.3).any(dim=-1).float().mean())
        assert tokens <= 1 / 4, f"{tokens:.0%} of the tokens differ, by up to {float(apart.max()):.3g}"
    else:
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
