"""API keys: who may ask, and how much at once.

A keys file (YAML or JSON) names those who may::

    keys:
      - name: alice
        sha256: 0f3c…            # of the key; the key itself is nowhere stored
      - name: batch
        sha256: 77ab…
        max_concurrent: 4        # requests at the same time, in each ingress replica

``python -m serve.keys new NAME --file keys.yaml`` makes a key, prints it once and adds its entry. The file
is read again when it changes; to revoke a key, remove its entry. Without a keys file there is no
authentication: that is for endpoints on the loopback interface only.

A key is 256 random bits, so one plain SHA-256 keeps it safe at rest: salts and slow hashes protect
secrets that can be guessed, and these cannot.
"""

from __future__ import annotations

import argparse
import hashlib
import hmac
import logging
import os
import secrets
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from serve.errors import AuthenticationError, OverloadedError
from skipvision.errors import ConfigError

logger = logging.getLogger(__name__)

PREFIX = "sk-skip-"


def new_key() -> str:
    """A key that nobody has: 256 random bits."""
    return PREFIX + secrets.token_urlsafe(32)


def hash_key(key: str) -> str:
    """What is stored of a key: its SHA-256 in hexadecimal."""
    return hashlib.sha256(key.encode(errors="backslashreplace")).hexdigest()


class ApiKey(BaseModel):
    """An entry of the keys file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, description="who it belongs to; for logs and metrics")
    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="SHA-256 of the key (hexadecimal)")
    max_concurrent: int | None = Field(
        None, ge=1, description="requests at the same time in each ingress replica (count); null = any number"
    )


class _KeysFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    keys: tuple[ApiKey, ...]

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        for field in ("name", "sha256"):
            for value, count in Counter(getattr(key, field) for key in self.keys).items():
                if count > 1:
                    raise ValueError(f"{count} keys have the {field} {value}")
        return self


class KeyRing:
    """The keys of a file, and how many requests each has running; for one process and event loop.

    A file that becomes unreadable leaves the keys as they were, with an error in the log: an edit that goes
    wrong locks nobody out. Raises `ConfigError` if it cannot be read at the start.

    Args:
        path: the keys file; None = everyone is admitted.
    """

    def __init__(self, path: str | Path | None) -> None:
        self._path = None if path is None else Path(path)
        self._running: Counter[str] = Counter()
        self._seen: object = None
        self._keys: tuple[ApiKey, ...] = ()
        if self._path is not None:
            self._seen = _state(self._path)  # before reading: a change in between is seen next time
            self._keys = _read(self._path)

    def authenticate(self, key: str | None) -> ApiKey | None:
        """The key's entry; None if there is no keys file. Raises `AuthenticationError`."""
        if self._path is None:
            return None
        self._reload(self._path)
        if not key:
            raise AuthenticationError("no API key was given; send the header Authorization: Bearer <key>")
        given, found = hash_key(key), None
        for entry in self._keys:  # all of them, so that the time says nothing of which it was
            if hmac.compare_digest(entry.sha256, given):
                found = entry
        if found is None:
            raise AuthenticationError("the API key is not known; it may have been revoked")
        return found

    @asynccontextmanager
    async def admitted(self, key: str | None, retry_after: float) -> AsyncIterator[ApiKey | None]:
        """While a request runs; raises `AuthenticationError`, or `OverloadedError` at the key's limit.

        Args:
            key: that the request came with.
            retry_after: seconds after which those beyond the limit shall try again.
        """
        entry = self.authenticate(key)
        if entry is None:
            yield None
            return
        if entry.max_concurrent is not None and self._running[entry.name] >= entry.max_concurrent:
            raise OverloadedError(
                f"the API key {entry.name!r} has {self._running[entry.name]} requests running, its limit is "
                f"{entry.max_concurrent}; try again when one has ended",
                retry_after,
            )
        self._running[entry.name] += 1
        try:
            yield entry
        finally:
            self._running[entry.name] -= 1

    def _reload(self, path: Path) -> None:
        state = _state(path)
        if state == self._seen:
            return
        self._seen = state
        try:
            self._keys = _read(path)
        except ConfigError as error:
            logger.error("the API keys stay as they were: %s", error)
        else:
            logger.info("%d API keys were read from %s", len(self._keys), path)


def _state(path: Path) -> object:
    """Something that differs after the file was changed or replaced."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def _read(path: Path) -> tuple[ApiKey, ...]:
    """The keys of a file; raises `ConfigError` without showing what stands in it."""
    try:
        return _KeysFile.model_validate(yaml.safe_load(path.read_text(encoding="utf-8"))).keys
    except OSError as error:
        raise ConfigError(
            f"the keys file {path} cannot be read on {socket.gethostname()}: {error.strerror}; every node "
            "of a cluster must see it under this path"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise ConfigError(f"the keys file {path} is neither YAML nor JSON") from None
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, problem['loc'])) or 'the whole'}: {problem['msg']}"
            for problem in error.errors()
        )
        raise ConfigError(f"the keys file {path} is wrong: {problems}") from None


# -------------------------------------------------------------------------------------- command line


def add_key(path: Path, name: str, max_concurrent: int | None = None) -> str:
    """Make a key, add its entry to the file (made if missing, mode 600), and return the key.

    The file is written anew, without its comments, and put in place at once: readers see the old one or
    the new one. Raises `ConfigError` if the name is taken, or the file is not a keys file.
    """
    path = path.resolve()  # a link stays one
    keys = _read(path) if path.exists() else ()
    if any(entry.name == name for entry in keys):
        raise ConfigError(
            f"the keys file {path} has a key named {name!r}; remove it first, or choose another name"
        )
    key = new_key()
    try:
        entry = ApiKey(name=name, sha256=hash_key(key), max_concurrent=max_concurrent)
    except ValidationError as error:
        problem = error.errors()[0]
        raise ConfigError(f"{problem['loc'][0]}={problem['input']!r}: {problem['msg']}") from None
    tree = {"keys": [each.model_dump(exclude_none=True) for each in (*keys, entry)]}
    _write(path, yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))
    return key


def _write(path: Path, text: str) -> None:
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 600
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def main(argv: Sequence[str]) -> None:
    """``new NAME --file FILE [--max-concurrent N]``."""
    parser = argparse.ArgumentParser(prog="python -m serve.keys", description="API keys of the endpoint.")
    new = parser.add_subparsers(required=True, metavar="new").add_parser(
        "new", help="make a key, print it once, store its hash"
    )
    new.add_argument("name", help="who it belongs to")
    new.add_argument("--file", type=Path, required=True, help="keys file; made if missing")
    new.add_argument("--max-concurrent", type=int, help="requests at the same time; any number if not given")
    arguments = parser.parse_args(argv)
    try:
        print(add_key(arguments.file, arguments.name, arguments.max_concurrent))
    except (ConfigError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"Its hash is in {arguments.file}; the key is shown only this once.", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
