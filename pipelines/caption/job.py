"""Captioning a data set with the engine under Ray Data, tracked in MLflow.

`run_caption` is the whole story of a job: claim its folder, find the model, list the inputs, caption the
shards that are not there yet, sum up. A job that was killed anywhere on this way is continued by running
the same configuration again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import yaml

from pipelines.caption.config import CaptionConfig
from pipelines.caption.folder import CaptionFolder, CaptionShards, Tally
from pipelines.caption.manifest import Manifest, ManifestFacts, write_manifest
from pipelines.caption.progress import CaptionProgress
from pipelines.caption.report import record, savings
from pipelines.caption.resources import engine_resources
from pipelines.caption.rows import Caption
from pipelines.caption.stages import Assignment, Written, captions
from pipelines.cluster.resources import node_resources
from pipelines.cluster.session import ray_session
from pipelines.engines.model import EngineModel, check_model, find_model
from pipelines.shared.error_limit import ErrorLimit, listed
from pipelines.shared.paths import input_path, output_path
from pipelines.tracking.client import TrackingError
from pipelines.tracking.run import Tracker
from skipvision.errors import SkipVisionError

__all__ = ["CaptionConfig", "run_caption"]


def run_caption(config: CaptionConfig) -> dict[str, Any]:
    """Caption, or go on, or only report the job ``config.name``; returns its result.

    The result holds ``captions`` (folder), ``rows``, ``captioned``, ``errors`` by kind, ``tokens`` by column,
    ``savings`` (predicted and counted), ``rows_per_second`` (of this start, once engines ran), ``seconds``
    (of all starts), ``mean_running`` (captions that an engine wrote at once), ``model``, ``adapter``,
    ``mlflow_uri``, ``mlflow_run_id`` and ``already_finished``.

    Raises:
        ConfigError: settings that contradict each other, the model, the inputs or an earlier start.
        DataError: inputs that cannot be read at all, or more error rows than allowed.
        ResourceError: the cluster is too small.
        TrackingError: MLflow cannot be reached.
    """
    folder = CaptionFolder(output_path(config.storage, "storage"), config.name)
    with folder.claimed():
        continued = folder.resumes(config.model_dump(mode="json"))
        if result := folder.state.get("result"):
            print(f"job {folder.finished_already(config.tracking, folder.captions)}", flush=True)
            return {**result, "already_finished": True}
        absolute = _absolute(config)
        uri = config.tracking.absolute_uri(folder.storage)
        model = find_model(absolute, uri, folder.adapter, folder.state.get("adapter"))
        model_config = check_model(model)
        if not continued or "listed" not in folder.state:
            _list_inputs(absolute, config, folder)
        folder.remember(adapter=model.adapter_label)
        work = Assignment(absolute, model, folder.manifest, folder.attempts)
        manifest = Manifest(folder.manifest)
        shards = CaptionShards(folder.captions, config.output.format)
        tracker = _start_tracking(absolute, folder, uri, model, manifest)
        try:
            running = _caption_missing(work, manifest, shards, folder, tracker)
        except BaseException:
            with suppress(TrackingError):
                tracker.close()
                tracker.finish("FAILED")
            raise
        return _sum_up(work, manifest, shards, folder, tracker, savings_of=model_config, running=running)


class EngineDiedError(SkipVisionError):
    """An engine does not live long enough to write anything."""


# ------------------------------------------------------------------------------------ before captioning


def _absolute(config: CaptionConfig) -> CaptionConfig:
    """The configuration with every path absolute: readers and engines run elsewhere."""
    paths = {"source": input_path(config.input.source, "input.source")}
    if config.input.image_root is not None:
        paths["image_root"] = input_path(config.input.image_root, "input.image_root")
    if config.input.keys is not None:
        paths["keys"] = input_path(config.input.keys, "input.keys")
    return config.model_copy(update={"input": config.input.model_copy(update=paths)})


def _list_inputs(absolute: CaptionConfig, config: CaptionConfig, folder: CaptionFolder) -> None:
    """Write the manifest; it and the settings are what a continued job goes by."""
    print(f"job {config.name!r}: listing {absolute.input.source}", flush=True)
    facts = write_manifest(absolute.input, folder.manifest, config.output.shard_rows, _say)
    for line in _described(facts):
        _say(line)
    folder.state = {}
    folder.remember(
        config=config.model_dump(mode="json"),
        listed={"rows": facts.rows, "problems": facts.problems, "passed_over": facts.passed_over},
    )


def _described(facts: ManifestFacts) -> Iterator[str]:
    yield f"{facts.rows:,} rows"
    if facts.problems:
        yield "already known to be error rows: " + listed(facts.problems)
    if facts.passed_over:
        passed = {suffix or "no suffix": count for suffix, count in facts.passed_over.items()}
        yield "passed over, as they are no images by their names: " + listed(passed)


def _start_tracking(
    config: CaptionConfig, folder: CaptionFolder, uri: str, model: EngineModel, manifest: Manifest
) -> Tracker:
    known = folder.tracked(config.tracking, "mlflow_run_id")
    tracker = Tracker.start(
        uri,
        experiment=config.tracking.experiment,
        run_name=config.name,
        artifacts=folder.storage / "mlflow-artifacts",
        run_id=known,
    )
    if known is None:
        resolved = {**config.model_dump(mode="json"), "skip": model.skip.model_dump(mode="json")}
        facts = {"rows": manifest.rows, "shards": manifest.shards, "adapter_version": model.adapter_label}
        tracker.parameters({**resolved, "job": facts})
        tracker.text(yaml.safe_dump(resolved, sort_keys=False), "config.yaml")
        folder.remember_tracked(config.tracking, mlflow_run_id=tracker.run_id)
    return tracker


# ------------------------------------------------------------------------------------------ captioning


def _caption_missing(
    work: Assignment, manifest: Manifest, shards: CaptionShards, folder: CaptionFolder, tracker: Tracker
) -> CaptionProgress:
    """Caption every shard whose file is not there."""
    shards.clean()
    folder.attempts.clear()
    missing = shards.missing(manifest.shards)
    done = Tally()
    for table in shards.tables(range(manifest.shards)):
        done.add(table)
    limit = ErrorLimit(work.config.max_error_fraction, manifest.rows)
    # Rows that were errors when they were listed may be in these shards or in those: not counted twice.
    limit.check(done.errors)
    limit.check(Counter(folder.state["listed"]["problems"]))
    progress = CaptionProgress(manifest.rows, done, tracker, folder.state.get("seconds", 0.0))
    if not missing:
        return progress
    if done.rows:
        _say(f"{done.rows:,} of {manifest.rows:,} rows are there already")
    with ray_session():
        resources = engine_resources(node_resources(), work.config.scaling)
        each = f"{resources['CPU']:g} CPU, {resources['GPU']:g} GPU"
        _say(f"starting {work.config.scaling.workers} engine(s) with {each} each")
        collected: dict[int, dict[int, Caption]] = {}
        for written in _alive(captions(work, missing, resources)):
            rows = collected.setdefault(written.shard, {})
            rows.update(written.captions)
            progress.add(written)
            limit.check(progress.tally.errors)
            if len(rows) == manifest.shard_rows[written.shard]:
                shards.write(written.shard, [rows[number] for number in sorted(rows)])
                del collected[written.shard]
                folder.remember(seconds=round(progress.seconds, 2))
    if collected:
        raise EngineDiedError(
            f"rows of {len(collected)} shards were lost on the way; run the same job again to caption them"
        )
    progress.say()
    return progress


def _alive(stream: Iterator[Written]) -> Iterator[Written]:
    """The stream; that an engine cannot be started is said in our words."""
    from ray.exceptions import ActorDiedError

    try:
        yield from stream
    except ActorDiedError as error:
        raise EngineDiedError(
            f"an engine could not be started: {str(error).strip().splitlines()[-1]}\n"
            "What is captioned is safe; run the same job again to continue"
        ) from error


# ------------------------------------------------------------------------------------------ the end


def _sum_up(
    work: Assignment,
    manifest: Manifest,
    shards: CaptionShards,
    folder: CaptionFolder,
    tracker: Tracker,
    *,
    savings_of: Any,
    running: CaptionProgress,
) -> dict[str, Any]:
    """Everything about the finished job, in MLflow and as its result."""
    tally = Tally()
    for table in shards.tables(range(manifest.shards)):
        tally.add(table)
    result = {
        "run": folder.name,
        "captions": str(folder.captions),
        "rows": tally.rows,
        "captioned": tally.rows - tally.failed,
        "errors": dict(tally.errors.most_common()),
        "tokens": dict(tally.tokens),
        "savings": savings(savings_of, work.model.skip, tally),
        "rows_per_second": round(running.rate, 3),
        "seconds": round(running.seconds, 2),
        "mean_running": round(running.engines().get("engine/mean_running", 0.0), 2),
        "model": work.model.label,
        "adapter": work.model.adapter_label,
        "mlflow_uri": tracker.uri,
        "mlflow_run_id": tracker.run_id,
    }
    try:
        record(tracker, result, running.engines(), manifest, shards, work.config)
        tracker.finish("FINISHED")
    except TrackingError as error:
        raise TrackingError(
            f"{error}\nThe captions are complete in {folder.captions}. Run the same job again to record them"
        ) from error
    folder.remember(result=result)
    _say(f"{result['captioned']:,} captions and {tally.failed:,} error rows in {folder.captions}")
    if tally.failed:
        _say("error rows: " + listed(tally.errors))
    return {**result, "already_finished": False}


def _say(line: str) -> None:
    print(line, flush=True)
