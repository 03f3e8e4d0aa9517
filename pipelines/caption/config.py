"""The settings of a captioning job."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from pipelines.data.images import MAX_PIXELS
from pipelines.data.prompts import PromptTemplate
from pipelines.engines.config import BackendSection, ModelSection
from pipelines.shared.paths import InputPath
from pipelines.shared.sections import Section
from pipelines.tracking.config import TrackedConfig
from skipvision.config import SkipConfig
from skipvision.engine.requests import Sampling


class InputSection(Section):
    """The inputs, which are listed once, at the first start of the job."""

    source: InputPath = Field(
        description="a folder of images (searched recursively), an image, a JSON, JSONL, parquet or Arrow "
        "file, a WebDataset tar, a TSV with base64 images, or a pattern with * of any of these; local or any "
        "fsspec URL"
    )
    prompt: str | None = Field(
        "Describe the image.",
        description="the prompt; {column} is replaced by the row's value, {{ by a brace; <image> is the "
        "position of an image, if images do not come first; null = each row's own `conversations` or "
        "`messages`, up to the user's last message",
    )
    system: str | None = Field(None, description="system message before the prompt; null = none")
    key: str | None = Field(
        None,
        description="column with the keys of rows in the result; null = `id` if it exists, else the file's "
        "path below the folder, or file and row number",
    )
    image: str | None = Field(
        None,
        description="column of images: paths, URLs, bytes, or lists of these; in a tar the extension, such "
        "as jpg; null = `image` or `images`, and in a tar any image file",
    )
    image_root: InputPath | None = Field(
        None, description="folder that relative image paths start at; null = the folder of the file of rows"
    )
    limit: int | None = Field(None, ge=1, description="max rows; null = all")
    keys: InputPath | None = Field(
        None, description="file with a key on each line: only these rows are captioned; null = all"
    )
    max_pixels: int = Field(
        MAX_PIXELS, ge=1, description="max width × height; a row with a larger image is an error row"
    )

    @field_validator("prompt")
    @classmethod
    def _well_formed(cls, value: str | None) -> str | None:
        if value is not None:
            PromptTemplate(value)
        return value


class OutputSection(Section):
    """Files of captions in <storage>/<name>/captions."""

    format: Literal["parquet", "jsonl"] = Field("parquet", description="format of the files")
    shard_rows: int = Field(
        1000,
        ge=1,
        description="rows per file; a killed job loses its unfinished files, one or two per reader",
    )


class ScalingSection(Section):
    """Engines and readers on Ray. A resumed job may change these settings."""

    workers: int = Field(1, ge=1, description="engines, each with the whole model")
    cpus_per_worker: float | None = Field(
        None,
        gt=0,
        description="CPUs of each engine; null = 1 with a GPU, else a share of those that readers leave",
    )
    gpus_per_worker: float | None = Field(
        None, ge=0, description="GPUs of each engine; null = one if the cluster has any, else none"
    )
    autoscaling: bool = Field(
        False,
        description="the cluster grows on demand: request engines that it cannot hold yet; each gets one CPU "
        "and no GPU unless the settings above say otherwise",
    )
    readers: int = Field(
        1, ge=1, description="processes that open and prepare images; add some if engines wait for them"
    )
    cpus_per_reader: float = Field(0.5, gt=0, description="CPUs of each reader")
    threads_per_reader: int = Field(4, ge=1, description="images that a reader opens at once")
    max_failures: int = Field(
        3, ge=1, description="engine crashes on one row before that row becomes an error row"
    )


class CaptionConfig(TrackedConfig):
    """A captioning job. An existing job of the same name is resumed; other settings are refused."""

    model: ModelSection
    input: InputSection
    skip: SkipConfig | Literal["full"] | None = Field(
        None,
        description="how visual tokens are skipped; null = as the adapter was trained or the model exported, "
        "and otherwise no skipping; full = no skipping",
    )
    sampling: Sampling = Field(Sampling(), description="how captions are generated")
    engine: BackendSection = BackendSection()
    output: OutputSection = OutputSection()
    max_error_fraction: float = Field(
        1.0,
        ge=0,
        le=1,
        description="the job fails as soon as a larger share of all rows are error rows",
    )
    samples: int = Field(24, ge=0, description="rows shown with their images in MLflow")
    scaling: ScalingSection = ScalingSection()

    @model_validator(mode="after")
    def _one_text_a_row(self) -> Self:
        if self.sampling.n != 1 or self.sampling.logprobs not in (None, 0):
            raise ValueError(
                "sampling.n must be 1 and sampling.logprobs null or 0: the result has one text per row, and "
                "with 0 its log_probability"
            )
        return self
