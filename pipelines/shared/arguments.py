"""Read a command-line argument as the type of its field demands.

============================  ======================================================================
field                         argument
============================  ======================================================================
text, path                    literal: ``a #b``, ``007``, ``yes``, ``[x]``, ``a: b`` are unchanged
optional text                 also literal, except that ``null`` is null
integer, number               decimal digits (``010`` is ten), ``1e3``, ``0x10``, ``.inf``, ``.nan``
switch                        true, false, yes, no, on, off
list, mapping, section        YAML; a text in it keeps its spelling, quotes around it are removed
text or a list of text        the list if the argument is one in YAML, otherwise the literal text
============================  ======================================================================

A comment in YAML is an error here, because the shell passes ``#`` only if the user means it. YAML files keep
the rules of YAML.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import PurePath
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

from pipelines.shared.yaml_loader import ArgumentLoader, describe
from skipvision.errors import ConfigError

_DECIMAL = re.compile(r"[-+]?[0-9][0-9_]*")
_OTHER_BASE = re.compile(r"[-+]?0[xob][0-9a-fA-F_]+", re.IGNORECASE)
_FLOAT = re.compile(r"[-+]?(?=\.?[0-9])[0-9_]*\.?[0-9_]*([eE][-+]?[0-9]+)?")
_NOT_FINITE = {f"{sign}.{word}": float(f"{sign}{word}") for sign in ("", "+", "-") for word in ("inf", "nan")}
_SWITCHES = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def read_argument(model: type[BaseModel], name: str, text: str) -> Any:
    """Return the value of ``--name text`` for a field of ``model``.

    An argument that the field cannot take is returned as text or number, for validation to report.

    Raises:
        ConfigError: the field takes YAML, and the argument is not valid YAML.
    """
    types: list[Any] = [model]
    for part in name.split("."):
        types = [inner for one in _members(types) for inner in _types_of_entry(one, part)]
    members = list(_members(types))
    if not members:  # no such field
        return _number(text)
    if not any(one is Any or _is_structure(one) for one in members):
        return _scalar(text, members)
    try:
        return _Argument(text).value(members)
    except yaml.YAMLError as error:
        if any(map(_is_text, members)):
            return text
        raise ConfigError(f"--{name} {text!r} is not valid YAML: {describe(error)}") from None


class _Argument:
    """An argument that is YAML."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._loader = ArgumentLoader(text)
        self._root = self._loader.get_single_node()
        self._open: set[int] = set()

    def value(self, members: Collection[Any]) -> Any:
        if self._root is None:
            return self._text
        if isinstance(self._root, yaml.ScalarNode) and Any not in members:
            return _scalar(self._text, members)
        kinds = (list, tuple) if isinstance(self._root, yaml.SequenceNode) else (Mapping, BaseModel)
        if any(map(_is_text, members)) and not any(_is_structure(one, kinds) for one in members):
            return self._text
        return self._build(self._root, members)

    def _build(self, node: yaml.Node, types: Collection[Any]) -> Any:
        members = list(_members(types))
        if id(node) in self._open:
            raise yaml.MarkedYAMLError(None, None, "a value contains itself", node.start_mark)
        self._open.add(id(node))
        try:
            if not members or Any in members:
                return self._loader.construct_object(node, deep=True)
            if isinstance(node, yaml.SequenceNode):
                return [
                    self._build(element, [t for one in members for t in _types_of_element(one, number)])
                    for number, element in enumerate(node.value)
                ]
            if isinstance(node, yaml.MappingNode):
                self._loader.flatten_mapping(node)
                return {
                    key.value: self._build(
                        entry, [t for one in members for t in _types_of_entry(one, key.value)]
                    )
                    for key, entry in node.value
                }
            if getattr(node, "style", None) in ("'", '"'):
                return node.value
            return None if node.value == "" else _scalar(node.value, members)
        finally:
            self._open.discard(id(node))


def _scalar(text: str, members: Collection[Any]) -> Any:
    """Return the text as the type that fits it: a choice, null, a switch, a number; otherwise unchanged."""
    optional, numeric = NoneType in members, any(one in (int, float) for one in members)
    is_text = any(map(_is_text, members))
    choices = [choice for one in members if get_origin(one) is Literal for choice in get_args(one)]
    if text in choices:
        return text
    if optional and text in (("null",) if is_text else ("null", "Null", "NULL", "~")):
        return None
    if bool in members and text.lower() in _SWITCHES:
        return _SWITCHES[text.lower()]
    if is_text and not numeric:
        return text
    return _number(text)


def _number(text: str) -> int | float | str:
    if _DECIMAL.fullmatch(text):
        return int(text.replace("_", ""))
    if _OTHER_BASE.fullmatch(text):
        try:
            return int(text, 0)
        except ValueError:
            return text
    if text.lower() in _NOT_FINITE:
        return _NOT_FINITE[text.lower()]
    return float(text.replace("_", "")) if _FLOAT.fullmatch(text) else text


# ---------------------------------------------------------------------------------------------- types


def _members(types: Collection[Any]) -> Iterator[Any]:
    """Yield the types without ``Annotated``, each alternative of a union on its own."""
    for one in types:
        if get_origin(one) is Annotated:
            yield from _members(get_args(one)[:1])
        elif get_origin(one) in (Union, UnionType):
            yield from _members(get_args(one))
        else:
            yield one


def _class_of(one: Any) -> type:
    kind = get_origin(one) or one
    return kind if isinstance(kind, type) else object


def _is_text(one: Any) -> bool:
    if get_origin(one) is Literal:
        return any(isinstance(choice, str) for choice in get_args(one))
    return issubclass(_class_of(one), str | PurePath)


def _is_structure(one: Any, kinds: tuple[type, ...] = (Collection, BaseModel)) -> bool:
    return not _is_text(one) and issubclass(_class_of(one), kinds)


def _types_of_entry(one: Any, key: str) -> list[Any]:
    """Return the types of an entry: a field of a model, or a value of a mapping."""
    kind = _class_of(one)
    if issubclass(kind, BaseModel):
        return [kind.model_fields[key].annotation] if key in kind.model_fields else []
    return [get_args(one)[1] if get_args(one) else Any] if issubclass(kind, Mapping) else []


def _types_of_element(one: Any, number: int) -> list[Any]:
    """Return the types of element ``number`` of a list or tuple."""
    if not _is_structure(one) or issubclass(_class_of(one), Mapping | BaseModel):
        return []
    inner = [argument for argument in get_args(one) if argument is not ...] or [Any]
    return [inner[min(number, len(inner) - 1)]]
