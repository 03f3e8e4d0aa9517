"""Attention that selects blocks counts entries, not positions, on pruned caches and in the engine."""

import pytest

from skipvision import Engine, Request, Sampling, SkipConfig, attach
from skipvision.anatomy.attention import block_indexer
from skipvision.anatomy.families import dissect
from skipvision.testing.families import tiny_batch, tiny_model
from tests.skipvision.engine.requests_for_tests import ids_of

ROWS = [[9, "image", 24], [30], ["image", 2, "small image", 12], [17, "image", 9]]
TOKENS = 6


@pytest.fixture(scope="module")
def model():
    """A model whose queries select 2 blocks of 4 keys."""
    model = tiny_model("minimax_m3_vl", seed=3)
    model.generation_config.eos_token_id = None
    for indexer in filter(None, (block_indexer(layer.attention) for layer in dissect(model).layers)):
        indexer.block_size, indexer.topk_blocks = 4, 2
    return model


@pytest.mark.parametrize("positions", ["original", "contiguous"])
def test_the_engine_selects_as_generate(model, positions):
    config = SkipConfig(retained=0.3, skipped=0.3, positions=positions)
    requests = [
        Request(inputs=tiny_batch(model, [row], seed=n), sampling=Sampling(max_new_tokens=TOKENS), key=n)
        for n, row in enumerate(ROWS)
    ]
    expected = {}
    with attach(model, config):
        for one in requests:
            output = model.generate(**one.inputs, max_new_tokens=TOKENS, do_sample=False)
            expected[one.key] = tuple(output[0, one.inputs["input_ids"].shape[1] :].tolist())
    for cached in (0, 2**24):
        with Engine(model, None, config, max_sequences=4, prefix_cache_bytes=cached) as engine:
            assert {one.key: ids_of(one) for one in engine.run(requests * 2)} == expected
