"""Scored items for a promotion, and whether they speak of the model that they are to speak of."""

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
"""Name of the artifact that scoring leaves in its MLflow run."""

_OWN = {"model", "adapter", "skip"}
"""What a file of items says of a system, and the two sides may differ in."""
_ALWAYS = ("weights", "sampling", "judge")
"""What it always says beside, and for each dataset its fingerprint."""


class WrongItemsError(ConfigError):
    """Scored items of another model, or to other questions, than those they are to speak for."""


class NeededSystem(Protocol):
    """What the items of one side must have been made with."""

    def __str__(self) -> str: ...

    def made(self, system: Mapping[str, str | None]) -> bool:
        """Whether this is what a file of items says of one of its systems."""


class FullTokens:
    """Any model that skips nothing."""

    def __str__(self) -> str:
        return "a model with full tokens"

    def made(self, system: Mapping[str, str | None]) -> bool:
        return _skip(system) == sv.SkipConfig.full()


class RegisteredSystem:
    """A model version, under the SkipConfig that travels with it; known by its name or by its files."""

    def __init__(self, version: ModelVersion, registry: Registry, folder: Path) -> None:
        registry.fetch(version, folder)
        self._version = version
        self._digest = adapter_digest(folder)
        self._skip = sv.read_adapter(folder)["skip"] or sv.SkipConfig.full()

    def __str__(self) -> str:
        return f"{self._version} (files {self._digest}) with its own SkipConfig"

    def made(self, system: Mapping[str, str | None]) -> bool:
        adapter = system.get("adapter") or ""
        named = adapter == str(self._version) or adapter.endswith(f"@{self._digest}")
        return named and _skip(system) == self._skip


def _skip(system: Mapping[str, str | None]) -> sv.SkipConfig:
    text = system.get("skip")
    return sv.SkipConfig.full() if text is None else sv.SkipConfig.model_validate_json(text)


def items_file(section: ItemsSection, registry: Registry, folder: Path) -> Path:
    """The file that the settings name; out of MLflow it is fetched into ``folder``."""
    if section.items.startswith("runs:/"):
        folder.mkdir()
        return registry.artifact(section.items.removeprefix("runs:/"), ITEMS, folder)
    return Path(section.items)


def items_of(needed: NeededSystem, file: Path, section: ItemsSection) -> tuple[list[Item], dict[str, Any]]:
    """The items that the needed system made, and what the evidence says of them.

    Raises:
        ConfigError: several systems are what is needed, or none has the label asked for.
        WrongItemsError: the items were made with something else.
    """
    systems = read_systems(file)
    if section.system is not None and section.system not in systems:
        raise ConfigError(
            f"{section.items} holds no system {section.system!r}; there are: {', '.join(systems) or 'none'}"
        )
    asked = systems if section.system is None else {section.system: systems[section.system]}
    fitting = [label for label, system in asked.items() if needed.made(system)]
    if not fitting:
        raise WrongItemsError(
            f"{section.items}: needed are items of {needed}, but these were made with {json.dumps(asked)}: "
            "score that model"
        )
    if len(fitting) > 1:
        raise ConfigError(f"{section.items}: {' and '.join(fitting)} are both {needed}; choose by `system`")
    (label,) = fitting
    told = {
        "source": section.items,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "system": label,
        "made_with": systems[label],
    }
    return [item for item in read_items(file) if item.system == label], told


def check_comparable(candidate: Mapping[str, str | None], reference: Mapping[str, str | None]) -> None:
    """Refuse a pair of systems that were not asked the same, in the same way, on the same base model.

    Args:
        candidate: what its file of items says of it.
        reference: the same.

    Raises:
        WrongItemsError: they were not, or a file of items does not say.
    """
    if silent := [name for name in _ALWAYS if not (name in candidate and name in reference)]:
        raise WrongItemsError(
            f"the items do not say with which {', '.join(silent)} they were made: score both systems "
            "again, in a new job"
        )
    for name in sorted({*candidate, *reference} - _OWN):
        if candidate.get(name) != reference.get(name):
            ours, theirs = (
                f"{name} {system[name]}" if system.get(name) else f"no {name}"
                for system in (candidate, reference)
            )
            otherwise = ", or compare with its own full tokens, --reference.against full"
            raise WrongItemsError(
                f"the candidate's items were made with {ours}, the reference's with {theirs}: score both on "
                f"the same{otherwise if name == 'weights' else ''}"
            )
