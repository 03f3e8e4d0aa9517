"""What fine-tuning with Skip-Vision saved and what it cost, beside the same fine-tune with full tokens.

Four variants answer the same test rows: the base model with full tokens and with skipping, as it came
and tuned. Costs are measured on the tuned variants, operation by operation, and predicted.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

import skipvision as sv
from pipelines.cluster.cpus import usable_cpus
from pipelines.compare.report import check_marked, markdown, picture, renew_marked
from pipelines.data.collate import IGNORED, Batch, Collator
from pipelines.data.rows import TrainingRow
from pipelines.data.training_rows import read_training_rows
from pipelines.engines.config import BaseModelSection
from pipelines.engines.loading import arithmetic, load_frozen, load_processor
from pipelines.evaluation.exact_match import (
    Answer,
    accuracy_by_task,
    evaluate_exact_match,
    pick_rows,
)
from pipelines.evaluation.items import OVERALL, Item
from pipelines.evaluation.paired import Paired, paired, widened
from pipelines.finetune.config import FinetuneConfig
from pipelines.finetune.folder import MAY_DIFFER
from pipelines.finetune.learner import summed_loss
from pipelines.shared.folder import comparable
from pipelines.shared.paths import input_path, model_path, output_path
from pipelines.tracking.run import Tracker
from skipvision.errors import ConfigError, DataError
from skipvision.kv_cache import cache_bytes


class CompareConfig(BaseModel):
    """Two finished fine-tuning runs of one base model, and the rows to compare them on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    full: str = Field("demo-full", description="name of the finished run with full tokens (skip: null)")
    skip: str = Field("demo", description="name of the finished run with Skip-Vision")
    storage: str = Field("runs", description="folder of both runs, as they were given it")
    test: str = Field(
        "data/shapes/test.json", description="rows that are asked: LLaVA JSON, JSONL or parquet"
    )
    rows: int = Field(600, ge=1, description="rows asked at most, the tasks in equal shares")
    batch_size: int = Field(50, ge=1, description="rows per forward pass")
    max_new_tokens: int = Field(96, ge=1, description="tokens of an answer, at most")
    untuned: bool = Field(True, description="also ask the base model as it came")
    readme: str | None = Field(
        None,
        description="file in which the table replaces what stands between `<!-- demo table -->` and "
        "`<!-- /demo table -->`",
    )
    threads: int = Field(0, ge=0, description="torch threads; 0 = as many as there are CPUs")


@dataclass(frozen=True)
class Variant:
    """One way of running the base model."""

    name: str
    skip: sv.SkipConfig | None
    adapter: Path | None

    def build(self, base: nn.Module) -> nn.Module:
        """The base model made into this variant."""
        if self.adapter is not None:
            return sv.load_adapter(base, self.adapter, is_trainable=True)
        if self.skip is not None:
            sv.attach(base, self.skip)
        return base


def run_compare(config: CompareConfig) -> dict[str, Any]:
    """Ask, measure, print and record; returns everything that was found.

    Raises:
        ConfigError: a run is not there or not finished, or the two cannot be compared.
    """
    torch.set_num_threads(config.threads or usable_cpus())
    storage = output_path(config.storage, "storage")
    readme = None if config.readme is None else output_path(config.readme, "readme")
    if readme is not None:
        check_marked(readme)
    full, skip = (_finished(storage, name) for name in (config.full, config.skip))
    _check_comparable(full, skip)
    model = FinetuneConfig(**skip["config"]).model
    model = model.model_copy(update={"path": model_path(model.path, "model.path")})
    rows = pick_rows(read_rows(input_path(config.test, "test")), config.rows)
    skip_config = sv.SkipConfig(**skip["config"]["skip"])
    variants = _variants(full, skip, skip_config, untuned=config.untuned)
    answers, costs = _examine_all(variants, model, rows, config)
    for name, run in (("full", full), ("skip", skip)):
        costs[name]["seconds_per_step"] = run["result"]["seconds_per_step"]
        costs[name]["training_seconds"] = run["result"]["training_seconds"]
    result = {
        "rows": len(rows),
        "images": len({_image(row) for row in rows}),
        "exact_match": {name: accuracy_by_task(given) for name, given in answers.items()},
        "difference": {
            task: {"difference": gap.difference, "low": gap.low, "high": gap.high}
            for task, gap in differences(rows, answers).items()
        },
        "costs": costs,
        "ratios": {key: costs["skip"][key] / costs["full"][key] for key in costs["full"]},
        "skip_config": skip_config.model_dump(),
    }
    _write(result, storage / f"{config.skip}-against-{config.full}", readme)
    _track(result, full, skip)
    return result


