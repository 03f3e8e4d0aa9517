"""Describe the fields of a job's settings, for ``--help``, and list the defaults of its sections."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from skipvision.problems import fields_of, models_in

_MAX_DEFAULT = 80
"""Characters of a default that fit next to the field's name; a longer one follows the description."""


def section_defaults(model: type[BaseModel]) -> dict[str, Any]:
    """Return the defaults of the sections that are not null by default, as the mappings of a YAML file."""
    tree: dict[str, Any] = {}
    for name, info in model.model_fields.items():
        default = info.get_default(call_default_factory=True)
        if isinstance(default, BaseModel) and len(list(models_in(info.annotation))) == 1:
            tree[name] = default.model_dump()
    return tree


def _type_name(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return " | ".join(repr(choice) for choice in get_args(annotation))
    if get_origin(annotation) is Annotated:
        return _type_name(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return " | ".join(_type_name(member) for member in get_args(annotation))
    if annotation is type(None):
        return "null"
    if get_args(annotation):
        inner = ", ".join(_type_name(argument) for argument in get_args(annotation) if argument is not ...)
        return f"{_type_name(get_origin(annotation))} of {inner}"
    if isinstance(annotation, type):
        return "section" if issubclass(annotation, BaseModel) else annotation.__name__.lower()
    return str(annotation)


def help_text(model: type[BaseModel], description: str | None) -> str:
    """Return the usage line, ``description`` and every field with its type, default and description."""
    lines = [
        f"usage: {Path(sys.argv[0]).name} [--config FILE] [--FIELD VALUE ...]",
        *("", (description or "").strip()),
        *("", "Fields, nested in the YAML file where a name has dots; * is any element:", ""),
    ]
    for field in fields_of(model):
        default = _default_note(field.default)
        late = len(default) > _MAX_DEFAULT
        lines.append(f"  {field.name}    {_type_name(field.annotation)}{'' if late else default}")
        lines += _indented(field.description)
        lines += _indented(default.removeprefix(", ")) if late else []
    return "\n".join(lines)


def _indented(text: str) -> list[str]:
    indent = " " * 8
    return textwrap.wrap(text, 100, initial_indent=indent, subsequent_indent=indent, break_long_words=False)


def _default_note(default: Any) -> str:
    if default is PydanticUndefined:
        return ", required"
    if isinstance(default, BaseModel):
        return ""
    return f", default {_as_yaml(default)}"


def _as_yaml(value: Any) -> str:
    """Return a default as a user would type it in the YAML file, on one line."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, str):
        return repr(value)
    if isinstance(value, Mapping):
        value = {
            name: one.model_dump(mode="json", exclude_defaults=True) if isinstance(one, BaseModel) else one
            for name, one in value.items()
        }
    text = yaml.safe_dump(value, default_flow_style=True, width=sys.maxsize, sort_keys=False)
    return text.removesuffix("...\n").strip()
