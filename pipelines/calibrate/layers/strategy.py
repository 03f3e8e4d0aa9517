"""The strategy ``layers``: where tokens bypass the FFN, and where they leave; it needs no labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

import skipvision as sv
from pipelines.calibrate.config import CalibrateConfig
from pipelines.calibrate.layers.divergence import Measurer
from pipelines.calibrate.layers.moves import before_all, everywhere
from pipelines.calibrate.layers.prompts import read_prompts
from pipelines.calibrate.layers.report import figure, markdown
from pipelines.calibrate.layers.search import LayerSearch, Space, chosen_line
from pipelines.calibrate.pool import actor_pool
from pipelines.calibrate.pricing import Pricing
from pipelines.calibrate.search import NothingWithinBudgetError
from pipelines.calibrate.strategy import Search
from pipelines.engines.loading import empty_model
from pipelines.engines.model import EngineModel, check_model
from pipelines.evaluation.fingerprints import of_rows
from pipelines.score.fingerprints import of_files
from pipelines.shared.folder import JobFolder
from skipvision.anatomy.families import dissect
from skipvision.config import SkipConfig
from skipvision.errors import ConfigError


class ByLayers:
    """Measures divergence on unlabelled rows; implements `Strategy`."""

    def __init__(self, config: CalibrateConfig, model: EngineModel) -> None:
        self._config, self._model = config, model
        self._base: SkipConfig = model.skip if model.adapter is not None else (config.skip or SkipConfig())
        self._prompts = read_prompts(config.unlabelled, config.search.seed)

    def files(self) -> dict[str, str]:
        """Return the fingerprints of the base model and of the drawn rows."""
        return {"prompts.path": of_rows(self._prompts.rows), **of_files([], [self._model])}

    def facts(self) -> Sequence[str]:
        """Return lines about the rows that were drawn."""
        return self._prompts.facts

    def prepare(self) -> Search:
        """Check that some choice of layers reaches the budget."""
        start = before_all(self._base)
        config = check_model(replace(self._model, skip=everywhere(self._base)))
        space = self._spaced(config)
        budget, least = self._budget, space.cheapest(start)
        if space.cost(least) > budget:
            raise NothingWithinBudgetError(
                f"no choice of layers reaches budget.prefill_flops = {budget:g}: with these tokens the "
                f"least is {space.cost(least):.3f} ({_where(least)}); lower skip.retained or skip.skipped"
            )
        if space.cost(start) <= budget:
            raise ConfigError(
                f"budget.prefill_flops = {budget:g}, but these tokens need {space.cost(start):.3f} if no "
                "layer skips anything: lower the budget, or retain more tokens"
            )
        return partial(self._walk, space)

    def _walk(self, space: Space, folder: JobFolder, resources: Mapping[str, float]) -> dict[str, Any]:
        """Walk the greedy path and verify its end."""
        given, config = self._config.unlabelled, self._config
        model = replace(self._model, skip=everywhere(self._base))
        with actor_pool(
            Measurer,
            model,
            given.batch_size,
            given.max_new_tokens,
            workers=config.scaling.workers,
            resources=resources,
        ) as run_tasks:
            return LayerSearch(folder, run_tasks, self._prompts, space).run(self._base, self._budget)

    def markdown(self, evidence: Mapping[str, Any]) -> str:
        """Format the greedy path as a table."""
        return markdown(evidence)

    def figure(self, evidence: Mapping[str, Any], path: Path) -> None:
        """Draw the divergence of each config against its cost."""
        figure(evidence, self._budget, path)

    def metrics(self, evidence: Mapping[str, Any]) -> dict[str, float]:
        """Return the divergence and agreement on the held-out rows."""
        line = chosen_line(evidence)
        return {"divergence": line["divergence"], "agreement": line["agreement"]}

    @property
    def _budget(self) -> float:
        limit = self._config.budget.prefill_flops
        if limit is None:
            raise ValueError("strategy layers has a limit on prefill FLOPs")
        return limit

    def _spaced(self, config: PretrainedConfig) -> Space:
        empty = empty_model(config)

        def supports(skip: SkipConfig) -> None:
            with sv.attach(empty, skip):
                pass

        layers = len(dissect(empty).layers)
        return Space(
            layers, self._config.layers.block, Pricing.of(self._model, config, self._prompts.rows), supports
        )


def _where(skip: SkipConfig) -> str:
    layers = skip.skip_layers if skip.skip_layers == "all" else list(skip.skip_layers)
    return f"skip_layers {layers if skip.skip_ffn else 'none'}, drop_after {skip.drop_after}"
