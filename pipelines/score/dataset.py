"""The questions of a dataset: rows of a table that are asked and scored."""

from __future__ import annotations

import os
import posixpath
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.data.conversations import BadRow, listed_images, parse_image
from pipelines.data.images import MAX_PIXELS
from pipelines.data.instructions import WHOLE_QUESTION
from pipelines.data.prompts import PromptTemplate, ask
from pipelines.data.records import Record
from pipelines.data.rows import ImageSource, Message
from pipelines.data.tsv_records import IMAGE_DIGEST, tsv_records
from pipelines.score.benchmarks import Benchmark, Row, find_benchmark
from pipelines.shared.paths import input_path
from skipvision.errors import ConfigError, DataError

ROOT_VARIABLE = "LMUData"
"""Environment variable: the folder in which VLMEvalKit keeps its tables; ``~/LMUData`` without it."""

_NAMED = 5
"""Unusable rows that are named, at most."""

_ROTATIONS = 1_000_000
"""VLMEvalKit numbers the rotations of question 7 as 1000007, 2000007 and so on."""


@dataclass(frozen=True)
class Question:
    """One row that is asked.

    Attributes:
        index: names it within its dataset.
        item: the index of the item it counts for: its own, or that of the question it is a rotation of.
        category: its slice; several are joined by commas.
        group: equal for questions about the same image.
        row: its columns.
        messages: what is asked, with a placeholder for each image.
        images: in the order of their placeholders.
        problem: why it cannot be asked, or no answer to it can be right.
    """

    index: str
    item: str
    category: str
    group: str
    row: Row
    messages: tuple[Message, ...] = ()
    images: tuple[ImageSource, ...] = ()
    problem: str | None = None


@dataclass(frozen=True)
class Dataset:
    """A table that was read.

    Attributes:
        name: the dataset's.
        file: the table.
        benchmark: how it is scored.
        template: what is asked, in terms of its columns.
        questions: its rows.
        left_out: how many rows of the table are none of its questions, by reason.
    """

    name: str
    file: str
    benchmark: Benchmark
    template: str
    questions: tuple[Question, ...]
    left_out: Mapping[str, int] = field(default_factory=dict)

    @property
    def unusable(self) -> list[Question]:
        """Those that cannot be asked, or that no answer can be right to."""
        return [question for question in self.questions if question.problem is not None]

    def facts(self) -> Iterator[str]:
        """What was read, for people: a line for the questions, one for each kind of row that is none."""
        yield f"{self.name}: {len(self.questions):,} questions in {self.file}"
        if self.left_out:
            yield f"{self.name}: {described(self.left_out)}"
        if bad := self.unusable:
            some = "; ".join(f"row {one.index}: {one.problem}" for one in bad[:_NAMED])
            more = "; …" if len(bad) > _NAMED else ""
            yield f"{self.name}: {len(bad)} rows are not asked and count as wrong: {some}{more}"


def described(left_out: Mapping[str, int]) -> str:
    """Rows that are no questions, for people."""
    counts = ", ".join(f"{count:,} {reason}" for reason, count in left_out.items())
    return f"{sum(left_out.values()):,} rows are left out ({counts})"


def find_file(name: str, benchmark: Benchmark, path: str | None) -> str:
    """The table at ``path``, or where VLMEvalKit keeps it; raises `ConfigError` that says where to get it."""
    get = f"Get it from {benchmark.url.format(name=name)}" if benchmark.url else "Give its path"
    if path is not None:
        try:
            return input_path(path, f"datasets: {name}: path")
        except ConfigError as error:
            raise ConfigError(f"{error}. {get}") from None
    root = Path(os.environ.get(ROOT_VARIABLE) or "~/LMUData").expanduser()
    if not (root / f"{name}.tsv").exists():
        raise ConfigError(
            f"dataset {name}: there is no {root / f'{name}.tsv'}. {get} and put it there, set "
            f"{ROOT_VARIABLE} to the folder where VLMEvalKit keeps its tables, or name the file by `path`"
        )
    return str(root / f"{name}.tsv")


