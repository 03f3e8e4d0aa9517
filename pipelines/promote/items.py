"""The scored items of a promotion, and the check that they belong to the right models."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import skipvision as sv
from pipelines.engines.model import adapter_digest
from pipelines.evaluation.items import Item, read_items, read_systems
from pipelines.promote.config import ItemsSection
from pipelines.tracking.registry import ModelVersion, Registry
from skipvision.errors import ConfigError

ITEMS = "items.parquet"
"""The artifact that the scoring job stores in its MLflow run."""

_MAY_DIFFER = {"model", "adapter", "skip"}
"""Fields of a system's description that may differ between the two sides."""

_REQUIRED = ("weights", "sampling", "judge")
"""Required fields, which must be equal on both sides, as must the fingerprint of each dataset."""


class WrongItemsError(ConfigError):
    """Items were scored with another model, or on other questions, than the promotion needs."""


class NeededSystem(Protocol):
    """Decides which system in a file of items is the candidate or the reference."""

    def __str__(self) -> str: ...

    def matches(self, system: Mapping[str, str | None]) -> bool:
        """Return whether the description of a system in a file of items matches this system."""


class FullTokens:
    """Any model with full tokens."""

    def __str__(self) -> str:
        return "a model with full tokens"

    def matches(self, system: Mapping[str, str | None]) -> bool:
        return _skip(system).is_full


class RegisteredSystem:
    """A model version under its own SkipConfig. Its name or the digest of its files identifies it."""

    def __init__(self, version: ModelVersion, registry: Registry, folder: Path) -> None:
        registry.fetch(version, folder)
        self._version = version
        self._digest = adapter_digest(folder)
        self._skip = sv.read_adapter(folder)["skip"] or sv.SkipConfig.full()

    def __str__(self) -> str:
        return f"{self._version} (files {self._digest}) with its own SkipConfig"

    def matches(self, system: Mapping[str, str | None]) -> bool:
        adapter = system.get("adapter") or ""
        named = adapter == str(self._version) or adapter.endswith(f"@{self._digest}")
        return named and _skip(system) == self._skip


def _skip(system: Mapping[str, str | None]) -> sv.SkipConfig:
    text = system.get("skip")
    return sv.SkipConfig.full() if text is None else sv.SkipConfig.model_validate_json(text)


def items_file(section: ItemsSection, registry: Registry, folder: Path) -> Path:
    """Return the file of items in the settings; one in MLflow is downloaded into ``folder``."""
    if section.items.startswith("runs:/"):
        folder.mkdir()
        return registry.artifact(section.items.removeprefix("runs:/"), ITEMS, folder)
    return Path(section.items)


def items_of(needed: NeededSystem, file: Path, section: ItemsSection) -> tuple[list[Item], dict[str, Any]]:
    """Return the items of the needed system, and their description for the evidence.

    Raises:
        ConfigError: several systems match, or no system has the label of the settings.
        WrongItemsError: no system matches.
    """
    systems = read_systems(file)
    if section.system is not None and section.system not in systems:
        raise ConfigError(
            f"{section.items} has no system {section.system!r}; its systems: {', '.join(systems) or 'none'}"
        )
    selected = systems if section.system is None else {section.system: systems[section.system]}
    matching = [label for label, system in selected.items() if needed.matches(system)]
    if not matching:
        raise WrongItemsError(
            f"{section.items}: the promotion needs items of {needed}, not of {json.dumps(selected)}: "
            "score that model"
        )
    if len(matching) > 1:
        raise ConfigError(
            f"{section.items}: several systems match {needed}: {', '.join(matching)}; choose one by `system`"
        )
    (label,) = matching
    description = {
        "source": section.items,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "system": label,
        "made_with": systems[label],
    }
    return [item for item in read_items(file) if item.system == label], description


def check_comparable(candidate: Mapping[str, str | None], reference: Mapping[str, str | None]) -> None:
    """Check that two systems were scored on the same questions, in the same way, with the same base model.

    Args:
        candidate: its description in its file of items.
        reference: its description.

    Raises:
        WrongItemsError: they differ, or a description is incomplete.
    """
    if missing := [name for name in _REQUIRED if not (name in candidate and name in reference)]:
        raise WrongItemsError(
            f"the descriptions of the items lack {', '.join(missing)}: score both systems again, in a new job"
        )
    for name in sorted({*candidate, *reference} - _MAY_DIFFER):
        if candidate.get(name) != reference.get(name):
            ours, theirs = (
                f"{name} {system[name]}" if system.get(name) else f"no {name}"
                for system in (candidate, reference)
            )
            or_full = ", or compare with its own full tokens, --reference.against full"
            raise WrongItemsError(
                f"the candidate was scored with {ours}, the reference with {theirs}: score both on "
                f"the same{or_full if name == 'weights' else ''}"
            )
