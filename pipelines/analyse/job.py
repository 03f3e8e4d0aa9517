"""What the FFN does to visual tokens, and the error of skipping it: of a base model, and as it was tuned."""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml
from pydantic import Field
from torch import nn

import skipvision as sv
from pipelines.analyse.pictures import picture_errors, picture_heat, picture_ratios
from pipelines.cluster.cpus import usable_cpus
from pipelines.data.collate import Collator
from pipelines.data.rows import TrainingRow
from pipelines.data.training_rows import read_training_rows
from pipelines.engines.config import BaseModelSection
from pipelines.engines.loading import load_frozen, load_processor
from pipelines.evaluation.exact_match import pick_rows
from pipelines.evaluation.tables import markdown_table
from pipelines.shared.paths import copy_into, input_path, model_path, output_folder, output_path
from pipelines.shared.sections import JobConfig
from pipelines.tracking.client import TrackingError
from pipelines.tracking.config import TrackingConfig
from pipelines.tracking.run import Tracker
from skipvision.analysis import error_bound, ffn_ratios
from skipvision.errors import ConfigError, DataError

ERRORS = {
    "moved": "output moved by this omission",
    "measured": "error, measured",
    "summed": "bound, omissions added up",
    "composite": "bound, later layers together",
    "local": "bound, layer by layer",
    "worst": "bound, worst case",
}
"""What is reported of each layer and of the output, and how the table calls it."""


class AnalyseConfig(JobConfig):
    """What is measured, on which data."""

    model: BaseModelSection = Field(description="the base model")
    adapter: str | None = Field(
        None, description="folder of a fine-tuned adapter, which is then measured too; null = none"
    )
    skip: sv.SkipConfig | None = Field(
        None,
        description="which visual tokens are retained, all others being skipped; null = as the adapter "
        "was trained",
    )
    data: str = Field(description="rows to measure on: LLaVA JSON, chat JSONL or parquet")
    ratio_rows: int = Field(64, ge=1, description="rows for the FFN ratios, the tasks in equal shares")
    bound_rows: int = Field(4, ge=1, description="rows for the error and its bounds")
    batch_size: int = Field(8, ge=1, description="rows per forward pass")
    worst_case: bool = Field(
        True,
        description="also bound the error from spectral norms, which only layers like Llama's allow",
    )
    tracking: TrackingConfig = Field(TrackingConfig(), description="MLflow")
    report: str | None = Field(None, description="folder that also gets the table and the pictures")
    threads: int = Field(0, ge=0, description="torch threads; 0 = as many as there are CPUs")


def run_analyse(config: AnalyseConfig) -> dict[str, Any]:
    """Measure, draw and record; returns the medians over prompts, and where the rest is.

    Raises:
        ConfigError: model, adapter or data are not there, or nothing says which tokens are retained.
        DataError: there is no row with an image.
        UnsupportedModelError: the model is of a kind that this cannot be measured of.
    """
    torch.set_num_threads(config.threads or usable_cpus())
    storage = output_path(config.storage, "storage")
    model = config.model.model_copy(update={"path": model_path(config.model.path, "model.path")})
    adapter = None if config.adapter is None else Path(input_path(config.adapter, "adapter"))
    skip = _retaining(config, adapter)
    rows = [row for row in _rows(input_path(config.data, "data")) if row.images]
    if not rows:
        raise DataError(f"data = {config.data}: no row has an image")
    folder = storage / config.name
    report = None if config.report is None else output_folder(config.report, "report")
    tracker = Tracker.start(
        config.tracking.absolute_uri(storage),
        experiment=config.tracking.experiment,
        run_name=config.name,
        artifacts=storage / "mlflow-artifacts",
    )
    try:
        resolved = {**config.model_dump(mode="json"), "skip": skip.model_dump(mode="json")}
        tracker.parameters(resolved)
        tracker.text(yaml.safe_dump(resolved, sort_keys=False), "config.yaml")
        found = {
            name: _measure(name, model, folder_of, skip, rows, config)
            for name, folder_of in {"base": None, "tuned": adapter}.items()
            if name == "base" or folder_of is not None
        }
        result = {"skip": skip.model_dump(), "variants": found}
        files = _write(result, folder)
        _record(tracker, found, files)
        tracker.finish("FINISHED")
    except BaseException:
        with suppress(TrackingError):
            tracker.close()
            tracker.finish("FAILED")
        raise
    if report is not None:
        copy_into(report, files[1:])
    return {
        "mlflow_uri": tracker.uri,
        "mlflow_run_id": tracker.run_id,
        "files": [str(file) for file in files],
        "variants": {name: {"output": medians(variant)[-1]} for name, variant in found.items()},
    }


