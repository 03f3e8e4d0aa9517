"""Measure what the FFN does to visual tokens, and the error of skipping it, before and after tuning."""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

import skipvision as sv
from pipelines.analyse.config import AnalyseConfig
from pipelines.analyse.folder import AnalysisFolder
from pipelines.analyse.report import medians, write_report
from pipelines.cluster.cpus import usable_cpus
from pipelines.data.collate import Collator
from pipelines.data.rows import TrainingRow, pick_rows
from pipelines.data.training_rows import read_training_rows
from pipelines.engines.config import BaseModelSection
from pipelines.engines.loading import load_frozen, load_processor, usable_device
from pipelines.shared.console import say
from pipelines.shared.paths import copy_into
from pipelines.tracking.run import Tracker
from pipelines.tracking.tracked import finished_result, tracked_run
from skipvision.analysis import error_bound, ffn_ratios
from skipvision.errors import ConfigError, DataError


def run_analyse(config: AnalyseConfig) -> dict[str, Any]:
    """Measure, write the report, and record it in MLflow; or report that the job is finished.

    Returns:
        The MLflow run, the files, and the median errors at the output.

    Raises:
        ConfigError: the model, the adapter or the data do not exist, no setting says which tokens are
            retained, or the job was started with other settings.
        DataError: no row has an image.
        UnsupportedModelError: the analysis does not support this kind of model.
        TrackingError: MLflow does not answer.
    """
    torch.set_num_threads(config.threads or usable_cpus())
    folder = AnalysisFolder(config.storage_path, config.name)
    with folder.claimed():
        folder.resume(config)
        result = finished_result(config, folder, folder.table)
        finished = result is not None
        absolute = config.resolved()
        if result is None:
            result = _complete(config, absolute, folder)
            folder.remember(result=result)
    if absolute.report is not None:
        copy_into(Path(absolute.report), [folder.table, *folder.figures])
    return {**result, "already_finished": finished}


def _complete(config: AnalyseConfig, absolute: AnalyseConfig, folder: AnalysisFolder) -> dict[str, Any]:
    """Measure, unless that is done already, record the results, and return the job's result."""
    adapter = None if absolute.adapter is None else Path(absolute.adapter)
    skip = _skip_config(absolute, adapter)
    rows = [row for row in _rows(absolute.data) if row.images]
    if not rows:
        raise DataError(f"data = {config.data}: no row has an image")
    settings = {**config.model_dump(mode="json"), "skip": skip.model_dump(mode="json")}
    with tracked_run(config, folder, settings, settings) as run:
        if not folder.has_work:
            measured = {
                name: _measure(name, absolute.model, path, skip, rows, absolute)
                for name, path in {"base": None, "tuned": adapter}.items()
                if name == "base" or path is not None
            }
            write_report({"skip": skip.model_dump(), "variants": measured}, folder)
            folder.remember(measured=True)
        variants = json.loads(folder.numbers.read_text())["variants"]
        files = [folder.numbers, folder.table, *folder.figures]
        run.advice = f"The analysis is complete in {folder.path}. Run the same job again to record it"
        _record(run, variants, files)
    return {
        "mlflow_uri": run.uri,
        "mlflow_run_id": run.run_id,
        "files": [str(file) for file in files],
        "variants": {name: {"output": medians(variant)[-1]} for name, variant in variants.items()},
    }


def _skip_config(config: AnalyseConfig, adapter: Path | None) -> sv.SkipConfig:
    own = None if adapter is None else sv.read_adapter(adapter)["skip"]
    skip = config.skip or own
    if skip is None:
        raise ConfigError(
            "skip is null, and no adapter was trained with Skip-Vision: set it, for example with "
            "--skip.retained 0.25"
        )
    return skip


def _rows(source: str) -> list[TrainingRow]:
    data = read_training_rows(source)
    if data.rejects:
        say(f"{source}: ignoring {len(data.rejects)} unusable rows")
    return data.rows


def _measure(
    name: str,
    model_config: BaseModelSection,
    adapter: Path | None,
    skip: sv.SkipConfig,
    rows: Sequence[TrainingRow],
    config: AnalyseConfig,
) -> dict[str, Any]:
    device = usable_device()
    model: nn.Module = load_frozen(model_config, torch.float32, device)
    if adapter is not None:
        model = sv.load_adapter(model, adapter)
    model.eval()
    collate = Collator(load_processor(model_config.path))
    some = pick_rows(rows, config.ratio_rows)
    say(f"{name}: FFN ratios on {len(some)} rows …")
    batches = (
        collate(some[start : start + config.batch_size]).to(device).inputs
        for start in range(0, len(some), config.batch_size)
    )
    ratios = ffn_ratios(model, batches)
    bounds = []
    for number, row in enumerate(pick_rows(rows, config.bound_rows), start=1):
        say(f"{name}: error and bounds, row {number}/{min(config.bound_rows, len(rows))} …")
        inputs = collate([row]).to(device).inputs
        bounds.append(asdict(error_bound(model, inputs, skip, worst_case=config.worst_case)))
    del model
    gc.collect()
    return {"ratios": asdict(ratios), "bounds": bounds}


def _record(tracker: Tracker, variants: Mapping[str, Any], files: Sequence[Path]) -> None:
    """Record curves, whose steps are layers, and the files."""
    for name, variant in variants.items():
        ratios = variant["ratios"]
        for number, error in enumerate(medians(variant)):
            values = {f"{name}/error/{kind}": value for kind, value in error.items() if value is not None}
            if number < len(ratios["visual"]["mean"]):
                values |= {f"{name}/ffn_ratio/{k}": ratios[k]["mean"][number] for k in ("visual", "text")}
            tracker.metrics(values, number)
    for file in files:
        tracker.store(file)
