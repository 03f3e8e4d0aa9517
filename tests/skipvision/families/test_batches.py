"""A row does not depend on its batch: on other rows, their images, or the padding side."""

import torch

from skipvision import SkipConfig, attach
from skipvision.testing.families import tiny_batch
from tests.skipvision.cases import train_summary
from tests.skipvision.families.matrix import (
    MERGING,
    NUMBERED,
    PADDED,
    ROUNDED,
    ROWS,
    TOLERANCE,
    combinations,
    model_of,
    rows_within,
)
from tests.skipvision.families.running import close, say, states_in_batch_and_alone


@combinations(halved=True)
def test_a_row_is_as_alone(family, attention, dtype):
    model, limits = model_of(family, attention, dtype), [PADDED, NUMBERED]
    rows = rows_within(family, *limits, *([ROUNDED] if dtype == "bfloat16" else []))
    with attach(model, MERGING) as skip:
        train_summary(skip.summary)
        for padding in ("left", "right"):
            for in_batch, alone in states_in_batch_and_alone(model, rows, padding):
                close(in_batch, alone, TOLERANCE)
        if dtype == "bfloat16":  # rounding may decide between two words
            return
        said, _ = say(model, tiny_batch(model, rows), 3, do_sample=False)
        for number, row in enumerate(rows):
            alone = tiny_batch(model, [row], row_numbers=[number])
            assert torch.equal(say(model, alone, 3, do_sample=False)[0][0], said[number])


@combinations(turn=1, halved=True)
def test_images_smaller_than_the_counts_keep_all_tokens(family, attention, dtype):
    model = model_of(family, attention, dtype)
    batch = tiny_batch(model, ROWS)
    with torch.no_grad():
        plain = model(**batch).logits
        with attach(model, SkipConfig(retained=1000, skipped=7, summary_tokens=0)) as skip:
            assert torch.equal(model(**batch).logits, plain)
            assert skip.plan.is_identity
        with attach(model, SkipConfig(retained=5, skipped=1000, summary_tokens=0)) as skip:
            model(**batch)
            assert skip.plan.removed.tolist() == [0, 0, 0]
            assert not skip.plan.is_identity
