"""Measure accuracy against cost: score points in parallel Ray tasks, then write tables and figures.

The answers at each point are one file, named by a digest of everything they depend on: the contents of model,
adapter, questions and images, and the settings. A resubmitted job therefore continues where it stopped, and
a job with more points scores only the new ones. The times of one adapter's points share a file, because only
times of the same rounds are comparable.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

from pipelines.cluster.session import check_ray_address, ray_session
from pipelines.cluster.tasks import in_parallel
from pipelines.data.rows import TrainingRow, pick_rows
from pipelines.data.training_rows import read_rows
from pipelines.evaluation.exact_match import TEST
from pipelines.evaluation.fingerprints import of_folder, of_model, of_rows
from pipelines.evaluation.items import OVERALL, read_items, write_items
from pipelines.shared.console import say
from pipelines.shared.files import write_text
from pipelines.shared.folder import JobFolder
from pipelines.shared.paths import copy_into
from pipelines.tradeoff.config import FULL, TradeoffConfig
from pipelines.tradeoff.evidence import Evidence
from pipelines.tradeoff.points import Point, SeededPoint, mean_text_tokens, model_config, points
from pipelines.tradeoff.report import write_report
from pipelines.tradeoff.results import Measurements, share
from pipelines.tradeoff.timing import Seconds
from pipelines.tradeoff.workers import measure_seconds, score, score_second_turn

_TIMES = "by part"
"""Part of the name of every file of times: earlier versions measured the first token alone."""

_EVALUATION = "skipvision.Engine"
"""Part of every digest: answers of another decoding loop are not mixed with these."""


def run_tradeoff(config: TradeoffConfig) -> dict[str, Any]:
    """Score the points that have no answers yet, time all points, and write the report.

    Raises:
        ConfigError: a model, an adapter or a file of rows does not exist.
        AdapterError: a folder holds no adapter, or the adapter of another model.
    """
    config = config.resolved()
    check_ray_address()
    rows = pick_rows(read_rows(config.test), config.rows)
    model, text_tokens = model_config(config.model), mean_text_tokens(config.model, rows)
    todo = list(points(config, model, text_tokens))
    folder = JobFolder(config.storage_path, config.name)
    files = {
        seeded: folder.path / "points" / f"{digest}.parquet"
        for seeded, digest in digests(todo, config, rows).items()
    }
    with folder.claimed():
        with ray_session():
            _score_missing(files, config, rows)
            turns = _score_second_turns(files, config, rows)
            seconds = _time_points(files, folder.path / "times", config, rows)
        measurements = Measurements(
            config,
            model,
            text_tokens,
            {seeded: read_items(file) for seeded, file in files.items()},
            seconds,
            {seeded: read_items(file) for seeded, file in turns.items()},
            {(TEST, row.key): row.messages[-1].text for row in rows},
        )
        evidence = Evidence(measurements)
        results = [evidence.added_to(measurements.result(point)) for point in todo]
        written = write_report(results, folder.path, rows=len(rows), text_tokens=text_tokens)
    if config.report is not None:
        # The numbers name folders of this machine, so they are not published.
        copy_into(Path(config.report), [file for name, file in written.items() if name != "numbers"])
    return {
        "points": len(results),
        "rows": len(rows),
        "found": [{**asdict(one.point), "accuracy": one.accuracy[OVERALL]} for one in results],
        **written,
    }


def digests(
    todo: Sequence[Point], config: TradeoffConfig, rows: Sequence[TrainingRow]
) -> dict[SeededPoint, str]:
    """Return a digest of everything that the answers at each point and seed depend on.

    Files count by their contents, not by their paths.
    """
    model = config.model.model_copy(update={"path": of_model(config.model.path)}).model_dump()
    paths = {path for point in todo for path in point.paths}
    adapters = {path: None if path is None else of_folder(Path(path)) for path in paths}
    common = [_EVALUATION, model, config.max_new_tokens, of_rows(rows)]
    evaluation = sha256(json.dumps(common).encode()).hexdigest()
    return {
        (point, seed): point.digest(evaluation, adapters[path], seed)
        for point in todo
        for seed, path in enumerate(point.paths)
    }


def _score_missing(
    files: Mapping[SeededPoint, Path], config: TradeoffConfig, rows: Sequence[TrainingRow]
) -> None:
    # Two points of the same SkipConfig share a file and are scored once.
    missing = {file: seeded for seeded, file in files.items() if not file.exists()}
    say(f"{len(files)} points, {len(missing)} to be scored on {len(rows)} rows each …")
    _run(missing, config, rows, lambda seeded, shared: (score, (*seeded, config, shared)), "")


def _score_second_turns(
    files: Mapping[SeededPoint, Path], config: TradeoffConfig, rows: Sequence[TrainingRow]
) -> dict[SeededPoint, Path]:
    """Score the missing second turns, and return the file of each point that has them."""
    chosen = (FULL, *config.second_turn) if config.second_turn else ()
    turns = {
        seeded: file.parents[1] / "second_turns" / file.name
        for seeded, file in files.items()
        if seeded[0].method.partition(",")[0] in chosen
    }
    missing = {file: seeded for seeded, file in turns.items() if not file.exists()}
    if missing:
        say(f"{len(missing)} points to be scored on second turns …")
    _run(
        missing,
        config,
        rows,
        lambda seeded, shared: (score_second_turn, (*seeded, config, shared, read_items(files[seeded]))),
        ", second turn",
    )
    return turns


def _run(
    missing: Mapping[Path, SeededPoint],
    config: TradeoffConfig,
    rows: Sequence[TrainingRow],
    task: Callable[[SeededPoint, Any], Any],
    suffix: str,
) -> None:
    """Run a task for each missing file, in parallel, and write its items."""
    import ray

    shared_rows = ray.put(rows)  # sent once instead of with each task
    tasks = [task(seeded, shared_rows) for seeded in missing.values()]
    for number, items in in_parallel(tasks, config.cpus_per_task):
        file, (point, seed) = list(missing.items())[number]
        write_items(file, items)
        say(f"{_label(point, seed)}{suffix}: exact match {share(items):.3f}")


def _time_points(
    files: Mapping[SeededPoint, Path], folder: Path, config: TradeoffConfig, rows: Sequence[TrainingRow]
) -> dict[Point, list[Seconds]]:
    """Return times by round for every point, one adapter at a time and with no other task running.

    Times saved in ``folder`` are reused unless points, rounds or CPUs differ.
    """
    seconds: dict[Point, list[Seconds]] = {}
    for label in config.adapters if config.latency_rounds else ():
        own = [point for point, seed in files if point.adapter == label and not seed]
        stems = [files[point, 0].stem for point in own]
        named = [_TIMES, config.latency_rounds, config.cpus_per_task, stems]
        file = folder / f"{sha256(json.dumps(named).encode()).hexdigest()[:16]}.json"
        if not file.exists():
            say(f"{label}: timing {len(own)} points …")
            [(_, measured)] = in_parallel([(measure_seconds, (own, config, rows))], config.cpus_per_task)
            folder.mkdir(parents=True, exist_ok=True)
            write_text(file, json.dumps([[asdict(one) for one in rounds] for rounds in measured]) + "\n")
        for point, rounds in zip(own, json.loads(file.read_text()), strict=True):
            seconds[point] = [Seconds(**one) for one in rounds]
    return seconds


def _label(point: Point, seed: int) -> str:
    label = point.adapter + (f" (seed {seed})" if seed else "")
    return f"{label}, {point.method}" + (" {} + {}".format(*point.kept) if point.kept else "")
