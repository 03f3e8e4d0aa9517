"""What accuracy costs: points scored as parallel Ray tasks, then one table and two pictures.

Each finished point is a file that is named by the contents of model, adapter, questions and images, and by
settings. So a job that was killed goes on where it was, and one with more points scores only these. The times
of an adapter's points are one file, for only times of the same rounds can be compared.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

import skipvision as sv
from pipelines.cluster.session import ray_session
from pipelines.cluster.tasks import in_parallel
from pipelines.compare.job import read_rows
from pipelines.data.rows import TrainingRow
from pipelines.evaluation.exact_match import pick_rows
from pipelines.evaluation.items import OVERALL, Item, read_items, write_items
from pipelines.evaluation.paired import paired_by_seed, widened
from pipelines.score.fingerprints import of_folder, of_images, of_model
from pipelines.shared.paths import copy_into, input_path, model_path, output_folder, output_path
from pipelines.tradeoff.config import TradeoffConfig
from pipelines.tradeoff.points import (
    FULL,
    SKIP_VISION,
    Answered,
    Found,
    Point,
    first_token_seconds,
    model_config,
    points,
    score,
    text_tokens,
)
from pipelines.tradeoff.report import write_report
from skipvision.baselines import language_share


def run_tradeoff(config: TradeoffConfig) -> dict[str, Any]:
    """Score what is not scored yet, time all points, write table and pictures.

    Raises:
        ConfigError: a model, adapter or file of rows that is not there.
        AdapterError: a folder that is no adapter, or one of another model.
    """
    config = _located(config)
    folder = output_path(config.storage, "storage") / config.name
    rows = pick_rows(read_rows(config.test), config.rows)
    geometry, text = model_config(config.model), text_tokens(config.model, rows)
    todo = list(points(config, geometry, text))
    report = None if config.report is None else output_folder(config.report, "report")
    files = {
        answered: folder / "points" / f"{digest}.parquet"
        for answered, digest in digests(todo, config, rows).items()
    }
    with ray_session():
        _score_missing(files, config, rows)
        seconds = _timed(files, folder / "times", config, rows)
    items = {answered: read_items(file) for answered, file in files.items()}
    found = [_found(point, items, config, geometry, text, seconds) for point in todo]
    written = write_report(found, folder, rows=len(rows), text_tokens=text)
    if report is not None:
        shown = [file for name, file in written.items() if name != "numbers"]  # which name the folders here
        copy_into(report, shown)
    return {
        "points": len(found),
        "rows": len(rows),
        "found": [{**asdict(one.point), "accuracy": one.accuracy[OVERALL]} for one in found],
        **written,
    }


def _located(config: TradeoffConfig) -> TradeoffConfig:
    """The same with absolute paths, as tasks in other processes need them."""
    adapters = {
        label: adapter
        if adapter.path is None
        else adapter.model_copy(
            update={
                "path": input_path(adapter.path, f"adapters.{label}.path"),
                "other_seeds": tuple(
                    input_path(path, f"adapters.{label}.other_seeds") for path in adapter.other_seeds
                ),
            }
        )
        for label, adapter in config.adapters.items()
    }
    model = config.model.model_copy(update={"path": model_path(config.model.path, "model.path")})
    test = input_path(config.test, "test")
    return config.model_copy(update={"adapters": adapters, "model": model, "test": test})


def digests(
    todo: Sequence[Point], config: TradeoffConfig, rows: Sequence[TrainingRow]
) -> dict[Answered, str]:
    """Names of points under each seed by all that their answers depend on: contents of files, not paths."""
    model = config.model.model_copy(update={"path": of_model(config.model.path)}).model_dump()
    questions = [[row.key, row.task, *(message.text for message in row.messages)] for row in rows]
    images = of_images(image for row in rows for image in row.images)
    paths = {path for point in todo for path in point.paths}
    adapters = {path: None if path is None else of_folder(Path(path)) for path in paths}
    asked = [model, config.max_new_tokens, questions, images]
    common = sha256(json.dumps(asked).encode()).hexdigest()
    return {
        (point, seed): point.digest(common, adapters[path], seed)
        for point in todo
        for seed, path in enumerate(point.paths)
    }


def _score_missing(files: dict[Answered, Path], config: TradeoffConfig, rows: Sequence[TrainingRow]) -> None:
    import ray

    # A point may stand under two names; its answers are the same.
    missing = {file: answered for answered, file in files.items() if not file.exists()}
    print(f"{len(files)} points, {len(missing)} to be scored on {len(rows)} rows each …", flush=True)
    asked = ray.put(rows)  # once, and not with each task
    tasks = [(score, (*answered, config, asked)) for answered in missing.values()]
    for number, items in in_parallel(tasks, config.cpus_per_task):
        file, (point, seed) = list(missing.items())[number]
        write_items(file, items)
        print(f"{_named(point, seed)}: exact match {_share(items):.3f}", flush=True)


def _timed(
    files: dict[Answered, Path], folder: Path, config: TradeoffConfig, rows: Sequence[TrainingRow]
) -> dict[Point, list[float]]:
    """Seconds by round: each adapter's points one after the other, with nothing of ours beside them.

    Times that are in ``folder`` are not measured again, unless other points, rounds or CPUs are asked for.
    """
    seconds: dict[Point, list[float]] = {}
    for label in config.adapters if config.latency_rounds else ():
        own = [point for point, seed in files if point.adapter == label and not seed]
        named = [config.latency_rounds, config.cpus_per_task, [files[point, 0].stem for point in own]]
        file = folder / f"{sha256(json.dumps(named).encode()).hexdigest()[:16]}.json"
        if not file.exists():
            print(f"{label}: timing {len(own)} points …", flush=True)
            [(_, measured)] = in_parallel([(first_token_seconds, (own, config, rows))], config.cpus_per_task)
            folder.mkdir(parents=True, exist_ok=True)
            partial = file.with_name(f".{file.name}.partial")
            partial.write_text(json.dumps(measured) + "\n")
            partial.replace(file)
        seconds |= dict(zip(own, json.loads(file.read_text()), strict=True))
    return seconds


def _found(
    point: Point,
    items: dict[Answered, list[Item]],
    config: TradeoffConfig,
    geometry: Any,
    text: int,
    seconds: dict[Point, list[float]],
) -> Found:
    cost = sv.predict_cost(geometry, point.skip, text_tokens=text)
    label = config.adapters[point.adapter].reference or point.adapter
    full = {one.adapter: one for one, _ in items if one.method == FULL}
    reference, whole = full[label], full[point.adapter]
    rival = _rival(point, items)
    sides = [
        (items[reference, min(seed, len(reference.paths) - 1)], items[point, seed])
        for seed in range(len(point.paths))
    ]
    gaps = {
        task: paired_by_seed([(_of(task, before), _of(task, after)) for before, after in sides])
        for task in [*sorted({item.category for item in items[point, 0]} - {""}), OVERALL]
    }
    if point != reference:  # which cannot differ from itself
        gaps = {task: widened(gap) for task, gap in gaps.items()}
    ratios = [own / full for own, full in zip(seconds[point], seconds[whole], strict=True)] if seconds else []
    ratio = _quartiles(ratios) if seconds else None
    return Found(
        point,
        language_flops=language_share(cost),
        prefill_flops=cost.ratio_to_full.prefill_flops,
        kv_bytes=cost.ratio_to_full.kv_bytes,
        latency=ratio and ratio[1],
        latency_quartiles=ratio and (ratio[0], ratio[2]),
        first_token_seconds=_quartiles(seconds[point]) if seconds else None,
        accuracy={task: gap.other for task, gap in gaps.items()},
        gap=gaps,
        by_seed=[_share(after) - _share(before) for before, after in sides],
        behind=rival
        and widened(
            paired_by_seed([(items[point, seed], items[rival, seed]) for seed in range(len(point.paths))])
        ),
    )


def _rival(point: Point, items: dict[Answered, list[Item]]) -> Point | None:
    """Skip-Vision as it spends the same, under the same adapter."""
    if point.budget is None or point.method == SKIP_VISION:
        return None
    same = (point.adapter, SKIP_VISION, point.budget)
    return next((one for one, _ in items if (one.adapter, one.method, one.budget) == same), None)


def _share(items: Sequence[Item]) -> float:
    return sum(item.score for item in items) / len(items)


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    first, median, third = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
    return first, median, third


def _of(task: str, items: Sequence[Item]) -> list[Item]:
    return [item for item in items if task in (OVERALL, item.category)]


def _named(point: Point, seed: int) -> str:
    label = point.adapter + (f" (seed {seed})" if seed else "")
    return f"{label}, {point.method}" + (" {} + {}".format(*point.kept) if point.kept else "")
