"""The strategy ``space``: the config of a space that keeps the accuracy of answers, by successive halving."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from pipelines.calibrate.config import CalibrateConfig
from pipelines.calibrate.halving import Candidate
from pipelines.calibrate.report import figure, markdown
from pipelines.calibrate.search import Calibration
from pipelines.calibrate.space import candidates, parts
from pipelines.calibrate.strategy import Search
from pipelines.calibrate.workers import scorers
from pipelines.engines.model import EngineModel, check_model
from pipelines.score.fingerprints import of_files
from pipelines.shared.folder import JobFolder


class ByAccuracy:
    """Evaluates the configs of a space on questions with gold answers; implements `Strategy`."""

    def __init__(self, config: CalibrateConfig, model: EngineModel) -> None:
        self._config, self._model = config, model
        self._search, self._held_out = parts(config)
        questions = (*self._search.questions, *self._held_out.questions)
        self._whole = replace(self._search, questions=questions)

    def files(self) -> dict[str, str]:
        """Return the fingerprints of the base model and of the questions."""
        return of_files([self._whole], [self._model])

    def facts(self) -> Sequence[str]:
        """Return lines about the table of questions."""
        return list(self._whole.facts())

    def prepare(self) -> Search:
        """Price the configs of the space, and drop those over the budget."""
        space = candidates(self._config, self._model, check_model(self._model), self._search)
        return partial(self._evaluate, space)

    def _evaluate(
        self, space: Sequence[Candidate], folder: JobFolder, resources: Mapping[str, float]
    ) -> dict[str, Any]:
        """Evaluate rung by rung, then verify the finalists."""
        # An engine with summary tokens can also run without them, but not the other way round.
        skip = max((one.skip for one in space), key=lambda skip: skip.summary_tokens)
        config, model = self._config, replace(self._model, skip=skip)
        with scorers(
            model,
            config.engine,
            config.questions.max_new_tokens,
            workers=config.scaling.workers,
            resources=resources,
        ) as run_tasks:
            return Calibration(config, folder, run_tasks, self._search, self._held_out).run(space)

    def markdown(self, evidence: Mapping[str, Any]) -> str:
        """Format the stages of the search as a table."""
        return markdown(evidence, self._config.budget)

    def figure(self, evidence: Mapping[str, Any], path: Path) -> None:
        """Draw the accuracy of each config against its cost."""
        figure(evidence, self._config.budget, path)

    def metrics(self, evidence: Mapping[str, Any]) -> dict[str, float]:
        """Return the verified difference from full tokens, with its interval."""
        verdict = evidence["verdict"]
        difference = verdict["found"]["difference"]
        return {"difference": difference, "low": verdict["worst"], "high": verdict["best"]}
