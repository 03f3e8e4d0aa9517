"""The scoring job: evaluate systems on benchmarks and compare them with a reference, item by item.

`run_score` shows all steps: claim the folder, read the datasets, answer their questions with each system,
score the answers, compare, record. Each system answers each dataset in a captioning job
(`pipelines.caption.job`), which continues after a kill.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pipelines.caption.config import CaptionConfig, InputSection, OutputSection
from pipelines.caption.job import run_caption
from pipelines.cluster.session import check_ray_address, ray_session
from pipelines.data.error_limit import ErrorLimit
from pipelines.engines.backend import check_backend
from pipelines.engines.model import EngineModel, check_model, find_model, insist_on_same_adapter
from pipelines.engines.vllm.pruning import mapped
from pipelines.engines.vllm.settings import SettingNames
from pipelines.evaluation.items import write_items
from pipelines.score.config import ScoreConfig
from pipelines.score.dataset import Dataset, read_dataset
from pipelines.score.fingerprints import of_files
from pipelines.score.folder import ScoreFolder
from pipelines.score.measures import (
    Measured,
    measure,
    measures_metrics,
    measures_result,
    measures_table,
)
from pipelines.score.points import Prediction, Scored, Systems, mean_score, score_answers
from pipelines.score.report import Comparisons, compare, figure, markdown, metrics
from pipelines.score.rules.judge import Judge
from pipelines.shared.console import say
from pipelines.shared.files import write_text
from pipelines.tracking.config import TrackingConfig
from pipelines.tracking.registry import is_registered
from pipelines.tracking.run import Tracker
from pipelines.tracking.tracked import finished_result, tracked_runs
from skipvision.errors import ConfigError


@dataclass(frozen=True)
class _Job:
    """The inputs of all steps: settings, folder, datasets and models."""

    config: ScoreConfig
    folder: ScoreFolder
    uri: str
    datasets: tuple[Dataset, ...]
    models: Mapping[str, EngineModel]
    files: Mapping[str, str]
    judge: Judge | None = None


def run_score(config: ScoreConfig) -> dict[str, Any]:
    """Run, continue or only report the job ``config.name``, and return its result.

    A finished job whose `ScoreFolder.reported` settings have changed is compared and recorded again.

    The result has these fields, most of them by system and dataset: ``items`` (the file of each system),
    ``score`` (mean points, fractions), ``measures`` and ``measure_differences`` (calibration and objects in
    captions, by slice), ``totals`` (further numbers that the benchmark publishes),
    ``difference`` (to the reference, with its interval), ``errors`` (items without an answer), ``left_out``
    (rows that do not count, by dataset and reason), ``table``, ``picture``, ``seconds`` (of this start),
    ``mlflow_uri``, ``mlflow_run_ids`` and ``already_finished``.

    Raises:
        ConfigError: the settings contradict each other, a model or file does not exist, or settings or
            contents of files differ from the first start.
        AdapterError: an adapter is damaged, or belongs to another model.
        DataError: a dataset lacks columns or answers, or too many rows have an error.
        JudgeError: the judge cannot be reached.
        ResourceError: the cluster is too small.
        TrackingError: MLflow cannot be reached, or does not accept the results.
    """
    started = time.monotonic()
    folder = ScoreFolder(config.storage_path, config.name)
    with folder.claimed():
        folder.resume(config)
        config.resolved()  # raises for missing paths; the systems keep their paths as given
        check_ray_address()
        job = _read(config, folder)
        if folder.is_reported(config) and (result := finished_result(config, folder, folder.table)):
            return {**result, "already_finished": True}
        job = _begin(job)
        parameters = {label: _parameters(job, label) for label in job.models}
        # Ray is left after the MLflow runs have ended, because stopping it takes seconds.
        with (
            ExitStack() as ray,
            tracked_runs(config, folder, config.model_dump(mode="json"), parameters) as runs,
        ):
            _answer_missing(job, ray)
            scored = {label: _score(job, label) for label in config.systems}
            comparisons = _compare(job, scored)
            measured = measure(config, job.datasets, scored)
            _record(job, scored, comparisons, measured, runs)
        result = _result(job, scored, comparisons, runs) | measures_result(measured)
        result["seconds"] = round(time.monotonic() - started, 2)
        folder.remember(result=result)
        return {**result, "already_finished": False}


# ----------------------------------------------------------------------------------- before answering


def _read(config: ScoreConfig, folder: ScoreFolder) -> _Job:
    """Read datasets and models, and check that they are those of the job's first start."""
    datasets = tuple(
        read_dataset(one.name, one.path, rule=one.rule, instruction=one.instruction, limit=one.limit)
        for one in config.datasets
    )
    for dataset in datasets:
        if dataset.benchmark.rule.needs_judge and config.judge is None:
            raise ConfigError(
                f"dataset {dataset.name} is scored by a judge: set judge.model and judge.base_url"
            )
    uri = config.tracking.absolute_uri(folder.storage)
    pinned = folder.state.get("adapters", {})
    models = {}
    for label, system in config.systems.items():
        known = pinned.get(label)
        if folder.state.get("result"):
            insist_on_same_adapter(system.model, uri, known)
        found = find_model(system, uri, folder.path / "adapters" / label, known)
        models[label] = mapped(found, config.engine)
        if not folder.state.get("result"):
            check_model(models[label])
            one = f"systems.{label}"
            names = SettingNames(model=f"{one}.model.", skip=f"{one}.skip", adapters=f"{one}.model.adapter")
            check_backend(models[label], config.engine, names)
    files = of_files(datasets, models.values())
    folder.require_same_files(files)
    return _Job(config, folder, uri, datasets, models, files)


