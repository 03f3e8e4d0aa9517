"""The results of the training that an adapter comes from, for the model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from pipelines.shared.sections import flatten
from pipelines.tracking.registry import ModelVersion, Registry

_RESULTS = ("steps", "loss", "validation_loss", "exact_match")
"""Fields of a fine-tune's result for the card."""


def numbers_of(adapter: Path | None, label: str | None, uri: str) -> dict[str, object]:
    """Return results by their names: of the adapter's run in MLflow, or of its ``run.json``.

    Args:
        adapter: folder of the adapter; None = no adapter.
        label: its exact name in MLflow, if it is registered there.
        uri: of MLflow.

    Raises:
        TrackingError: MLflow does not answer.
    """
    if adapter is None:
        return {}
    if label is not None and label.startswith("models:/"):
        name, _, version = label.removeprefix("models:/").rpartition("/")
        registry = Registry(uri)
        run, metrics = registry.metrics(ModelVersion(name, version))
        chosen = {
            key: value for key, value in metrics.items() if key == "loss" or key.startswith("validation/")
        }
        return {"adapter": label, "MLflow run": run, **chosen}
    return _from_file(adapter.parent / "run.json")


def _from_file(file: Path) -> dict[str, object]:
    """Return the results in the ``run.json`` of a fine-tune; none if there is no such file."""
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        result: Mapping[str, object] = state.get("result") or state.get("trained") or {}
    except (OSError, ValueError, AttributeError):
        return {}
    chosen = {name: result[name] for name in _RESULTS if result.get(name) is not None}
    run = {"MLflow run": result["mlflow_run_id"]} if "mlflow_run_id" in result else {}
    return {**run, **flatten(chosen)}