def differences(rows: Sequence[TrainingRow], answers: dict[str, list[Answer]]) -> dict[str, Paired]:
    """Tuned Skip-Vision minus tuned full tokens, per task and overall, paired by row."""
    full, skip = (_items(rows, answers[name], name) for name in ("full", "skip"))
    found = {}
    for task in [*sorted({row.task for row in rows} - {""}), OVERALL]:
        sides = ([item for item in side if task in (OVERALL, item.category)] for side in (full, skip))
        found[task] = widened(paired(*sides))
    return found


def _items(rows: Sequence[TrainingRow], answers: Sequence[Answer], system: str) -> list[Item]:
    return [
        Item("test", str(index), system, row.task, _image(row), answer.answer, float(answer.correct))
        for index, (row, answer) in enumerate(zip(rows, answers, strict=True))
    ]


def _variants(
    full: dict[str, Any], skip: dict[str, Any], skip_config: sv.SkipConfig, *, untuned: bool
) -> list[Variant]:
    """The tuned variants, and before them the untuned ones if they are wanted."""
    tuned = [
        Variant("full", None, Path(full["result"]["adapter"])),
        Variant("skip", skip_config, Path(skip["result"]["adapter"])),
    ]
    as_it_came = [Variant("full untuned", None, None), Variant("skip untuned", skip_config, None)]
    return [*as_it_came, *tuned] if untuned else tuned


def _examine_all(
    variants: Sequence[Variant], model: BaseModelSection, rows: Sequence[TrainingRow], config: CompareConfig
) -> tuple[dict[str, list[Answer]], dict[str, dict[str, float]]]:
    """Every variant's answers, and what the tuned ones cost."""
    answers: dict[str, list[Answer]] = {}
    costs: dict[str, dict[str, float]] = {}
    print(f"asking {len(variants)} variants {len(rows)} questions each …", flush=True)
    for number, variant in enumerate(variants, start=1):
        started = time.monotonic()
        answers[variant.name], cost = _examine(variant, model, rows, config)
        if variant.adapter is not None:
            costs[variant.name] = cost
        share = accuracy_by_task(answers[variant.name])[OVERALL]
        print(
            f"{number}/{len(variants)} {variant.name}: exact match {share:.3f} on {len(rows)} rows "
            f"({time.monotonic() - started:.0f} s)",
            flush=True,
        )
    return answers, costs


