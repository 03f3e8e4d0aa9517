"""The lines and numbers of a training's progress."""

from __future__ import annotations

from pipelines.finetune.learner import StepStats
from pipelines.finetune.progress import Progress


def stats(loss: float, learnt_tokens: int = 10) -> StepStats:
    return StepStats(loss, 1.0, 0.1, learnt_tokens, tokens=100, images=4)


def test_lines_have_a_remaining_time_until_the_last_step():
    progress = Progress(3)
    progress.start(0)
    for done in (1, 2, 3):
        progress.finish(stats(0.5))
        line = progress.line(done, stats(0.5))
        assert line.startswith(f"step {done}/3  loss 0.5000  ")
        assert line.endswith(" left") == (done < 3)
        assert " 0 s" not in line


def test_a_step_without_rows_has_no_loss():
    progress = Progress(2)
    progress.start(0)
    progress.finish(stats(0.5))
    progress.finish(stats(0.0, learnt_tokens=0))
    assert progress.summary()["loss"] == 0.5
    assert "loss 0.5000" in progress.line(2, stats(0.0, learnt_tokens=0))
