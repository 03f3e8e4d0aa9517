"""The adapters of one engine, of the versions that their registry names now."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import nn

from pipelines.engine_thread import EngineThread
from pipelines.tracking import exact_model, fetch_model
from skipvision import SkipConfig, load_adapter, read_adapter
from skipvision.engine import Engine
from skipvision.errors import ConfigError

logger = logging.getLogger("ray.serve")

_REGISTERED = "models:/"


@dataclass(frozen=True)
class Version:
    """An adapter as it is served now.

    Attributes:
        name: the engine's, which knows several versions while one takes over from another.
        source: folder, or registered model with its version.
    """

    name: str
    source: str


class ServedAdapters:
    """Those of one engine.

    Args:
        sources: folders, or ``models:/NAME@ALIAS``, by the name that clients use.
        registry: MLflow's URI.

    Attributes:
        versions: what new requests run under, by the name that clients use.
    """

    def __init__(self, sources: Mapping[str, str], registry: str | None) -> None:
        self._sources, self._registry = sources, registry or ""
        self._retired: set[str] = set()
        self.versions: dict[str, Version] = {}

    @property
    def registered(self) -> dict[str, str]:
        """Those whose version may change."""
        return {name: source for name, source in self._sources.items() if source.startswith(_REGISTERED)}

    def begin(self, model: nn.Module) -> tuple[nn.Module, SkipConfig | None]:
        """The model with its first adapter, which an engine is made with, and that one's SkipConfig."""
        self.versions = {name: self._version(name) for name in self._sources}
        for version in list(self.versions.values())[:1]:
            with self._files(version) as folder:
                return load_adapter(model, folder, name=version.name), read_adapter(folder)["skip"]
        return model, None

    def complete(self, engine: Engine) -> None:
        """Add the others."""
        for version in list(self.versions.values())[1:]:
            with self._files(version) as folder:
                engine.add_adapter(version.name, folder)

    def look(self, engine: EngineThread) -> None:
        """Serve the versions that aliases name now; those of before as long as they have requests."""
        # Those since the last look: a request may be on its way to what has been retired just now.
        self._forget(engine)
        for name, source in self.registered.items():
            try:
                self._follow(name, engine)
            except Exception:
                # What is served goes on being served; the next look may do better.
                logger.warning("adapter %s (%s) could not be renewed", name, source, exc_info=True)

    def _follow(self, name: str, engine: EngineThread) -> None:
        new, old = self._version(name), self.versions[name]
        if new == old:
            return
        if new.name not in engine.call(lambda engine: engine.adapters).result():
            with self._files(new) as folder:
                engine.call(partial(Engine.add_adapter, name=new.name, folder=folder)).result()
        self.versions[name] = new
        self._retired = (self._retired | {old.name}) - {new.name}
        logger.info("adapter %s: %s in place of %s", name, new.source, old.source)

    def _forget(self, engine: EngineThread) -> None:
        """What has no requests any more goes; the engine keeps the first adapter, which it was made with."""
        for old in list(self._retired):
            with suppress(ConfigError):
                engine.call(partial(Engine.remove_adapter, name=old)).result()
                self._retired.remove(old)

    def _version(self, name: str) -> Version:
        """The version that is to be served now; its files stay where they are."""
        source = self._sources[name]
        if source.startswith(_REGISTERED):
            source = exact_model(self._registry, source)
        return Version(f"{name}@{source.rsplit('/', 1)[-1]}".replace(".", "_"), source)

    @contextmanager
    def _files(self, version: Version) -> Iterator[Path]:
        """An adapter's folder, while it is loaded; a registry's is a copy that goes right afterwards."""
        if not version.source.startswith(_REGISTERED):
            yield Path(version.source)
            return
        with tempfile.TemporaryDirectory(prefix="skipvision-adapter-") as place:
            folder = Path(place, "adapter")
            fetch_model(self._registry, version.source, folder)
            yield folder
