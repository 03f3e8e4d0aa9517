"""Answers of the full-token base model to rows without an answer, generated once, before the training.

The stages of the captioning job generate them. They are kept in a folder of the run::

    answers/manifest/             the rows
            attempts/             blocks of rows that engines work on
            texts/000000.parquet …    their answers, one file per complete shard
            digest                of the model, the rows and the settings: others begin anew
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast, get_args

from pipelines.caption.attempts import Attempts
from pipelines.caption.config import CaptionConfig
from pipelines.caption.folder import CaptionShards
from pipelines.caption.job import EngineDiedError, alive
from pipelines.caption.manifest import Manifest, write_rows
from pipelines.caption.resources import engine_resources
from pipelines.caption.rows import Caption, CaptionRow
from pipelines.caption.stages import Assignment, captions
from pipelines.cluster.resources import node_resources
from pipelines.data.rows import IMAGE_PLACEHOLDER, Message, Reject, RejectKind, TrainingRow
from pipelines.engines.model import EngineModel
from pipelines.evaluation.fingerprints import of_model, of_rows
from pipelines.finetune.config import FinetuneConfig
from pipelines.shared.console import say
from pipelines.shared.files import write_text
from skipvision.config import SkipConfig
from skipvision.errors import DataError

_SHARD_ROWS = 200
"""Rows whose answers a killed job may lose."""
_PROGRESS_SECONDS = 5.0


class Answered(NamedTuple):
    """Rows with their answers, and rows that could not be answered."""

    rows: list[TrainingRow]
    rejects: list[Reject]


def answer_rows(config: FinetuneConfig, folder: Path, rows: Sequence[TrainingRow]) -> Answered:
    """Answer the rows that have no answer in the folder yet, and return all. Ray must run.

    Args:
        config: the settings, with absolute paths.
        folder: of the answers.
        rows: rows without an answer.

    Raises:
        ResourceError: the cluster is too small for the engines.
        EngineDiedError: engines died; answers so far are kept.
    """
    work = _assignment(config, folder)
    digest = _digest(work, rows)
    file = folder / "digest"
    if not file.exists() or file.read_text() != digest:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        questions = (CaptionRow(row.key, row.source, row.messages, row.images) for row in rows)
        write_rows(work.manifest, questions, _SHARD_ROWS)
        write_text(file, digest)
    shards, manifest = _shards(folder), Manifest(work.manifest)
    shards.clean()
    work.attempts.clear()
    if missing := shards.missing(manifest.shards):
        _generate(work, manifest, shards, missing)
    return read_answers(config, folder, rows)


def read_answers(config: FinetuneConfig, folder: Path, rows: Sequence[TrainingRow]) -> Answered:
    """Return rows with the answers that the folder has.

    Raises:
        DataError: it has no answer to one of the rows.
    """
    answered = Answered([], [])
    if not rows:
        return answered
    shards = _shards(folder)
    lines: dict[str, Mapping[str, Any]] = {}
    for file in sorted(shards.folder.glob("*.parquet")):
        lines |= {line["key"]: line for line in shards.read(int(file.stem)).to_pylist()}
    for row in rows:
        if row.key not in lines:
            raise DataError(
                f"{folder} has no answer to row {row.key}: restore the folder, or choose another name"
            )
        outcome = _with_answer(row, lines[row.key], config.answering.max_new_tokens)
        if isinstance(outcome, Reject):
            answered.rejects.append(outcome)
        else:
            answered.rows.append(outcome)
    return answered


def _assignment(config: FinetuneConfig, folder: Path) -> Assignment:
    """Return the work of readers and engines: greedy or seeded answers of the base model alone."""
    answering, scaling = config.answering, config.scaling
    base = config.model.model_copy(update={"dtype": config.training.precision})
    settings = CaptionConfig.model_validate(
        {
            "name": config.name,
            "model": base.model_dump(),
            "input": {"source": config.data.train},
            "skip": "full",
            "sampling": {
                "max_new_tokens": answering.max_new_tokens,
                "temperature": answering.temperature,
                "seed": config.seed,
            },
            "engine": answering.engine.model_dump(),
            "scaling": {
                "workers": scaling.workers,
                # Engines share the CPUs with readers, which trainings do not have.
                "cpus_per_worker": scaling.cpus_per_worker if scaling.autoscaling else None,
                "gpus_per_worker": scaling.gpus_per_worker,
                "autoscaling": scaling.autoscaling,
            },
        }
    )
    model = EngineModel.of(base, None, SkipConfig.full())
    return Assignment(settings, model, folder / "manifest", Attempts(folder / "attempts"))


def _digest(work: Assignment, rows: Sequence[TrainingRow]) -> str:
    sampling = work.config.sampling.model_dump(mode="json")
    content = [of_model(work.model.base), work.model.dtype, work.model.attention, sampling, of_rows(rows)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _shards(folder: Path) -> CaptionShards:
    return CaptionShards(folder / "texts", "parquet")


def _generate(work: Assignment, manifest: Manifest, shards: CaptionShards, missing: Sequence[int]) -> None:
    """Answer every row of the missing shards."""
    resources = engine_resources(node_resources(), work.config.scaling)
    total = sum(manifest.rows_in(shard) for shard in missing)
    say(f"the full-token model answers {total} rows without an answer, once, in {shards.folder.parent}")
    unfinished: dict[int, dict[int, Caption]] = {}
    done, shown = 0, time.monotonic()
    for block in alive(captions(work, missing, resources)):
        texts = unfinished.setdefault(block.shard, {})
        texts.update(block.captions)
        done += len(block.captions)
        if len(texts) == manifest.rows_in(block.shard):
            shards.write(block.shard, [texts[number] for number in sorted(texts)])
            del unfinished[block.shard]
        if time.monotonic() - shown > _PROGRESS_SECONDS or done == total:
            shown = time.monotonic()
            say(f"{done} of {total} rows answered")
    if unfinished:
        raise EngineDiedError(
            f"answers to some rows of {len(unfinished)} shards did not arrive; run the same job again"
        )


def _with_answer(row: TrainingRow, line: Mapping[str, Any], max_new_tokens: int) -> TrainingRow | Reject:
    """Return the row with its answer; or a reject, if no answer can be learnt."""

    def reject(kind: RejectKind, reason: str) -> Reject:
        return Reject(row.source, row.key, kind, reason)

    kind, text = line["error_kind"], line["text"] or ""
    if kind in get_args(RejectKind):
        return reject(cast(RejectKind, kind), line["error"])
    if kind is not None:
        return reject("conversation", f"the full-token model could not answer: {line['error']}")
    if line["finish_reason"] == "length":
        limit = f"answering.max_new_tokens = {max_new_tokens}"
        return reject("too long", f"the full-token model's answer is longer than {limit}")
    if not text:
        return reject("conversation", "the full-token model's answer is empty")
    if IMAGE_PLACEHOLDER in text:
        return reject("placeholders", f"the full-token model's answer contains {IMAGE_PLACEHOLDER}")
    return replace(row, messages=(*row.messages, Message("assistant", text)))
