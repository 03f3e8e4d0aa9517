"""Everything a captioning job can be told."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from pipelines.data.images import MAX_PIXELS
from pipelines.data.prompts import PromptTemplate
from pipelines.engines.config import ModelSection
from pipelines.shared.paths import InputPath
from pipelines.shared.sections import EngineSection, Section
from pipelines.tracking.config import TrackedConfig
from skipvision.config import SkipConfig
from skipvision.engine.requests import Sampling


class InputSection(Section):
    """What is captioned. The inputs are listed once, at the job's first start."""

    source: InputPath = Field(
        description="a folder of images (searched recursively), an image, a JSON, JSONL or parquet file, a "
        "WebDataset tar, a TSV with base64 images, or a pattern with * of any of these; local or any fsspec "
        "URL"
    )
    prompt: str | None = Field(
        "Describe the image.",
        description="what is asked; {column} stands for a row's value, {{ for a brace, <image> for an image "
        "where images are not to come first; null = each row's own `conversations` or `messages`, up to the "
        "last user's",
    )
    system: str | None = Field(None, description="system message before the prompt; null = none")
    key: str | None = Field(
        None,
        description="column that names rows in the result; null = `id`, if there is one, else a file's path "
        "below the folder, or file and number of the row",
    )
    image: str | None = Field(
        None,
        description="column of images: paths, URLs, bytes, or lists of these; in a tar the extension, as in "
        "jpg; null = `image` or `images`, in a tar any image file",
    )
    image_root: InputPath | None = Field(
        None, description="folder that relative image paths start at; null = that of the rows' file"
    )
    limit: int | None = Field(None, ge=1, description="rows taken, at most; null = all")
    keys: InputPath | None = Field(
        None, description="file with a key on each line: only these rows are taken; null = all"
    )
    max_pixels: int = Field(
        MAX_PIXELS, ge=1, description="width × height above which an image is not decoded but an error row"
    )

    @field_validator("prompt")
    @classmethod
    def _well_formed(cls, value: str | None) -> str | None:
        if value is not None:
            PromptTemplate(value)
        return value


class OutputSection(Section):
    """Files of captions, in <storage>/<name>/captions."""

    format: Literal["parquet", "jsonl"] = Field("parquet", description="format of the files")
    shard_rows: int = Field(
        1000,
        ge=1,
        description="rows of a file; what a killed job loses are the rows of unfinished files, one or two a "
        "reader",
    )


class ScalingSection(Section):
    """Ray's share; these settings may differ when a job is resumed."""

    workers: int = Field(1, ge=1, description="engines, each with the whole model")
    cpus_per_worker: float | None = Field(
        None, gt=0, description="CPUs of each; null = 1 beside a GPU, else all that readers leave, shared out"
    )
    gpus_per_worker: float | None = Field(
        None, ge=0, description="GPUs of each; null = one if the cluster has any, else none"
    )
    readers: int = Field(
        1, ge=1, description="processes that open and prepare images; more where engines wait for them"
    )
    cpus_per_reader: float = Field(0.5, gt=0, description="CPUs of each reader")
    threads_per_reader: int = Field(4, ge=1, description="images a reader opens at once")
    max_failures: int = Field(
        3, ge=1, description="times that an engine dies over a row alone until it becomes an error row"
    )


class CaptionConfig(TrackedConfig):
    """A captioning job; one that is there already under its name is continued, or refused if it differs."""

    model: ModelSection
    input: InputSection
    skip: SkipConfig | Literal["full"] | None = Field(
        None,
        description="how visual tokens are skipped; null = as the adapter was trained; full, or null without "
        "an adapter = not at all",
    )
    sampling: Sampling = Field(Sampling(), description="how captions are written")
    engine: EngineSection = EngineSection()
    output: OutputSection = OutputSection()
    max_error_fraction: float = Field(
        1.0,
        ge=0,
        le=1,
        description="the job stops with an error as soon as more than this share of all rows are error rows",
    )
    samples: int = Field(24, ge=0, description="rows shown with their pictures in MLflow")
    scaling: ScalingSection = ScalingSection()

    @model_validator(mode="after")
    def _one_text_a_row(self) -> Self:
        if self.sampling.n != 1 or self.sampling.logprobs is not None:
            raise ValueError("sampling.n and sampling.logprobs have no place in a result of one text a row")
        return self
