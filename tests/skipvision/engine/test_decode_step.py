"""A decode step has the same shapes every time and never waits for its results, as a CUDA graph requires."""

import pytest
import torch

from skipvision import Engine, Request, Sampling, SkipConfig
from skipvision._compat import TorchDispatchMode
from skipvision.testing.families import tiny_batch, tiny_model
from tests.skipvision.family_table import LEFT_OUT

WAITING = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten._unique2.default,
}
"""Operators whose result, or its shape, the host must know before it continues."""


class Recorder(TorchDispatchMode):
    """Records the operators of a call with the shapes of their results."""

    def __init__(self):
        super().__init__()
        self.operators, self.waiting = [], []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        shapes = [tuple(one.shape) for one in _tensors(result)]
        self.operators.append((operator, shapes))
        by_mask = operator in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default) and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if operator in WAITING or by_mask:
            self.waiting.append(operator)
        return result


def _tensors(result):
    if isinstance(result, torch.Tensor):
        return [result]
    return [one for part in result for one in _tensors(part)] if isinstance(result, (list, tuple)) else []


# Windows, M-RoPE, DeepStack, experts, linear attention, short convolutions.
FAMILIES = ("llava", "gemma3", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "lfm2_vl")


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in LEFT_OUT])
def test_steps_of_one_bucket_are_the_same_work_and_never_wait(family, monkeypatch):
    model = tiny_model(family)
    model.generation_config.eos_token_id = None
    # The shapes of compiled decoding, without compiling.
    monkeypatch.setattr("torch.compile", lambda model, **_: model)
    config = SkipConfig(retained=0.3, skipped=0.3)
    with Engine(model, None, config, max_sequences=4, compile_decoding=True) as engine:
        running, recorders = engine._running, []
        whole = running.decode

        def decode(sequences):
            recorders.append(Recorder())
            with recorders[-1]:
                return whole(sequences)

        monkeypatch.setattr(running, "decode", decode)
        for row, words in enumerate((3, 5, 2)):
            inputs = tiny_batch(model, [[words, "image", 4]], seed=row)
            engine.submit(Request(inputs=inputs, sampling=Sampling(max_new_tokens=6)))
        while engine.busy:
            engine.step()
    assert len(recorders) == 5
    assert [recorder.waiting for recorder in recorders] == [[]] * 5
    # The first step allocates what recurrent layers keep.
    assert all(recorder.operators == recorders[1].operators for recorder in recorders[1:])
