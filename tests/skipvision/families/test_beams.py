"""Beam search on pruned caches: every beam has the score of its words generated alone."""

import torch

from skipvision import attach
from tests.skipvision.cases import train_summary
from tests.skipvision.families.matrix import (
    FAMILIES,
    MERGING,
    MIXED_UP,
    NOT_REPEATED,
    PADDED,
    combinations,
    model_of,
    rows_within,
)
from tests.skipvision.families.running import scores_as_beams_and_alone


@combinations(halved=True, families=[name for name in FAMILIES if name not in NOT_REPEATED.families])
def test_a_beam_scores_as_its_words_alone(family, attention, dtype):
    model, rows = model_of(family, attention, dtype), rows_within(family, MIXED_UP, PADDED)
    plans = []
    with attach(model, MERGING) as skip, model.register_forward_hook(lambda *_: plans.append(skip.plan)):
        train_summary(skip.summary)
        words, beams, alone = scores_as_beams_and_alone(model, rows)
    assert plans[0].merged_into.shape[0] == len(rows) * 3
    tolerance = 1e-4 if dtype == "float32" else 0.1
    torch.testing.assert_close(beams.float(), alone.float(), rtol=1e-4, atol=tolerance)
    for best, second in zip(words[::2], words[1::2], strict=True):
        assert not torch.equal(best, second)
