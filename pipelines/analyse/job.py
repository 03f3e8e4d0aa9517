"""What the FFN does to visual tokens, and the error of skipping it: of a base model, and as it was tuned."""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

import torch
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
from pipelines.shared.files import write_text
from pipelines.shared.folder import JobFolder
from pipelines.shared.paths import InputPath, OutputFolder, copy_into
from pipelines.tracking.config import TrackedConfig
from pipelines.tracking.run import Tracker
from pipelines.tracking.tracked import finished_result, tracked_run
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


class AnalyseConfig(TrackedConfig):
    """What is measured, on which data."""

    model: BaseModelSection = Field(description="the base model")
    adapter: InputPath | None = Field(
        None, description="folder of a fine-tuned adapter, which is then measured too; null = none"
    )
    skip: sv.SkipConfig | None = Field(
        None,
        description="which visual tokens are retained, all others being skipped; null = as the adapter "
        "was trained",
    )
    data: InputPath = Field(description="rows to measure on: LLaVA JSON, chat JSONL or parquet")
    ratio_rows: int = Field(64, ge=1, description="rows for the FFN ratios, the tasks in equal shares")
    bound_rows: int = Field(4, ge=1, description="rows for the error and its bounds")
    batch_size: int = Field(8, ge=1, description="rows per forward pass")
    worst_case: bool = Field(
        True,
        description="also bound the error from spectral norms, which only layers like Llama's allow",
    )
    report: OutputFolder | None = Field(None, description="folder that also gets the table and the pictures")
    threads: int = Field(0, ge=0, description="torch threads; 0 = as many as there are CPUs")


class AnalysisFolder(JobFolder):
    """Job ``name`` under ``storage``, new or resumed."""

    may_differ: ClassVar[frozenset[str]] = frozenset({"storage", "tracking", "report", "threads"})

    def __init__(self, storage: Path, name: str) -> None:
        super().__init__(storage, name)
        self.numbers = self.path / "analysis.json"
        self.table = self.path / "analysis_table.md"
        self.pictures = tuple(
            self.path / name for name in ("ffn_ratios.png", "ffn_heat.png", "skip_errors.png")
        )

    @property
    def has_work(self) -> bool:
        return bool(self.state.get("measured"))


def run_analyse(config: AnalyseConfig) -> dict[str, Any]:
    """Measure, draw and record, or report the finished job; returns medians over prompts, and the files.

    Raises:
        ConfigError: model, adapter or data do not exist, no settings say which tokens are retained, or an
            earlier start had other settings.
        DataError: no row has an image.
        UnsupportedModelError: the model's kind is not supported.
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
        copy_into(Path(absolute.report), [folder.table, *folder.pictures])
    return {**result, "already_finished": finished}


def _complete(config: AnalyseConfig, absolute: AnalyseConfig, folder: AnalysisFolder) -> dict[str, Any]:
    """Measure, unless that is done, and record; returns the job's result."""
    adapter = None if absolute.adapter is None else Path(absolute.adapter)
    skip = _retaining(absolute, adapter)
    rows = [row for row in _rows(absolute.data) if row.images]
    if not rows:
        raise DataError(f"data = {config.data}: no row has an image")
    settings = {**config.model_dump(mode="json"), "skip": skip.model_dump(mode="json")}
    with tracked_run(config, folder, settings, settings) as run:
        if not folder.has_work:
            found = {
                name: _measure(name, absolute.model, folder_of, skip, rows, absolute)
                for name, folder_of in {"base": None, "tuned": adapter}.items()
                if name == "base" or folder_of is not None
            }
            _write({"skip": skip.model_dump(), "variants": found}, folder)
            folder.remember(measured=True)
        found = json.loads(folder.numbers.read_text())["variants"]
        files = [folder.numbers, folder.table, *folder.pictures]
        run.advice = f"The analysis is complete in {folder.path}. Run the same job again to record it"
        _record(run, found, files)
    return {
        "mlflow_uri": run.uri,
        "mlflow_run_id": run.run_id,
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


def _write(result: dict[str, Any], folder: AnalysisFolder) -> None:
    """Write the numbers, the table and the pictures."""
    found = result["variants"]
    write_text(folder.numbers, json.dumps(result, indent=1) + "\n")
    write_text(folder.table, markdown(found))
    ratios, heat, errors = folder.pictures
    picture_ratios(found, ratios)
    picture_heat(found, heat)
    picture_errors({name: medians(variant) for name, variant in found.items()}, errors)
    names = ", ".join(file.name for file in (folder.numbers, folder.table, *folder.pictures))
    print(f"\n{folder.table.read_text()}\nin {folder.path}: {names}", flush=True)


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
