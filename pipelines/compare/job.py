"""Compare a Skip-Vision fine-tune with the same fine-tune on full tokens: accuracy and cost.

Up to four variants answer the same test rows: the base model with full tokens and with skipping, each
untuned and tuned. `skipvision.Engine` generates the answers, as on the endpoint. Costs are predicted for
the tuned variants, and measured on them.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import skipvision as sv
from pipelines.cluster.cpus import usable_cpus
from pipelines.compare.config import CompareConfig
from pipelines.compare.costs import measure_costs
from pipelines.compare.folder import ComparisonFolder
from pipelines.compare.report import check_marked, draw, markdown, renew_marked
from pipelines.data.rows import TrainingRow, pick_rows
from pipelines.data.training_rows import read_rows
from pipelines.engines.config import BaseModelSection
from pipelines.engines.loading import usable_device
from pipelines.engines.model import EngineModel, load_engine
from pipelines.evaluation.answering import answer_rows
from pipelines.evaluation.exact_match import Answer, accuracy_by_task, exact_items, group_of
from pipelines.evaluation.fingerprints import of_rows
from pipelines.evaluation.items import OVERALL
from pipelines.evaluation.paired import Paired, paired, widened
from pipelines.finetune.config import FinetuneConfig
from pipelines.finetune.folder import MAY_DIFFER
from pipelines.shared.console import say
from pipelines.shared.files import write_text
from pipelines.shared.folder import comparable
from pipelines.shared.paths import output_path
from pipelines.shared.sections import EngineSection
from pipelines.tracking.client import TrackingError
from pipelines.tracking.run import Tracker
from skipvision.errors import ConfigError


@dataclass(frozen=True)
class Variant:
    """The base model with an optional adapter, under one SkipConfig (None: full tokens)."""

    name: str
    skip: sv.SkipConfig | None
    adapter: Path | None


def run_compare(config: CompareConfig) -> dict[str, Any]:
    """Evaluate all variants, write the report, and record it in MLflow; or report that this is done already.

    Return the whole comparison.

    Raises:
        ConfigError: a run is missing or unfinished, or the two runs cannot be compared.
        TrackingError: MLflow does not answer, or does not have one of the runs.
    """
    torch.set_num_threads(config.threads or usable_cpus())
    if config.readme is not None:
        check_marked(output_path(config.readme, "readme"))
    absolute = config.resolved()
    storage = Path(absolute.storage)
    full, skip = (_finished(storage, name) for name in (config.full, config.skip))
    _check_comparable(full, skip)
    rows = pick_rows(read_rows(absolute.test), config.rows)
    folder = ComparisonFolder(storage, f"{config.skip}-against-{config.full}")
    with folder.claimed():
        folder.resume(config)
        inputs = {"full": full["result"], "skip": skip["result"], "rows": of_rows(rows)}
        if folder.state.get("inputs") != inputs:
            folder.forget()
        finished = bool(folder.state.get("recorded"))
        if finished:
            say(f"job {folder.name!r} is finished already: {folder.table}")
        runs = {name: _open_run(state) for name, state in (("full", full), ("skip", skip))}
        if "comparison" not in folder.state:
            comparison = _compare(full, skip, rows, config)
            folder.remember_settings(config, inputs=inputs, comparison=comparison)
        result = {
            **folder.state["comparison"],
            "table": str(folder.table),
            "picture": str(folder.figure),
        }
        _write(result, folder)
        if not finished:
            _record(result, runs)
            folder.remember(recorded=True)
    if absolute.readme is not None:
        renew_marked(Path(absolute.readme), folder.table.read_text())
        say(f"updated the table in {absolute.readme}; the figure is {folder.figure}")
    return {**result, "already_finished": finished}


def _compare(
    full: dict[str, Any], skip: dict[str, Any], rows: Sequence[TrainingRow], config: CompareConfig
) -> dict[str, Any]:
    model = FinetuneConfig(**skip["config"]).model.resolved()
    skip_config = sv.SkipConfig(**skip["config"]["skip"])
    variants = _variants(full, skip, skip_config, untuned=config.untuned)
    answers, costs = _evaluate_all(variants, model, rows, config)
    for name, run in (("full", full), ("skip", skip)):
        costs[name]["seconds_per_step"] = run["result"]["seconds_per_step"]
        costs[name]["training_seconds"] = run["result"]["training_seconds"]
    return {
        "rows": len(rows),
        "images": len({group_of(row) for row in rows}),
        "exact_match": {name: accuracy_by_task(given) for name, given in answers.items()},
        "difference": {
            task: {"difference": gap.difference, "low": gap.low, "high": gap.high}
            for task, gap in differences(rows, answers).items()
        },
        "costs": costs,
        "ratios": {key: costs["skip"][key] / costs["full"][key] for key in costs["full"]},
        "skip_config": skip_config.model_dump(mode="json"),
    }


def differences(rows: Sequence[TrainingRow], answers: dict[str, list[Answer]]) -> dict[str, Paired]:
    """Return tuned Skip-Vision minus tuned full tokens, per task and overall, paired by row."""
    full, skip = (exact_items(rows, answers[name], name) for name in ("full", "skip"))
    gaps = {}
    for task in [*sorted({row.task for row in rows} - {""}), OVERALL]:
        sides = ([item for item in side if task in (OVERALL, item.category)] for side in (full, skip))
        gaps[task] = widened(paired(*sides))
    return gaps


def _variants(
    full: dict[str, Any], skip: dict[str, Any], skip_config: sv.SkipConfig, *, untuned: bool
) -> list[Variant]:
    """Return the tuned variants, after the untuned ones if ``untuned``."""
    tuned = [
        Variant("full", None, Path(full["result"]["adapter"])),
        Variant("skip", skip_config, Path(skip["result"]["adapter"])),
    ]
    base_only = [Variant("full untuned", None, None), Variant("skip untuned", skip_config, None)]
    return [*base_only, *tuned] if untuned else tuned


def _evaluate_all(
    variants: Sequence[Variant], base: BaseModelSection, rows: Sequence[TrainingRow], config: CompareConfig
) -> tuple[dict[str, list[Answer]], dict[str, dict[str, float]]]:
    """Return every variant's answers, and the costs of the tuned ones on one row of each task."""
    device = usable_device()
    one_per_task = pick_rows(rows, len({row.task for row in rows}))
    answers: dict[str, list[Answer]] = {}
    costs: dict[str, dict[str, float]] = {}
    say(f"evaluating {len(variants)} variants on {len(rows)} rows each …")
    for number, variant in enumerate(variants, start=1):
        started = time.monotonic()
        answers[variant.name] = _answers(variant, base, rows, config, device)
        gc.collect()
        if variant.adapter is not None:
            costs[variant.name] = measure_costs(base, variant.adapter, variant.skip, one_per_task, device)
            gc.collect()
        share = accuracy_by_task(answers[variant.name])[OVERALL]
        say(
            f"{number}/{len(variants)} {variant.name}: exact match {share:.3f} on {len(rows)} rows "
            f"({time.monotonic() - started:.0f} s)"
        )
    return answers, costs


