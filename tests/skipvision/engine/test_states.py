"""The engine keeps the states of recurrent layers in rows of their own."""

import pytest
import torch

from skipvision import Engine, Request, Sampling, SkipConfig
from skipvision.engine.states import StateLayer
from skipvision.testing.families import tiny_batch, tiny_model
from tests.skipvision.engine.requests_for_tests import F64, ids_of
from tests.skipvision.family_table import LEFT_OUT

CONFIG = SkipConfig(retained=0.3, skipped=0.3)
ROWS = [[3, "image", 4], [5], [2, "image", 1], [7, "image", 2]]


def answers(model, **options):
    requests = [
        Request(inputs=tiny_batch(model, [row], seed=n), sampling=Sampling(max_new_tokens=6), key=n)
        for n, row in enumerate(ROWS)
    ]
    with Engine(model, None, CONFIG, **options) as engine:
        return {one.key: ids_of(one) for one in engine.run(requests)}


@pytest.mark.parametrize("family", [name for name in ("qwen3_5", "lfm2_vl") if name not in LEFT_OUT])
def test_a_step_that_fails_is_repeated_from_the_states_before_it(family):
    model = tiny_model(family, dtype=F64)
    expected, failures = answers(model, max_sequences=1), []

    def fail_once(head, args):
        rows, tokens = args[0].shape[:2]
        if rows == len(ROWS) and tokens == 1 and len(failures) < 2:
            failures.append(rows)
            raise RuntimeError("after all layers have updated their states")

    handle = model.get_output_embeddings().register_forward_pre_hook(fail_once)
    try:
        got = answers(model, max_sequences=len(ROWS))
    finally:
        handle.remove()
    assert len(failures) == 2
    assert got == expected


def test_rows_of_states():
    layer = StateLayer([torch.arange(6.0).view(3, 2), None])
    layer.put(0, [torch.arange(6.0).view(3, 2), None], torch.tensor([2, 0]))
    layer.put(2, [torch.full((1, 2), 9.0), None], torch.tensor([0]))
    layer.move(2, 0)
    rows = torch.tensor([1, 0])
    layer.begin_step(rows)
    assert layer.conv_states[0].tolist() == [[0, 1], [9, 9]]
    layer.conv_states[0] += 1
    layer.begin_step(rows)  # the step before has not ended
    assert layer.conv_states[0].tolist() == [[0, 1], [9, 9]]
    layer.conv_states[0] += 1
    layer.end_step(rows)
    layer.erase(1)
    layer.begin_step(torch.tensor([0, 1, 2, 3]))
    assert layer.conv_states[0].tolist() == [[10, 10], [0, 0], [9, 9], [0, 0]]
    assert layer.nbytes >= 4 * 2 * 4