def _begin(job: _Job) -> _Job:
    """Report the datasets, check the limit on errors, and write the indices of the usable questions.

    This happens before Ray starts, so that mistakes show at once.
    """
    config, folder = job.config, job.folder
    judge = None if config.judge is None else Judge(config.judge, folder.judge)
    for dataset in job.datasets:
        for line in dataset.facts():
            say(line)
        limit = ErrorLimit(config.max_error_fraction, len(dataset.questions))
        problems = [f"{one.problem} (row {one.index})" for one in dataset.unusable]
        limit.check(Counter(problem.partition(":")[0] for problem in problems), *problems[:1])
    folder.remember_settings(
        config,
        adapters={label: model.adapter_label for label, model in job.models.items()},
        files=job.files,
        result=None,
    )
    for dataset in job.datasets:
        file = folder.questions(dataset.name)
        file.parent.mkdir(exist_ok=True)
        lines = (f"{one.index}\n" for one in dataset.questions if one.problem is None)
        file.write_text("".join(lines), encoding="utf-8")
    return replace(job, judge=judge)


def _parameters(job: _Job, label: str) -> dict[str, Any]:
    """Return the parameters of a system's MLflow run."""
    config = job.config
    return {
        "system": {"label": label, "reference": config.reference, **_identity(job.models[label])},
        "sampling": config.sampling.model_dump(mode="json"),
        "datasets": ", ".join(dataset.name for dataset in job.datasets),
        "judge": config.judge and config.judge.model,
    }


def _identity(model: EngineModel) -> dict[str, str | None]:
    return {"model": model.label, "adapter": model.adapter_label, "skip": model.skip.model_dump_json()}


def _description(job: _Job, label: str) -> dict[str, str | None]:
    """Return the metadata of a system's file of items: its identity, and the inputs of its evaluation."""
    model, config = job.models[label], job.config
    return {
        **_identity(model),
        "weights": job.files[f"base model {model.label}"],
        "sampling": config.sampling.model_dump_json(),
        "judge": None if config.judge is None else config.judge.model,
        **{name: digest for name, digest in job.files.items() if name.startswith("dataset ")},
    }


# ------------------------------------------------------------------------------------------ answering


def _answer_missing(job: _Job, ray: ExitStack) -> None:
    """Answer every dataset with every system, except those that are answered already."""
    done = list(job.folder.state.get("answered", []))
    missing = [
        (label, dataset)
        for label in job.config.systems
        for dataset in job.datasets
        if [label, dataset.name] not in done
    ]
    if missing:
        ray.enter_context(ray_session())
    for number, (label, dataset) in enumerate(missing, start=1):
        say(f"{number}/{len(missing)} {label} answers {dataset.name}")
        run_caption(_captioning(job, label, dataset))
        done.append([label, dataset.name])
        job.folder.remember(answered=done)


