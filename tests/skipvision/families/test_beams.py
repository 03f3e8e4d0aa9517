"""Beam search on pruned caches: every beam's score is that of its own words, said alone."""

import pytest
import torch

from skipvision import attach
from skipvision.tiny_families import tiny_batch
from tests.skipvision.cases import train_summary
from tests.skipvision.families.matrix import (
    BEAMS_INTERLEAVE,
    BEAMS_LOSE_IMAGES,
    MERGING,
    ROWS,
    combinations,
    model_of,
)
from tests.skipvision.families.running import say

BEAMS = {"num_beams": 3, "do_sample": False, "output_scores": True}


def rows_for(family):
    return [[3, "image", 24], [5], [2, "large image", 3]] if family in BEAMS_INTERLEAVE else ROWS


@combinations(dtypes=("float32",))
def test_a_beam_scores_as_its_words_alone(family, attention, dtype):
    if family in BEAMS_LOSE_IMAGES:
        pytest.skip("transformers cannot do this itself: see test_limits")
    model, rows, count = model_of(family, attention, dtype), rows_for(family), 4
    batch = tiny_batch(model, rows)
    with attach(model, MERGING) as skip:
        train_summary(skip.summary)
        words, out = say(model, batch, count, **BEAMS, num_return_sequences=2)
        assert skip.plan.merged_into.shape[0] == len(rows) * 3
        for number, said in enumerate(words):
            row = number // 2
            alone = tiny_batch(model, [rows[row]], row_numbers=[row])
            _, one = say(model, alone, said[None], output_logits=True)
            steps = torch.cat(one.logits).log_softmax(dim=-1)
            score = steps.gather(1, said[:, None]).sum() / count
            torch.testing.assert_close(out.sequences_scores[number], score, rtol=1e-4, atol=1e-4)
        for best, second in zip(words[::2], words[1::2], strict=True):
            assert not torch.equal(best, second)
