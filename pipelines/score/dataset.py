"""Read the table of a dataset: its questions, and the rows that cannot be scored."""

from __future__ import annotations

import os
import posixpath
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.data.conversations import listed_images, parse_image
from pipelines.data.formats import check_format
from pipelines.data.images import MAX_PIXELS
from pipelines.data.instructions import WHOLE_QUESTION
from pipelines.data.prompts import PromptTemplate, prompt_messages
from pipelines.data.records import Record
from pipelines.data.rows import BadRow, ImageSource, Message
from pipelines.data.tsv_records import IMAGE_DIGEST, tsv_records
from pipelines.score.benchmarks import Benchmark, find_benchmark
from pipelines.score.rules.registry import Row
from pipelines.shared.paths import input_path
from skipvision.errors import ConfigError, DataError

ROOT_VARIABLE = "LMUData"
"""The environment variable with the folder of VLMEvalKit's tables; the default is ``~/LMUData``."""

_MAX_NAMED = 5
"""Max number of unusable rows that are listed."""

_ROTATIONS = 1_000_000
"""VLMEvalKit numbers the rotations of question 7 as 1000007, 2000007 and so on."""


@dataclass(frozen=True)
class Question:
    """One row of a table.

    Attributes:
        index: identifies the question within its dataset.
        item: the index of the item that the question counts for: its own, or that of the question of which it
            is a rotation.
        category: its slices, separated by commas.
        group: the same for questions about one image.
        row: its columns.
        messages: the prompt, with a placeholder for each image.
        images: the images, in the order of their placeholders.
        problem: why the question is unusable: it has no valid prompt, or no answer to it can be right.
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
    """The questions of a table.

    Attributes:
        name: the name of the dataset.
        file: the path of the table.
        benchmark: its rule and totals.
        template: the prompt, in terms of the columns.
        questions: the rows that count.
        left_out: the number of rows that do not count, by reason.
    """

    name: str
    file: str
    benchmark: Benchmark
    template: str
    questions: tuple[Question, ...]
    left_out: Mapping[str, int] = field(default_factory=dict)

    @property
    def unusable(self) -> list[Question]:
        """The questions with a problem. They get no prompt and count as wrong."""
        return [question for question in self.questions if question.problem is not None]

    def facts(self) -> Iterator[str]:
        """Describe the table in log lines: its questions, the rows left out, and the unusable rows."""
        yield f"{self.name}: {len(self.questions):,} questions in {self.file}"
        if self.left_out:
            yield f"{self.name}: {describe_left_out(self.left_out)}"
        if bad := self.unusable:
            some = "; ".join(f"row {one.index}: {one.problem}" for one in bad[:_MAX_NAMED])
            more = "; …" if len(bad) > _MAX_NAMED else ""
            yield f"{self.name}: {len(bad)} rows are unusable and count as wrong: {some}{more}"


def describe_left_out(left_out: Mapping[str, int]) -> str:
    """Format the number of rows left out, by reason."""
    counts = ", ".join(f"{count:,} {reason}" for reason, count in left_out.items())
    return f"{sum(left_out.values()):,} rows are left out ({counts})"


def find_file(name: str, benchmark: Benchmark, path: str | None) -> str:
    """Return the table at ``path``, or in VLMEvalKit's folder.

    Raises:
        ConfigError: the table does not exist. The message has the address to get it from.
    """
    get = f"Get it from {benchmark.url.format(name=name)}" if benchmark.url else "Set its `path`"
    if path is not None:
        try:
            return input_path(path, f"datasets: {name}: path")
        except ConfigError as error:
            raise ConfigError(f"{error}. {get}") from None
    root = Path(os.environ.get(ROOT_VARIABLE) or "~/LMUData").expanduser()
    if not (root / f"{name}.tsv").exists():
        raise ConfigError(
            f"dataset {name}: {root / f'{name}.tsv'} does not exist. {get} and put it there, set "
            f"{ROOT_VARIABLE} to the folder where VLMEvalKit keeps its tables, or set `path`"
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
    """Read the questions of a dataset without opening images. Rows without an image are left out.

    Args:
        name: VLMEvalKit's name, such as ``MMBench_DEV_EN``; with a rule, any name.
        path: of the file; None = in VLMEvalKit's folder.
        rule: the name of the rule that gives points; None = the benchmark's.
        instruction: follows each question in its prompt; None = the rule's, empty = none.
        limit: the number of items to read from the beginning, with all their rotations; None = all.
        max_pixels: the largest image that is accepted.

    Raises:
        ConfigError: the name or the rule is unknown, or the file does not exist.
        DataError: the file is not a table, lacks a column, answers, or unique indices, or has no row that can
            be scored.
    """
    benchmark = find_benchmark(name, rule)
    file = find_file(name, benchmark, path)
    check_format(file, ("tsv",))
    try:
        records = list(tsv_records(file, name, ("image",), max_pixels))
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    _check_columns(file, benchmark, records)
    template = f"{{{benchmark.rule.prompt_column}}}" if instruction is None else f"{{{WHOLE_QUESTION}}}"
    if instruction:
        template += "\n" + instruction.replace("{", "{{").replace("}", "}}")
    reasons = [_reason_to_leave_out(record, benchmark) for record in records]
    counted = [record for record, reason in zip(records, reasons, strict=True) if reason is None]
    questions = [_question(record, benchmark, PromptTemplate(template), max_pixels) for record in counted]
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
            f"{file} has no column `answer`: answers of test sets are often not published. Use a "
            f"validation or dev set. The columns of this table are {', '.join(sorted(present))}"
        )
    if missing:
        raise DataError(
            f"{file} has no column {', '.join(f'`{name}`' for name in missing)}; its columns are "
            f"{', '.join(sorted(present))}"
        )


def _reason_to_leave_out(record: Record, benchmark: Benchmark) -> str | None:
    if record.problem:  # the row counts as wrong; its columns cannot be trusted
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
            f"{file}: {len(without)} of {len(questions)} rows have no answer, for example row {without[0]}"
        )
    if all(question.problem for question in questions):
        raise DataError(
            f"{file}: none of {len(questions)} rows can be scored; row {questions[0].index}: "
            f"{questions[0].problem}"
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
        messages = prompt_messages(row, len(images), template, None)
    except BadRow as error:
        return Question(index, item, category, group, row, problem=f"{error.kind}: {error}")
    problem = benchmark.rule.problem(row) if row.get("answer") else None
    problem = problem and f"no usable answer: {problem}"
    return Question(index, item, category, group, row, messages, images, problem)


def _columns(record: Record) -> dict[str, Any]:
    return record.value if isinstance(record.value, dict) else {}
