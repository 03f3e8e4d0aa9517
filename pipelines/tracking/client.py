"""The connection to MLflow, retries, and the error when it does not answer."""

from __future__ import annotations

import errno
import logging
import os
import re
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import unquote

from pipelines.shared.files import StorageError, cause_and_remedy, is_storage_error
from pipelines.shared.proxies import bypass_proxies_on_loopback
from skipvision.errors import ConfigError, SkipVisionError

if TYPE_CHECKING:
    from mlflow import MlflowClient

T = TypeVar("T")


_SQLITE_ERRORS = {
    sqlite3.SQLITE_FULL: errno.ENOSPC,
    sqlite3.SQLITE_READONLY: errno.EROFS,
    sqlite3.SQLITE_IOERR: errno.EIO,
    sqlite3.SQLITE_PERM: errno.EACCES,
}
"""The system's error number for sqlite's error codes of disks and permissions."""


class TrackingError(SkipVisionError):
    """MLflow did not answer, or refused a value."""


class TrackingStorageError(TrackingError, StorageError):
    """A file of MLflow on this machine cannot be written or read."""


def connect(uri: str, *, existing: bool = False) -> MlflowClient:
    """Return a client of the tracking server and model registry at ``uri``.

    A sqlite file that does not exist is created.

    Raises:
        ConfigError: with ``existing``, the sqlite file does not exist.
    """
    configure_mlflow()
    from mlflow import MlflowClient

    file = sqlite_file(uri)
    if file is not None:
        if existing and not file.exists():
            raise ConfigError(
                f"there is no {file} to look up models in: correct the address of MLflow, or the storage "
                "that contains the file"
            )
        if not file.exists():
            _create_store(file)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _create_store(file: Path) -> None:
    """Create a sqlite store that appears complete: MLflow cannot use one that it has created in part."""
    from mlflow import MlflowClient

    file.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{file.name}-", dir=file.parent) as folder:
        new = Path(folder, "mlflow.db")
        uri = sqlite_uri(new)
        MlflowClient(tracking_uri=uri, registry_uri=uri).search_experiments(max_results=1)
        try:
            file.hardlink_to(new)  # fails, unlike a renaming, if another job was faster
        except FileExistsError:
            pass
        except OSError:  # this file system has no links
            if not file.exists():
                new.rename(file)


def configure_mlflow() -> None:
    """Set how much MLflow logs and how long it retries; call this before importing it."""
    bypass_proxies_on_loopback()
    # By default MLflow retries a call for several minutes, which would stop the training it records.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # It prints tracebacks of errors that it raises, too.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)


def sqlite_file(uri: str) -> Path | None:
    """Return the file of a sqlite store, relative if the URI is relative; None for other stores."""
    return Path(unquote(uri.removeprefix("sqlite:///"))) if uri.startswith("sqlite:///") else None


def sqlite_uri(file: Path) -> str:
    """Return the URI of a sqlite store, in which ``?`` and what looks like a percent escape are escaped."""
    return "sqlite:///" + re.sub(r"\?|%(?=[0-9A-Fa-f]{2})", lambda found: f"%{ord(found[0]):02X}", str(file))


def unless_exists(create: Callable[[], object]) -> None:
    """Call ``create``, and ignore MLflow's error if another job has created the same object."""
    from mlflow.exceptions import MlflowException

    try:
        create()
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def with_retries(call: Callable[[], T], action: str, pauses: tuple[float, ...]) -> T:
    """Return the result of ``call``, which is tried again after each pause (seconds).

    Args:
        call: calls MLflow.
        action: completes "MLflow failed at …".
        pauses: none means one try.

    Raises:
        TrackingError: every try failed; a `TrackingStorageError` if a disk is the reason.
        ConfigError: ``call`` raised it; it is not retried.
    """
    for pause in (*pauses, None):
        try:
            return call()
        except ConfigError:
            raise
        # The client's stores raise errors of their own as well as MLflow's.
        except Exception as error:
            if pause is None:
                raise failure(error, f"MLflow failed at {action}") from error
            time.sleep(pause)
    raise AssertionError("unreachable")


def failure(error: Exception, what: str) -> TrackingError:
    """Wrap an error of MLflow; ``what`` begins the message."""
    found = _storage_error_in(error)
    if found is not None:
        return TrackingStorageError(f"{what}: {cause_and_remedy(found)}")
    return TrackingError(f"{what}: {brief(error)}")


def _storage_error_in(error: BaseException | None) -> OSError | None:
    """Return the error of disks and permissions that caused an error of MLflow; None if none did."""
    while error is not None:
        if is_storage_error(error):
            return error
        if isinstance(error, sqlite3.Error):
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            number = _SQLITE_ERRORS.get(code)
            return None if number is None else OSError(number, os.strerror(number))
        error = error.__cause__
    return None


def brief(error: Exception) -> str:
    """Return the type and the first line of an error."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