def _answers(
    variant: Variant,
    base: BaseModelSection,
    rows: Sequence[TrainingRow],
    config: CompareConfig,
    device: torch.device,
) -> list[Answer]:
    model = EngineModel.of(base, variant.adapter, variant.skip or sv.SkipConfig.full())
    settings = EngineSection(max_sequences=config.batch_size, kv_budget_bytes=config.kv_budget_bytes)
    with load_engine(model, settings, device) as engine:
        return answer_rows(engine, rows, max_new_tokens=config.max_new_tokens)


def _finished(storage: Path, name: str) -> dict[str, Any]:
    file = storage / name / "run.json"
    state: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    if not state.get("result"):  # a run that has begun has null
        raise ConfigError(f"{storage / name} holds no finished fine-tuning run: run jobs/finetune.py first")
    return state


def _check_comparable(full: dict[str, Any], skip: dict[str, Any]) -> None:
    """Raise `ConfigError` if the runs differ in more than name, skip, evaluation, and where they ran."""
    if full["config"]["skip"] is not None or skip["config"]["skip"] is None:
        raise ConfigError("full must name a run with skip: null, and skip one with Skip-Vision")
    one, two = (comparable(run["config"], MAY_DIFFER) for run in (full, skip))
    free = {"name", "skip", "evaluation"}
    names = [name for name in sorted({*one, *two}) if name.partition(".")[0] not in free]
    other = [name for name in names if one.get(name) != two.get(name)]
    if other:
        raise ConfigError(
            f"the runs cannot be compared because they differ in {', '.join(other)}: "
            "choose two that share these settings"
        )


def _write(result: dict[str, Any], folder: ComparisonFolder) -> None:
    """Write the table and the figure, and print the table."""
    write_text(folder.table, markdown(result))
    draw(result, folder.figure)
    say(f"\n{folder.table.read_text()}")


def _open_run(state: dict[str, Any]) -> Tracker:
    """Return the MLflow run of a fine-tuning run, after checking that MLflow has it."""
    run = Tracker(state["result"]["mlflow_uri"], state["result"]["mlflow_run_id"])
    run.require()
    return run


def _record(result: dict[str, Any], runs: Mapping[str, Tracker]) -> None:
    """Record test metrics in both MLflow runs; and ratios, table and figure in that of Skip-Vision.

    The runs have ended with their fine-tuning and stay as they ended.
    """
    ratios = {f"ratio_to_full/{key}": value for key, value in result["ratios"].items()}
    try:
        for name, more in (("full", {}), ("skip", ratios)):
            shares = {f"test/exact_match/{task}": v for task, v in result["exact_match"][name].items()}
            runs[name].metrics({**shares, **more}, 0)
            runs[name].upload()
        for path in (result["table"], result["picture"]):
            runs["skip"].store(Path(path))
    except TrackingError as error:
        raise TrackingError(
            f"{error}\nThe comparison is complete: {result['table']}. Run the same job again to record it"
        ) from error
