"""Indexers that leave entries out select the same ones in the engine, in a padded batch and alone."""

import pytest

from skipvision import Engine, Request, Sampling, SkipConfig, attach
from skipvision.testing.families import tiny_batch, tiny_model
from tests.skipvision.engine.requests_for_tests import ids_of
from tests.skipvision.family_table import LEFT_OUT

ROWS = [[9, "image", 24], [30], ["image", 2, "small image", 12], [17, "image", 9]]
CONFIG = SkipConfig(retained=0.3, skipped=0.3)
TOKENS = 8


def select(model, groups):
    """Make each query select this many groups of entries; return how many indexers do."""
    indexers = 0
    for module in model.modules():
        if hasattr(module, "index_kpool"):
            module.index_topk = groups * module.index_kpool
        elif hasattr(module, "block_topk"):
            module.block_topk = groups
        else:
            continue
        indexers += 1
    return indexers


def answers(model, batch):
    output = model.generate(**batch, max_new_tokens=TOKENS, do_sample=False)
    return [tuple(row) for row in output[:, batch["input_ids"].shape[1] :].tolist()]


@pytest.mark.parametrize("family", [name for name in ("glm5_next", "qwen4_exp") if name not in LEFT_OUT])
def test_the_engine_selects_as_generate(family):
    model = tiny_model(family, seed=3)
    model.generation_config.eos_token_id = None
    requests = [
        Request(
            inputs=tiny_batch(model, [row], row_numbers=[number]),
            sampling=Sampling(max_new_tokens=TOKENS),
            key=number,
        )
        for number, row in enumerate(ROWS)
    ]
    with attach(model, CONFIG):
        assert select(model, 1000)
        everything = [answers(model, one.inputs)[0] for one in requests]
        select(model, 2)
        expected = [answers(model, one.inputs)[0] for one in requests]
        assert answers(model, tiny_batch(model, ROWS)) == expected
    assert expected != everything, "entries are left out"
    for rows in (1, len(ROWS)):
        with Engine(model, None, CONFIG, max_sequences=rows) as engine:
            assert {one.key: ids_of(one) for one in engine.run(requests)} == dict(enumerate(expected))