def _examine(
    variant: Variant, model_config: BaseModelSection, rows: Sequence[TrainingRow], config: CompareConfig
) -> tuple[list[Answer], dict[str, float]]:
    """Answers of a variant; for a tuned one also what it costs, on one row of each task."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    compute = arithmetic("auto", device)
    model = variant.build(load_frozen(model_config, compute, device)).eval()
    processor = load_processor(model_config.path)
    with torch.autocast(device.type, torch.bfloat16, enabled=compute == torch.bfloat16):
        answers = evaluate_exact_match(
            model, processor, rows, batch_size=config.batch_size, max_new_tokens=config.max_new_tokens
        )
    tasks = len({row.task for row in rows})
    cost = _measure(model, variant, processor, pick_rows(rows, tasks)) if variant.adapter else {}
    del model
    gc.collect()
    return answers, cost


def _measure(
    model: nn.Module, variant: Variant, processor: Any, rows: Sequence[TrainingRow]
) -> dict[str, float]:
    """Means over rows of costs, measured and predicted: prefill of the prompt, step on the whole row."""
    collate = Collator(processor)
    device = next(model.parameters()).device
    adapter: Any = model
    rank = next(iter(adapter.peft_config.values())).r
    sums: dict[str, float] = {}
    for row in rows:
        batch = collate([row]).to(device)
        inputs = batch.inputs
        answer = int((batch.labels != IGNORED).sum())
        visual = int((inputs["input_ids"] == model.config.image_token_id).sum())
        text = inputs["input_ids"].shape[1] - visual - answer
        length = inputs["input_ids"].shape[1]
        prompt = {k: v[:, : visual + text] if v.shape == (1, length) else v for k, v in inputs.items()}
        predicted = sv.predict_cost(
            model.config,
            variant.skip,
            images=len(row.images),
            text_tokens=text,
            new_tokens=answer,
            lora_rank=rank,
            dtype=next(model.parameters()).dtype,
        )
        with adapter.disable_adapter(), torch.no_grad():  # as merged: LoRA costs nothing then
            prefill = sv.measure_flops(partial(model, **prompt, use_cache=True, logits_to_keep=1))
            cache = model(**prompt, use_cache=True, logits_to_keep=1).past_key_values
        held = cache_bytes(cache)
        found = {
            "prefill_flops": prefill,
            "prefill_flops_predicted": predicted.prefill_flops,
            "train_flops": sv.measure_flops(partial(_step, model, batch)),
            "train_flops_predicted": predicted.train_flops,
            "kv_bytes": held,
            "kv_bytes_predicted": predicted.kv_bytes,
            "kv_bytes_per_image": held * (1 - text / cache.get_seq_length()) / max(len(row.images), 1),
        }
        for key, value in found.items():
            sums[key] = sums.get(key, 0.0) + value / len(rows)
    return sums


def _step(model: nn.Module, batch: Batch) -> None:
    """Forward and backward of one training step."""
    summed_loss(model, batch)[0].backward()
    model.zero_grad()


def _image(row: TrainingRow) -> str:
    return str(row.images[0]) if row.images else row.key


def read_rows(source: str) -> list[TrainingRow]:
    """Rows to be asked; raises `DataError` if some of them cannot be."""
    data = read_training_rows(source)
    if data.rejects:
        first = data.rejects[0]
        raise DataError(
            f"{source}: {len(data.rejects)} rows cannot be asked, {first.key}: {first.reason}, for one"
        )
    return list(data.rows)


def _finished(storage: Path, name: str) -> dict[str, Any]:
    file = storage / name / "run.json"
    state: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    if "result" not in state:
        raise ConfigError(f"{storage / name} holds no finished fine-tuning run; run jobs/finetune.py first")
    return state


def _check_comparable(full: dict[str, Any], skip: dict[str, Any]) -> None:
    """The runs may differ in name, in whether they skip, and in where they ran; in nothing else."""
    if full["config"]["skip"] is not None or skip["config"]["skip"] is None:
        raise ConfigError("full must name a run with skip: null, and skip one with Skip-Vision")
    one, two = (comparable(run["config"], MAY_DIFFER) for run in (full, skip))
    free = {"name", "skip", "evaluation"}
    names = [name for name in sorted({*one, *two}) if name.partition(".")[0] not in free]
    other = [name for name in names if one.get(name) != two.get(name)]
    if other:
        raise ConfigError(f"the runs cannot be compared: they differ in {', '.join(other)}")


def _write(result: dict[str, Any], folder: Path, readme: Path | None) -> None:
    """Table and picture: on the screen, in the folder, and in the README if it is to have them."""
    folder.mkdir(parents=True, exist_ok=True)
    table, image = folder / "comparison.md", folder / "comparison.png"
    table.write_text(markdown(result))
    picture(result, image)
    result["table"], result["picture"] = str(table), str(image)
    print(f"\n{table.read_text()}", flush=True)
    if readme is not None:
        renew_marked(readme, table.read_text())
        print(f"{readme} has this table now; the picture is {image}", flush=True)


def _track(result: dict[str, Any], full: dict[str, Any], skip: dict[str, Any]) -> None:
    """Both runs get their test metrics in MLflow; the Skip-Vision run also the ratios, table and picture."""
    ratios = {f"ratio_to_full/{key}": value for key, value in result["ratios"].items()}
    for name, run, more in (("full", full, {}), ("skip", skip, ratios)):
        tracker = Tracker(run["result"]["mlflow_uri"], run["result"]["mlflow_run_id"])
        shares = {f"test/exact_match/{task}": v for task, v in result["exact_match"][name].items()}
        tracker.metrics({**shares, **more}, 0)
        tracker.upload()
        if name == "skip":
            for path in (result["table"], result["picture"]):
                tracker.store(Path(path))
