"""Named methods: the criteria and merges that a `SkipConfig` selects by name.

Methods from other packages register themselves when their module is imported. Before an unknown name is
looked up, the modules named in either of these places are imported, so that jobs, Ray workers and the
endpoint's replicas know the method too:

- in the environment variable ``SKIPVISION_METHODS``, as module names separated by commas. On a Ray cluster,
  set it in the ``env_vars`` of the job's or the application's runtime environment.
- in an entry point of the group ``skipvision.methods`` of an installed package.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from functools import lru_cache, partial
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from types import CodeType
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticKnownError, core_schema

from skipvision.errors import ConfigError

METHODS_VARIABLE = "SKIPVISION_METHODS"
"""Environment variable that names modules with further criteria and merges."""
METHODS_GROUP = "skipvision.methods"
"""Entry-point group of packages that bring further criteria and merges."""


class Method(Protocol):
    """A criterion or a merge."""

    @property
    def name(self) -> str:
        """Value of the config field that selects it."""

    @property
    def function(self) -> Callable[..., Any]:
        """The function that does the work."""


M = TypeVar("M", bound=Method)


class Registry(Generic[M]):
    """The methods of one kind by name, in the order in which they were registered.

    As metadata of a pydantic field (``Annotated[str, registry]``) it validates names and lists them in JSON
    schemas.

    Args:
        kind: what the methods are, for messages.
    """

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._methods: dict[str, M] = {}

    def add(self, method: M) -> M:
        """Register a method. Registering the same function again replaces it, as after a reload.

        Raises:
            ConfigError: the name belongs to another function.
        """
        known = self._methods.get(method.name)
        if known is not None and _origin(known) != _origin(method):
            raise ConfigError(
                f"{self._kind} {method.name!r} is registered already, by {_origin(known)}: choose another "
                f"name for {_origin(method)}"
            )
        self._methods[method.name] = method
        return method

    def __getitem__(self, name: str) -> M:
        """Return a method; raise `ConfigError` if none has this name."""
        if name not in self:
            raise ConfigError(f"there is no {self._kind} {name!r}; expected {self.expected(name)}")
        return self._methods[name]

    def __contains__(self, name: object) -> bool:
        if name not in self._methods:
            load_methods()
        return name in self._methods

    def __iter__(self) -> Iterator[str]:
        load_methods()
        return iter(tuple(self._methods))

    def expected(self, name: object) -> str:
        """List the names for an error message, with the one most like ``name`` and the way to add others."""
        *others, last = map(repr, self)
        near = get_close_matches(str(name), self, n=1)
        hint = "".join(f"; did you mean {one!r}?" for one in near)
        return (
            f"{', '.join(others)} or {last}{hint} (methods of other packages need {METHODS_VARIABLE}; see "
            "docs/library.md)"
        )

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._validated)

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"type": "string", "enum": list(self)}

    def _validated(self, name: object) -> str:
        if isinstance(name, str) and name in self:
            return name
        raise PydanticKnownError("literal_error", {"expected": self.expected(name)})


def load_methods() -> None:
    """Import the modules that `METHODS_VARIABLE` and `METHODS_GROUP` name, once in a process.

    Raises:
        ConfigError: one of them cannot be imported, or raises a `ConfigError` while registering.
    """
    _load(os.environ.get(METHODS_VARIABLE, ""))


@lru_cache
def _load(modules: str) -> None:
    for module in filter(None, map(str.strip, modules.split(","))):
        _import(f"{METHODS_VARIABLE}={modules}", module, partial(import_module, module))
    for entry in entry_points(group=METHODS_GROUP):
        _import(f"the entry point {entry.name!r} of {METHODS_GROUP}", entry.value, entry.load)


def _import(source: str, module: str, load: Callable[[], Any]) -> None:
    try:
        load()
    except ConfigError:  # such as a name that is taken: the import itself is not at fault
        raise
    except Exception as error:
        raise ConfigError(
            f"{source} names {module}, which cannot be imported ({type(error).__name__}: {error}): correct "
            "the name, or put the module on the PYTHONPATH of every process"
        ) from error


def is_built_in(method: Method) -> bool:
    """Return whether this package defines the method's function."""
    return _origin(method).module.partition(".")[0] == __name__.partition(".")[0]


class _Origin(NamedTuple):
    """Where a function is defined.

    Attributes:
        module: its module's name.
        name: its qualified name.
        code: its code if it is a lambda, because all lambdas have one name; otherwise None.
    """

    module: str
    name: str
    code: CodeType | None

    def __str__(self) -> str:
        line = "" if self.code is None else f" in line {self.code.co_firstlineno}"
        return f"{self.module}.{self.name}{line}"


def _origin(method: Method) -> _Origin:
    function = method.function
    module, name = getattr(function, "__module__", ""), getattr(function, "__qualname__", repr(function))
    code = getattr(function, "__code__", None) if name.endswith("<lambda>") else None
    return _Origin(_script_name() if module == "__main__" else module, name, code)


def _script_name() -> str:
    """Return the name under which other processes import the module that runs as ``__main__``."""
    main = sys.modules["__main__"]
    spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
    if spec is not None:
        return str(spec.name)
    return Path(file).stem if file else "__main__"
