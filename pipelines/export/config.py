"""The settings of an export."""

from __future__ import annotations

from pydantic import Field

from pipelines.shared.paths import ArtifactPath, ModelPath
from pipelines.shared.sections import Section
from pipelines.tracking.config import TrackedConfig, TrackingConfig
from pipelines.tracking.names import AliasName, ModelName
from skipvision.config import SkipConfig
from skipvision.exporting.write import Dtype


class ExportModelSection(Section):
    """The model to export: a base model with an optional adapter."""

    path: ModelPath = Field(description="folder of the base model and its processor, or a Hugging Face id")
    adapter: ArtifactPath | None = Field(
        None,
        description="trained adapter: a folder, or models:/NAME@ALIAS or models:/NAME/VERSION in MLflow; "
        "null = the base model with the SkipConfig in `skip`",
    )
    dtype: Dtype = Field("auto", description="dtype of the exported weights; auto = as the base model's")


class ExportTrackingConfig(TrackingConfig):
    """Where an export is recorded, and under which name the exported model is registered."""

    registered_model: ModelName | None = Field(
        None,
        description="name of the registered model that the whole folder becomes a version of; null = none",
    )
    alias: AliasName = Field("exported", description="alias that moves to the new version")


class HubSection(Section):
    """A repository on the Hugging Face hub. The token is that of ``hf auth login`` or of HF_TOKEN."""

    repository: str = Field(
        pattern=r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$",
        description="owner/name; the repository is created if it does not exist",
    )
    private: bool = Field(True, description="whether a new repository is private")
    overwrite: bool = Field(
        False, description="commit to a repository that holds a model already; its history keeps the old one"
    )


class ExportConfig(TrackedConfig):
    """An export. The model is in ``<storage>/<name>/model``; other settings need another name."""

    model: ExportModelSection
    skip: SkipConfig | None = Field(
        None, description="SkipConfig to export; null = the one that the adapter was trained with"
    )
    tracking: ExportTrackingConfig = ExportTrackingConfig()
    hub: HubSection | None = Field(None, description="repository to push the model to; null = none")