def _captioning(job: _Job, label: str, dataset: Dataset) -> CaptionConfig:
    config, model = job.config, job.models[label]
    section = config.systems[label].model
    if section.adapter is not None and is_registered(section.adapter):
        section = section.model_copy(update={"adapter": model.adapter_label})  # the alias may move
    return CaptionConfig(
        name=f"{config.name}.{label}.{dataset.name}",
        storage=str(job.folder.answers / label),
        model=section,
        skip=model.skip,
        input=InputSection(
            source=dataset.file,
            prompt=dataset.template,
            key="index",
            keys=str(job.folder.questions(dataset.name)),
        ),
        sampling=config.sampling.model_copy(update={"logprobs": 0}),
        engine=config.engine,
        output=OutputSection(shard_rows=config.shard_rows),
        max_error_fraction=config.max_error_fraction,
        tracking=TrackingConfig(uri=job.uri, experiment=config.tracking.experiment),
        scaling=config.scaling,
    )


# -------------------------------------------------------------------------------------------- scoring


def _score(job: _Job, label: str) -> dict[str, Scored]:
    """Score a system's answers, write its file of items, and return the scores by dataset."""
    config = job.config
    parallel = config.judge.parallel if config.judge else 1
    scored = {}
    for dataset in job.datasets:
        predictions = _predictions(_captioning(job, label, dataset))
        scored[dataset.name] = score_answers(
            dataset, predictions, label, job.judge, parallel, config.max_error_fraction
        )
    items = [item for one in scored.values() for item in one.items]
    write_items(job.folder.items(label), items, {label: _description(job, label)})
    return scored


def _predictions(captioning: CaptionConfig) -> dict[str, Prediction]:
    captions = pq.read_table(Path(captioning.storage) / captioning.name / "captions").to_pylist()
    return {
        row["key"]: Prediction(error=f"{row['error_kind']}: {row['error']}")
        if row["error_kind"]
        else Prediction(row["text"] or "", log_probability=row.get("log_probability"))
        for row in captions
    }


def _compare(job: _Job, scored: Systems) -> Comparisons:
    """Compare every system with the reference."""
    config, reference = job.config, scored[job.config.reference]
    return {
        label: {
            name: compare(
                reference[name].items, one.items, resamples=config.resamples, confidence=config.confidence
            )
            for name, one in datasets.items()
        }
        for label, datasets in scored.items()
        if label != config.reference
    }


def _record(
    job: _Job,
    scored: Systems,
    comparisons: Comparisons,
    measured: Sequence[Measured],
    runs: Mapping[str, Tracker],
) -> None:
    """Write table and figure, and upload them with the items and numbers to each system's run."""
    config, folder = job.config, job.folder
    left_out = {dataset.name: dict(dataset.left_out) for dataset in job.datasets}
    tables = (markdown(config, scored, comparisons, left_out), measures_table(config, measured))
    write_text(folder.table, "\n".join(tables))
    figure(config, scored, comparisons, folder.figure)
    say(f"\n{folder.table.read_text(encoding='utf-8')}")
    for label, run in runs.items():
        run.advice = (
            f"The items are complete in {folder.items(config.reference).parents[1]}. Run the same job again "
            "to record them; no question is answered twice"
        )
        numbers = metrics(scored[label], comparisons.get(label, {})) | measures_metrics(measured, label)
        run.metrics(numbers, 0)
        for path in (folder.items(label), folder.table, folder.figure):
            run.store(path)


def _result(
    job: _Job, scored: Systems, comparisons: Comparisons, runs: Mapping[str, Tracker]
) -> dict[str, Any]:
    config, folder = job.config, job.folder
    return {
        "run": config.name,
        "items": {label: str(folder.items(label)) for label in scored},
        "score": {
            label: {name: round(mean_score(one.items), 6) for name, one in datasets.items()}
            for label, datasets in scored.items()
        },
        "totals": {
            label: {name: one.totals for name, one in datasets.items() if one.totals}
            for label, datasets in scored.items()
        },
        "difference": {
            label: {name: asdict(comparison.overall) for name, comparison in datasets.items()}
            for label, datasets in comparisons.items()
        },
        "errors": {
            label: {name: sum(item.error is not None for item in one.items) for name, one in datasets.items()}
            for label, datasets in scored.items()
        },
        "left_out": {dataset.name: dict(dataset.left_out) for dataset in job.datasets},
        "table": str(folder.table),
        "picture": str(folder.figure),
        "mlflow_uri": job.uri,
        "mlflow_run_ids": {label: run.run_id for label, run in runs.items()},
    }
