"""The connection to MLflow, and what happens when it does not answer."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from skipvision.errors import ConfigError, SkipVisionError

if TYPE_CHECKING:
    from mlflow import MlflowClient

T = TypeVar("T")


class TrackingError(SkipVisionError):
    """MLflow could not be reached, or refused what it was given."""


def connect(uri: str, *, existing: bool = False) -> MlflowClient:
    """A client of the tracking server and registry at ``uri``.

    Raises:
        ConfigError: with ``existing``, ``uri`` is a sqlite file that is not there; without, it is made.
    """
    quieten()
    from mlflow import MlflowClient

    file = sqlite_file(uri)
    if file is not None:
        if existing and not file.exists():
            raise ConfigError(
                f"there is no {file}, in which MLflow's models were to be looked up: mend the address of "
                "MLflow, or the storage that it lies in"
            )
        file.parent.mkdir(parents=True, exist_ok=True)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def quieten() -> None:
    """Before MLflow is imported: what it says, to whom, and how long it keeps trying."""
    # Its own patience of several minutes per call would stop the training it watches.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")


def sqlite_file(uri: str) -> Path | None:
    """The file of a sqlite store, relative where the URI is; None for other stores."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def unless_exists(create: Callable[[], object]) -> None:
    """Create something, or find that another job has done so in the meantime."""
    from mlflow.exceptions import MlflowException

    try:
        create()
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def with_retries(call: Callable[[], T], doing: str, pauses: tuple[float, ...]) -> T:
    """What ``call`` returns, tried again after each pause (seconds); `TrackingError` if it always fails.

    Settings that are wrong (`ConfigError`) are no failure of MLflow's.
    """
    for pause in (*pauses, None):
        try:
            return call()
        except ConfigError:
            raise
        # The stores behind the client raise their own errors as well as MLflow's.
        except Exception as error:
            if pause is None:
                raise TrackingError(f"MLflow failed at {doing}: {brief(error)}") from error
            time.sleep(pause)
    raise AssertionError("unreachable")


def brief(error: Exception) -> str:
    """The type and first line of an error."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
