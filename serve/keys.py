"""API keys: who may send requests, and how many at once.

A keys file (YAML or JSON) lists the keys::

    keys:
      - name: alice
        sha256: 0f3c…            # hash of the key; the key itself is not stored
      - name: batch
        sha256: 77ab…
        max_concurrent: 4        # requests at once, in each ingress replica

``python -m serve.keys new NAME --file keys.yaml`` generates a key, prints it once and adds its entry. The
file is read again when it changes; to revoke a key, remove its entry. Without a keys file there is no
authentication, which is safe on the loopback interface only.

A key is 256 random bits, so a plain SHA-256 protects it at rest: salts and slow hashes are for secrets that
can be guessed.
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
from skipvision.files import check_regular
from skipvision.problems import problem_lines

logger = logging.getLogger(__name__)

PREFIX = "sk-skip-"


def new_key() -> str:
    """Generate a key of 256 random bits."""
    return PREFIX + secrets.token_urlsafe(32)


def hash_key(key: str) -> str:
    """Return the SHA-256 of a key in hexadecimal."""
    return hashlib.sha256(key.encode(errors="backslashreplace")).hexdigest()


class ApiKey(BaseModel):
    """An entry of the keys file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, description="owner; for logs and metrics")
    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="SHA-256 of the key (hexadecimal)")
    max_concurrent: int | None = Field(
        None, ge=1, description="requests at once in each ingress replica (count); null = unlimited"
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
    """Checks keys against a file, and counts the running requests of each; for one process and event loop.

    If the file becomes unreadable, the keys stay unchanged and the log has an error, so that a failed edit
    locks nobody out.

    Args:
        path: the keys file; None = everyone is admitted.

    Raises:
        ConfigError: the file cannot be read at the start.
    """

    def __init__(self, path: str | Path | None) -> None:
        self._path = None if path is None else Path(path)
        self._running: Counter[str] = Counter()
        self._seen: object = None
        self._keys: tuple[ApiKey, ...] = ()
        if self._path is not None:
            self._seen = _fingerprint(self._path)  # before reading, so that no change is missed
            self._keys = _read(self._path)

    def authenticate(self, key: str | None) -> ApiKey | None:
        """Return the entry of a key; None if there is no keys file. Raise `AuthenticationError`."""
        if self._path is None:
            return None
        self._reload(self._path)
        if not key:
            raise AuthenticationError("no API key was given; send the header Authorization: Bearer <key>")
        given, found = hash_key(key), None
        for entry in self._keys:  # all of them, so that the time does not reveal which one matched
            if hmac.compare_digest(entry.sha256, given):
                found = entry
        if found is None:
            raise AuthenticationError("the API key is unknown; it may have been revoked")
        return found

    @asynccontextmanager
    async def admitted(self, key: str | None, retry_after: float) -> AsyncIterator[ApiKey | None]:
        """Count a request against its key while it runs.

        Args:
            key: key of the request.
            retry_after: when to try again after reaching the limit (s).

        Raises:
            AuthenticationError: no key, or an unknown one.
            OverloadedError: the key's limit is reached.
        """
        entry = self.authenticate(key)
        if entry is None:
            yield None
            return
        if entry.max_concurrent is not None and self._running[entry.name] >= entry.max_concurrent:
            raise OverloadedError(
                f"the API key {entry.name!r} has {self._running[entry.name]} requests running; its limit is "
                f"{entry.max_concurrent}: try again when one has ended",
                retry_after,
            )
        self._running[entry.name] += 1
        try:
            yield entry
        finally:
            self._running[entry.name] -= 1

    def _reload(self, path: Path) -> None:
        fingerprint = _fingerprint(path)
        if fingerprint == self._seen:
            return
        self._seen = fingerprint
        try:
            self._keys = _read(path)
        except ConfigError as error:
            logger.error("the API keys stay unchanged: %s", error)
        else:
            logger.info("read %d API keys from %s", len(self._keys), path)


def _fingerprint(path: Path) -> object:
    """Return a value that differs after the file is changed or replaced; None if it is missing."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def _read(path: Path) -> tuple[ApiKey, ...]:
    """Return the keys of a file. Raise `ConfigError`, which quotes nothing from the file."""
    try:
        check_regular(path)
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"the keys file {path} cannot be read on {socket.gethostname()}: {error.strerror}; every node "
            "of a cluster must have it under this path"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise ConfigError(f"the keys file {path} is neither YAML nor JSON") from None
    try:
        return _KeysFile.model_validate(tree).keys
    except ValidationError as error:
        lines = problem_lines(error, _KeysFile, tree, show_values=False)
        raise ConfigError(f"the keys file {path} is invalid: {'; '.join(lines)}") from None


# -------------------------------------------------------------------------------------- command line


def add_key(path: Path, name: str, max_concurrent: int | None = None) -> str:
    """Generate a key, add its entry to the file (created if missing, mode 600), and return the key.

    The file is rewritten without its comments and replaced atomically: readers see the old or the new one.

    Raises:
        ConfigError: the name is taken, or the file is not a keys file.
    """
    path = path.resolve()  # replace the target of a symbolic link, not the link
    keys = _read(path) if path.exists() else ()
    if any(entry.name == name for entry in keys):
        raise ConfigError(
            f"the keys file {path} has a key named {name!r}; remove it first, or choose another name"
        )
    key = new_key()
    values = {"name": name, "sha256": hash_key(key), "max_concurrent": max_concurrent}
    try:
        entry = ApiKey.model_validate(values)
    except ValidationError as error:
        raise ConfigError("; ".join(problem_lines(error, ApiKey, values, equals="="))) from None
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
    """Run ``new NAME --file FILE [--max-concurrent N]``."""
    parser = argparse.ArgumentParser(prog="python -m serve.keys", description="API keys of the endpoint.")
    new = parser.add_subparsers(required=True, metavar="new").add_parser(
        "new", help="generate a key, print it once, store its hash"
    )
    new.add_argument("name", help="owner of the key")
    new.add_argument("--file", type=Path, required=True, help="keys file; created if missing")
    new.add_argument("--max-concurrent", type=int, help="requests at once; default: unlimited")
    arguments = parser.parse_args(argv)
    try:
        print(add_key(arguments.file, arguments.name, arguments.max_concurrent))
    except (ConfigError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"Its hash is in {arguments.file}. The key is not shown again.", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
