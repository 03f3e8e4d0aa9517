"""Times by part, on a tiny engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import skipvision as sv
from pipelines.data.training_rows import read_rows
from pipelines.evaluation.answering import request_for
from pipelines.tradeoff.timing import DECODED, Stopwatch, _never_end
from skipvision.engine import Sampling


@pytest.mark.parametrize("select", ["norm", "attention"])
def test_the_parts_of_a_request_are_measured(tiny_model: Path, shapes_data: Path, select: str) -> None:
    model = AutoModelForImageTextToText.from_pretrained(tiny_model)
    skip = sv.SkipConfig(retained=4, skipped=0, merge="drop", select=select, summary_tokens=0)
    [row, *_] = read_rows(str(shapes_data / "test.json"))
    with sv.Engine(model, AutoProcessor.from_pretrained(tiny_model), skip) as engine:
        request = engine.prepare(
            request_for(row.messages[:-1], row.images, engine.processor, Sampling(max_new_tokens=1))
        )
        stopwatch = Stopwatch(model)
        stopwatch.measure(engine, request)  # the engine places hooks of its own for its first request
        hooks, decoded = _hooks(model), engine.statistics().decode_tokens
        found = stopwatch.measure(engine, request)
        assert all(part > 0 for part in found.parts)
        assert found.tower + found.selection + found.prefill < found.first_token
        assert engine.statistics().decode_tokens == decoded + DECODED, "the answer does not end before"
        assert _hooks(model) == hooks


def _hooks(model: torch.nn.Module) -> list[int]:
    return [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]


def test_no_answer_ends_while_its_decoding_is_timed() -> None:
    logits = torch.tensor([-3.0, 5.0, -1.0])
    assert _never_end(frozenset({1}), [], logits).argmax() == 2
    assert logits[1] == 5