def read_dataset(
    name: str,
    path: str | None = None,
    *,
    rule: str | None = None,
    instruction: str | None = None,
    limit: int | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Dataset:
    """The questions of a dataset; images are not opened. Rows without an image are left out and counted.

    Args:
        name: VLMEvalKit's, as ``MMBench_DEV_EN``; or any, if there is a rule.
        path: of the file; None = where VLMEvalKit keeps it.
        rule: gives an answer its points; None = that of the benchmark.
        instruction: asked behind each question; None = that of the rule, empty = none.
        limit: items taken from the file's beginning, with all their rotations; None = all.
        max_pixels: of an image.

    Raises:
        ConfigError: the name or the rule is unknown, or the file is not there.
        DataError: the file is no table, lacks a column, answers, or unique indices, or no row of it can be
            scored.
    """
    benchmark = find_benchmark(name, rule)
    file = find_file(name, benchmark, path)
    try:
        records = list(tsv_records(file, name, ("image",), max_pixels))
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    _check_columns(file, benchmark, records)
    template = f"{{{benchmark.rule.asks}}}" if instruction is None else f"{{{WHOLE_QUESTION}}}"
    if instruction:
        template += "\n" + instruction.replace("{", "{{").replace("}", "}}")
    reasons = [_left_out(record, benchmark) for record in records]
    asked = [record for record, reason in zip(records, reasons, strict=True) if reason is None]
    questions = [_question(record, benchmark, PromptTemplate(template), max_pixels) for record in asked]
    if limit is not None:
        kept = set(list(dict.fromkeys(question.item for question in questions))[:limit])
        questions = [question for question in questions if question.item in kept]
    _check_questions(file, benchmark, questions)
    left_out = Counter(reason for reason in reasons if reason is not None)
    return Dataset(name, file, benchmark, template, tuple(questions), dict(left_out))


def _check_columns(file: str, benchmark: Benchmark, records: Sequence[Record]) -> None:
    if not records:
        raise DataError(f"{file} has no rows")
    present = {column for record in records for column in _columns(record)}
    missing = [name for name in ("index", "question", *benchmark.rule.columns) if name not in present]
    if not {"image", "image_path"} & present:
        missing.append("image")
    if "answer" in missing:
        raise DataError(
            f"{file} has no column `answer`: answers of test sets are often not published. Take a "
            f"validation or dev set; its columns are {', '.join(sorted(present))}"
        )
    if missing:
        raise DataError(
            f"{file} has no column {', '.join(f'`{name}`' for name in missing)}; its columns are "
            f"{', '.join(sorted(present))}"
        )


def _left_out(record: Record, benchmark: Benchmark) -> str | None:
    """Why a row is none of the questions; None if it is one."""
    if record.problem:  # its columns say nothing
        return None
    row = _columns(record)
    if benchmark.split is not None and "split" in row and row["split"] != benchmark.split:
        return f"not of split {benchmark.split!r}"
    return None if row.get("image") else "without an image"


def _check_questions(file: str, benchmark: Benchmark, questions: Sequence[Question]) -> None:
    if not questions:
        where = f" in which `split` is {benchmark.split!r}" if benchmark.split else ""
        raise DataError(f"{file} has no rows with an image{where}")
    without = [
        question.index for question in questions if not question.row.get("answer") and not question.problem
    ]
    if without:
        raise DataError(
            f"{file}: {len(without)} of {len(questions)} rows have no answer, the first of them {without[0]}"
        )
    if all(question.problem for question in questions):
        raise DataError(
            f"{file}: none of {len(questions)} rows can be scored, the first of them, {questions[0].index}, "
            f"because of: {questions[0].problem}"
        )
    seen: set[str] = set()
    for question in questions:
        if question.index in seen:
            raise DataError(f"{file} has several rows with index {question.index!r}")
        seen.add(question.index)


def _question(record: Record, benchmark: Benchmark, template: PromptTemplate, max_pixels: int) -> Question:
    row = _columns(record)
    index = str(row.get("index") or record.fallback_key)
    category = next((row[column] for column in benchmark.category if row.get(column)), "")
    item = index
    if benchmark.circular:
        item = row.get("g_index") or (str(int(index) % _ROTATIONS) if index.isdigit() else index)
    group = row.get(IMAGE_DIGEST) or item
    try:
        if record.problem:
            raise BadRow("broken record", record.problem)
        folder = posixpath.dirname(record.file)
        images = tuple(
            parse_image(image, f"#{number} of row {index}", folder, max_pixels)
            for number, image in enumerate(listed_images(row), start=1)
        )
        messages = ask(row, len(images), template, None)
    except BadRow as error:
        return Question(index, item, category, group, row, problem=f"{error.kind}: {error}")
    problem = benchmark.rule.problem(row) if row.get("answer") else None
    problem = problem and f"no usable answer: {problem}"
    return Question(index, item, category, group, row, messages, images, problem)


def _columns(record: Record) -> dict[str, Any]:
    return record.value if isinstance(record.value, dict) else {}
