"""Captioning a data set with engines under Ray Data, tracked in MLflow.

`run_caption` is the whole job: claim its folder, find the model, list the inputs, caption the shards that are
missing, sum up. A job that was stopped or killed at any point is resumed by running the same configuration
again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

from transformers import PretrainedConfig

from pipelines.caption.config import CaptionConfig
from pipelines.caption.folder import CaptionFolder, CaptionShards
from pipelines.caption.manifest import Manifest, ManifestFacts, write_manifest
from pipelines.caption.progress import CaptionProgress
from pipelines.caption.report import record, savings
from pipelines.caption.resources import engine_resources
from pipelines.caption.rows import Caption, caption_table
from pipelines.caption.stages import Assignment, CaptionedBlock, captions
from pipelines.cluster.resources import node_resources
from pipelines.cluster.session import check_ray_address, ray_session
from pipelines.data.error_limit import ErrorLimit, listed
from pipelines.engines.backend import check_backend
from pipelines.engines.model import EngineModel, check_model, find_model
from pipelines.engines.vllm.pruning import mapped
from pipelines.engines.vllm.settings import remove_exported, vllm_model
from pipelines.shared.console import say
from pipelines.tracking.run import Tracker
from pipelines.tracking.tracked import finished_result, tracked_run
from skipvision.errors import SkipVisionError


class EngineDiedError(SkipVisionError):
    """An engine died before it generated anything."""


def run_caption(config: CaptionConfig) -> dict[str, Any]:
    """Caption, resume or report the job ``config.name`` and return its result.

    The result holds ``captions`` (folder), ``rows``, ``captioned``, ``errors`` by kind, ``tokens`` by column,
    ``savings`` (predicted and counted), ``rows_per_second`` (of the start that finished, once engines ran),
    ``seconds`` (of all starts), ``mean_running`` (captions that an engine generated at once), ``model``,
    ``adapter``, ``mlflow_uri``, ``mlflow_run_id`` and ``already_finished``.

    Raises:
        ConfigError: settings that contradict each other, the model, the inputs or an earlier start.
        DataError: inputs that cannot be read at all, or more error rows than allowed.
        ResourceError: the cluster is too small.
        TrackingError: MLflow does not answer.
    """
    folder = CaptionFolder(config.storage_path, config.name)
    with folder.claimed():
        resumed = folder.resume(config)
        if result := finished_result(config, folder, folder.captions):
            return {**result, "already_finished": True}
        absolute = config.resolved()
        check_ray_address()
        model = find_model(
            config,
            config.tracking.absolute_uri(folder.storage),
            folder.adapter,
            folder.state.get("adapter"),
        )
        model = mapped(model, config.engine)
        model_config = check_model(model)
        engine_model = _engine_model(config, model, folder, resumed=resumed)
        if not resumed or "listed" not in folder.state:
            _list_inputs(absolute, config, folder)
        folder.remember(adapter=model.adapter_label)
        work = Assignment(absolute, engine_model, folder.manifest, folder.attempts)
        manifest = Manifest(folder.manifest)
        shards = CaptionShards(folder.captions, config.output.format)
        description = _description(absolute, model, manifest)
        # Ray is left after the MLflow run has ended, because stopping it takes seconds.
        with ExitStack() as ray, tracked_run(config, folder, *description) as run:
            progress = _caption_missing(work, manifest, shards, folder, run, ray)
            run.advice = (
                f"The captions are complete in {folder.captions}. Run the same job again to record them"
            )
            summary = _sum_up(work, model_config, folder, progress)
            record(run, summary, progress.engines(), manifest, shards, absolute)
        remove_exported(folder.exported)
        result = {**summary, "mlflow_uri": run.uri, "mlflow_run_id": run.run_id}
        folder.remember(result=result)
        return {**result, "already_finished": False}


# ------------------------------------------------------------------------------------ before captioning


def _engine_model(
    config: CaptionConfig, model: EngineModel, folder: CaptionFolder, *, resumed: bool
) -> EngineModel:
    """Check that the engine of the settings can do the job, and return the model that it loads."""
    check_backend(model, config.engine)
    if config.engine.backend == "native":
        return model
    if not resumed:
        remove_exported(folder.exported)
    return vllm_model(model, folder.exported)


def _list_inputs(absolute: CaptionConfig, config: CaptionConfig, folder: CaptionFolder) -> None:
    """Write the manifest. A resumed job uses this manifest, whatever the inputs are by then."""
    say(f"job {config.name!r}: listing {absolute.input.source}")
    facts = write_manifest(absolute.input, folder.manifest, config.output.shard_rows, say)
    for line in _described(facts):
        say(line)
    folder.forget()
    folder.remember_settings(
        config, listed={"rows": facts.rows, "problems": facts.problems, "passed_over": facts.passed_over}
    )


def _described(facts: ManifestFacts) -> Iterator[str]:
    yield f"{facts.rows:,} rows"
    if facts.problems:
        yield "error rows found while listing: " + listed(facts.problems)
    if facts.passed_over:
        passed = {suffix or "no suffix": count for suffix, count in facts.passed_over.items()}
        yield "files skipped because their names are not those of images: " + listed(passed)


def _description(
    config: CaptionConfig, model: EngineModel, manifest: Manifest
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings and the parameters of a new MLflow run."""
    settings = {**config.model_dump(mode="json"), "skip": model.skip.model_dump(mode="json")}
    facts = {"rows": manifest.rows, "shards": manifest.shards, "adapter_version": model.adapter_label}
    return settings, {**settings, "job": facts}