def medians(variant: Mapping[str, Any]) -> list[dict[str, float | None]]:
    """Errors behind each layer, and last at the output: medians over prompts."""
    places = zip(*([*prompt["layers"], prompt["output"]] for prompt in variant["bounds"]), strict=True)
    return [
        {
            name: None if prompts[0][name] is None else median(prompt[name] for prompt in prompts)
            for name in ERRORS
            if name in prompts[0]
        }
        for prompts in places
    ]


def _retaining(config: AnalyseConfig, adapter: Path | None) -> sv.SkipConfig:
    own = None if adapter is None else sv.read_adapter(adapter)["skip"]
    skip = config.skip or own
    if skip is None:
        raise ConfigError(
            "skip is null, and there is no adapter that was trained with Skip-Vision: give, say, "
            "--skip.retained 0.25"
        )
    return skip


def _rows(source: str) -> list[TrainingRow]:
    data = read_training_rows(source)
    if data.rejects:
        print(f"{source}: {len(data.rejects)} rows cannot be used and are left out", flush=True)
    return data.rows


def _measure(
    name: str,
    model_config: BaseModelSection,
    adapter: Path | None,
    skip: sv.SkipConfig,
    rows: Sequence[TrainingRow],
    config: AnalyseConfig,
) -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model: nn.Module = load_frozen(model_config, torch.float32, device)
    if adapter is not None:
        model = sv.load_adapter(model, adapter)
    model.eval()
    collate = Collator(load_processor(model_config.path))
    some = pick_rows(rows, config.ratio_rows)
    print(f"{name}: FFN ratios on {len(some)} rows …", flush=True)
    batches = (
        collate(some[start : start + config.batch_size]).to(device).inputs
        for start in range(0, len(some), config.batch_size)
    )
    ratios = ffn_ratios(model, batches)
    bounds = []
    for number, row in enumerate(pick_rows(rows, config.bound_rows), start=1):
        print(f"{name}: error and bounds, row {number}/{min(config.bound_rows, len(rows))} …", flush=True)
        inputs = collate([row]).to(device).inputs
        bounds.append(asdict(error_bound(model, inputs, skip, worst_case=config.worst_case)))
    del model
    gc.collect()
    return {"ratios": asdict(ratios), "bounds": bounds}


def markdown(found: Mapping[str, Any]) -> str:
    """A table for each variant: a line for each layer, and one for the output."""
    blocks = []
    for name, variant in found.items():
        header = [name, "FFN ratio, visual", "FFN ratio, text", *ERRORS.values()]
        lines = []
        ratios, errors = variant["ratios"], medians(variant)
        for number, error in enumerate(errors):
            at_end = number == len(errors) - 1
            means = ["", ""] if at_end else [f"{ratios[k]['mean'][number]:.3f}" for k in ("visual", "text")]
            values = ["" if error.get(key) is None else f"{error[key]:.3g}" for key in ERRORS]
            lines.append(["output" if at_end else f"layer {number}", *means, *values])
        blocks.append(markdown_table(header, lines) + "\n")
    return "\n".join(blocks)


def _write(result: dict[str, Any], folder: Path) -> list[Path]:
    """Everything in numbers, the table, and the pictures."""
    found = result["variants"]
    folder.mkdir(parents=True, exist_ok=True)
    tables, pictures = (
        ("analysis.json", "analysis_table.md"),
        ("ffn_ratios.png", "ffn_heat.png", "skip_errors.png"),
    )
    files = [folder / name for name in (*tables, *pictures)]
    files[0].write_text(json.dumps(result, indent=1) + "\n")
    files[1].write_text(markdown(found))
    picture_ratios(found, files[2])
    picture_heat(found, files[3])
    picture_errors({name: medians(variant) for name, variant in found.items()}, files[4])
    print(f"\n{files[1].read_text()}\nin {folder}: {', '.join(file.name for file in files)}", flush=True)
    return files


def _record(tracker: Tracker, found: Mapping[str, Any], files: Sequence[Path]) -> None:
    """Curves over layers in place of steps; and the files."""
    for name, variant in found.items():
        ratios = variant["ratios"]
        for number, error in enumerate(medians(variant)):
            values = {f"{name}/error/{place}": value for place, value in error.items() if value is not None}
            if number < len(ratios["visual"]["mean"]):
                values |= {f"{name}/ffn_ratio/{k}": ratios[k]["mean"][number] for k in ("visual", "text")}
            tracker.metrics(values, number)
    for file in files:
        tracker.store(file)
