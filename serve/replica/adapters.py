"""The adapters of one engine, of the versions that their registry names now."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import quote

from pipelines.engines.thread import EngineThread
from pipelines.tracking.client import TrackingError
from pipelines.tracking.registry import exact_model, fetch_model, is_registered
from serve.errors import NotLoadedError
from skipvision.engine import Engine
from skipvision.errors import SkipVisionError

logger = logging.getLogger("ray.serve")

_AWAY = "its registry does not answer"
_WRONG = "its registry has none that can be loaded"


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
        poll_seconds: time between looks.

    Attributes:
        versions: what new requests run under, by the name that clients use.
        missing: why the others cannot be had, as clients may read it.
    """

    def __init__(self, sources: Mapping[str, str], registry: str | None, poll_seconds: float) -> None:
        self._sources, self._registry, self._poll_seconds = sources, registry or "", poll_seconds
        self._retired: set[str] = set()
        self.versions: dict[str, Version] = {}
        self.missing = dict.fromkeys(sources, _AWAY)

    @property
    def registered(self) -> dict[str, str]:
        """Those whose version may change."""
        return {name: source for name, source in self._sources.items() if is_registered(source)}

    def version(self, name: str) -> Version:
        """What new requests run under; raises `NotLoadedError`."""
        version = self.versions.get(name)
        if version is None:
            raise NotLoadedError(
                f"the adapter {name!r} is not loaded yet: {self.missing.get(name, _AWAY)}; try again later",
                self._poll_seconds,
            )
        return version

    def load(self, engine: EngineThread) -> None:
        """Load all that can be had; those of a registry that cannot, at a later `look`.

        Raises:
            SkipVisionError: an adapter in a folder that is wrong.
        """
        away = False
        for name, source in self._sources.items():
            # A registry that did not answer may take minutes not to answer again.
            if away and is_registered(source):
                continue
            try:
                self._follow(name, engine)
            except SkipVisionError as error:
                if not is_registered(source):
                    raise
                away = self._missed(name, error)

    def look(self, engine: EngineThread) -> None:
        """Serve the versions that aliases name now; those of before as long as they have requests."""
        # Those since the last look: a request may be on its way to what has been retired just now.
        self._forget(engine)
        for name in self.registered:
            try:
                self._follow(name, engine)
            except Exception as error:
                # What is served goes on being served; the next look may do better.
                if self._missed(name, error):
                    return

    def _missed(self, name: str, error: Exception) -> bool:
        """Whether the registry does not answer, and may take a minute not to answer again."""
        away = isinstance(error, TrackingError)
        logger.warning("adapter %s (%s) could not be had", name, self._sources[name], exc_info=error)
        if name in self.missing:
            self.missing = {**self.missing, name: _AWAY if away else _WRONG}
        return away

    def _follow(self, name: str, engine: EngineThread) -> None:
        new, old = self._version(name), self.versions.get(name)
        if new == old:
            return
        if new.name not in engine.call(lambda engine: engine.adapters).result():
            with self._files(new) as folder:
                engine.call(partial(Engine.add_adapter, name=new.name, folder=folder)).result()
        # New ones: others read them meanwhile.
        self.versions = {**self.versions, name: new}
        self.missing = {one: why for one, why in self.missing.items() if one != name}
        if old is not None:
            self._retired = (self._retired | {old.name}) - {new.name}
        logger.info("adapter %s: %s in place of %s", name, new.source, old.source if old else "none")

    def _forget(self, engine: EngineThread) -> None:
        """What has no requests any more goes."""
        for old in list(self._retired):
            with suppress(SkipVisionError):
                engine.call(partial(Engine.remove_adapter, name=old)).result()
                self._retired.remove(old)

    def _version(self, name: str) -> Version:
        """The version that is to be served now; its files stay where they are."""
        source = self._sources[name]
        if is_registered(source):
            source = exact_model(self._registry, source)
        # PEFT keeps an adapter's weights in modules of its name, which may have no dot in it.
        called = quote(f"{name}@{source.rsplit('/', 1)[-1]}").replace(".", "%2E")
        return Version(called, source)

    @contextmanager
    def _files(self, version: Version) -> Iterator[Path]:
        """An adapter's folder, while it is loaded; a registry's is a copy that goes right afterwards."""
        if not is_registered(version.source):
            yield Path(version.source)
            return
        with tempfile.TemporaryDirectory(prefix="skipvision-adapter-") as place:
            folder = Path(place, "adapter")
            fetch_model(self._registry, version.source, folder)
            yield folder
