"""Keep an engine's adapters at the versions that the registry's aliases name."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from pipelines.tracking.client import TrackingError
from pipelines.tracking.registry import exact_model, fetch_model, is_registered
from serve.errors import NotLoadedError
from serve.replica.engine import AdapterHost
from skipvision.errors import SkipVisionError

logger = logging.getLogger("ray.serve")

_REGISTRY_DOWN = "its registry does not respond"
_NOT_LOADABLE = "its registry has no version that can be loaded"


@dataclass(frozen=True)
class Version:
    """A version of an adapter.

    Attributes:
        name: the engine's name for this version; an engine may hold two versions during a change.
        source: folder, or registered model with its version.
    """

    name: str
    source: str


class ServedAdapters:
    """The adapters of one engine.

    Args:
        sources: folder, or ``models:/NAME@ALIAS``, of each adapter by its name for clients.
        registry: MLflow's URI.
        poll_seconds: time between updates (s).

    Attributes:
        versions: version for new requests by the adapter's name for clients.
        missing: reason, for clients, for each adapter that is not loaded.
    """

    def __init__(self, sources: Mapping[str, str], registry: str | None, poll_seconds: float) -> None:
        self._sources, self._registry, self._poll_seconds = sources, registry or "", poll_seconds
        self._retired: set[str] = set()
        self.versions: dict[str, Version] = {}
        self.missing = dict.fromkeys(sources, _REGISTRY_DOWN)

    @property
    def registered(self) -> dict[str, str]:
        """The adapters from a registry, whose version may change."""
        return {name: source for name, source in self._sources.items() if is_registered(source)}

    def version(self, name: str) -> Version:
        """Return the version for new requests. Raise `NotLoadedError`."""
        version = self.versions.get(name)
        if version is None:
            reason = self.missing.get(name, _REGISTRY_DOWN)
            message = f"the adapter {name!r} is not loaded yet: {reason}; try again later"
            raise NotLoadedError(message, self._poll_seconds)
        return version

    def load(self, host: AdapterHost) -> None:
        """Load all adapters at the start; a later `update` loads those that the registry cannot provide now.

        Raises:
            SkipVisionError: an adapter in a folder cannot be loaded.
        """
        down = False
        for name, source in self._sources.items():
            # Each call to a registry that is down may take minutes.
            if down and is_registered(source):
                continue
            try:
                self._follow(name, host)
            except SkipVisionError as error:
                if not is_registered(source):
                    raise
                down = self._record_failure(name, error)

    def update(self, host: AdapterHost) -> None:
        """Load the versions that aliases name now, and remove older versions that have no requests."""
        # Removes what earlier updates retired: requests may still be on their way to the latest.
        self._remove_retired(host)
        for name in self.registered:
            try:
                self._follow(name, host)
            except Exception as error:
                # The served version stays; the next update tries again.
                if self._record_failure(name, error):
                    return

    def _record_failure(self, name: str, error: Exception) -> bool:
        """Log and record why an adapter is missing. Return whether the registry is down."""
        down = isinstance(error, TrackingError)
        logger.warning("adapter %s (%s) could not be loaded", name, self._sources[name], exc_info=error)
        if name in self.missing:
            self.missing = {**self.missing, name: _REGISTRY_DOWN if down else _NOT_LOADABLE}
        return down

    def _follow(self, name: str, host: AdapterHost) -> None:
        new, old = self._version(name), self.versions.get(name)
        if new == old:
            return
        if new.name not in host.names():
            with self._files(new) as folder:
                host.add(new.name, folder)
        # New dictionaries, because other threads read the old ones.
        self.versions = {**self.versions, name: new}
        self.missing = {other: why for other, why in self.missing.items() if other != name}
        if old is not None:
            self._retired = (self._retired | {old.name}) - {new.name}
        logger.info("adapter %s: %s replaces %s", name, new.source, old.source if old else "none")

    def _remove_retired(self, host: AdapterHost) -> None:
        for old in list(self._retired):
            with suppress(SkipVisionError):  # it still has requests
                host.remove(old)
                self._retired.remove(old)

    def _version(self, name: str) -> Version:
        """Return the version to serve now, without fetching its files."""
        source = self._sources[name]
        if is_registered(source):
            source = exact_model(self._registry, source)
        # PEFT names modules after the adapter, so the name must not contain a dot.
        engine_name = quote(f"{name}@{source.rsplit('/', 1)[-1]}").replace(".", "%2E")
        return Version(engine_name, source)

    @contextmanager
    def _files(self, version: Version) -> Iterator[Path]:
        """Provide an adapter's folder for loading: for a registered one a temporary copy."""
        if not is_registered(version.source):
            yield Path(version.source)
            return
        with tempfile.TemporaryDirectory(prefix="skipvision-adapter-") as parent:
            folder = Path(parent, "adapter")
            fetch_model(self._registry, version.source, folder)
            yield folder