# ------------------------------------------------------------------------------------------ captioning


def _caption_missing(
    work: Assignment,
    manifest: Manifest,
    shards: CaptionShards,
    folder: CaptionFolder,
    run: Tracker,
    ray: ExitStack,
) -> CaptionProgress:
    """Caption every shard that has no file yet."""
    shards.clean()
    folder.attempts.clear()
    missing = shards.missing(manifest.shards)
    done = shards.tally(manifest.shards)
    limit = ErrorLimit(work.config.max_error_fraction, manifest.rows)
    # Checked separately: rows with errors in the listing may be in finished shards, and must not count twice.
    limit.check(done.errors)
    limit.check(Counter(folder.state["listed"]["problems"]))
    progress = CaptionProgress(folder.name, manifest.rows, done, run, folder.state.get("seconds", 0.0))
    if not missing:
        return progress
    folder.remember(summary=None)
    if done.rows:
        say(f"{done.rows:,} of {manifest.rows:,} rows are captioned already")
    ray.enter_context(ray_session())
    resources = engine_resources(node_resources(), work.config.scaling)
    each = f"{resources['CPU']:g} CPU, {resources['GPU']:g} GPU"
    say(f"starting {work.config.scaling.workers} engine(s) with {each} each")
    progress.start()
    unfinished: dict[int, dict[int, Caption]] = {}
    for block in alive(captions(work, missing, resources)):
        rows = unfinished.setdefault(block.shard, {})
        rows.update(block.captions)
        progress.add(block)
        limit.check(progress.tally.errors)
        if len(rows) == manifest.rows_in(block.shard):
            in_order = [rows[number] for number in sorted(rows)]
            shards.write(block.shard, in_order)
            progress.written.add(caption_table(in_order))
            del unfinished[block.shard]
            folder.remember(seconds=round(progress.seconds, 2))
    if unfinished:
        raise EngineDiedError(
            f"some rows of {len(unfinished)} shards did not arrive; run the same job again to caption them"
        )
    progress.report()
    return progress


def alive(stream: Iterator[CaptionedBlock]) -> Iterator[CaptionedBlock]:
    """Yield from ``stream``; raise `EngineDiedError` if an engine cannot be started."""
    from ray.exceptions import ActorDiedError

    try:
        yield from stream
    except ActorDiedError as error:
        raise EngineDiedError(
            f"an engine could not be started: {str(error).strip().splitlines()[-1]}\n"
            "The captions so far are safe; run the same job again to continue"
        ) from error


# ----------------------------------------------------------------------------------------- afterwards


def _sum_up(
    work: Assignment,
    model_config: PretrainedConfig,
    folder: CaptionFolder,
    progress: CaptionProgress,
) -> dict[str, Any]:
    """Return the numbers of the finished job. They are kept, because a later start cannot measure rates."""
    summary: dict[str, Any] | None = folder.state.get("summary")
    if summary is not None:
        return summary
    tally = progress.written
    summary = {
        "run": folder.name,
        "captions": str(folder.captions),
        "rows": tally.rows,
        "captioned": tally.rows - tally.failed,
        "errors": dict(tally.errors.most_common()),
        "tokens": dict(tally.tokens),
        "savings": savings(model_config, work.model.skip, tally),
        "rows_per_second": round(progress.rate, 3),
        "seconds": round(progress.seconds, 2),
        "mean_running": round(progress.engines().get("engine/mean_running", 0.0), 2),
        "model": work.model.label,
        "adapter": work.model.adapter_label,
    }
    folder.remember(summary=summary)
    say(f"{summary['captioned']:,} captions and {tally.failed:,} error rows in {folder.captions}")
    if tally.failed:
        say("error rows: " + listed(tally.errors))
    return summary
