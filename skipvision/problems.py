"""Turn a pydantic `ValidationError` into one line per field: its dotted name, its value, and what to do.

The same report serves `SkipConfig`, the settings of jobs, the endpoint's settings and its API keys.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, PydanticUndefined

from skipvision.errors import ConfigError
from skipvision.registry import Registry

_SECTION_EXPECTED = {"model_type", "model_attributes_type", "dict_type"}
_NAMED_FIELDS = 3


def config_error(error: ValidationError, model: type[BaseModel], values: object) -> ConfigError:
    """Return a `ConfigError` that names every wrong field of ``values``, each on its own line."""
    title = f"{model.__name__}: "
    return ConfigError(title + f"\n{' ' * len(title)}".join(problem_lines(error, model, values, equals="=")))


def problem_lines(
    error: ValidationError,
    model: type[BaseModel],
    tree: object,
    *,
    show_values: bool = True,
    equals: str = " = ",
    all_fields: str | None = None,
) -> list[str]:
    """Return one line for each wrong field of ``model``, as ``name = value: what it should be``.

    The alternatives of a union share a line, joined by "or". A problem of the whole model has no name.

    Args:
        error: what validation raised.
        model: the model that was validated.
        tree: the value that was validated: mappings and lists.
        show_values: whether lines quote values; False for files that hold secrets.
        equals: sign between name and value; "=" for keyword arguments.
        all_fields: advice for a field whose name resembles no other; None = list the fields.
    """
    fields = {field.name: field for field in fields_of(model)}
    advice = all_fields or f"the fields are {', '.join(fields)}"
    lines: dict[str, list[str]] = {}
    for problem in leaf_errors(error.errors()):
        name = field_name(problem, tree)
        subject = f"{name}{equals}{short(problem['input'])}" if name and show_values else name
        for about, complaint in _complaints(problem, name, subject, fields, advice):
            complaints = lines.setdefault(about, [])
            if complaint not in complaints:
                complaints.append(complaint)
    return [
        f"{subject}: {' or '.join(complaints)}" if subject else "; ".join(complaints)
        for subject, complaints in lines.items()
    ]


def leaf_errors(problems: Iterable[ErrorDetails]) -> Iterator[ErrorDetails]:
    """Yield every error at its own location, including those a nested model raised as a `ConfigError`."""
    for problem in problems:
        inner = getattr(problem.get("ctx", {}).get("error"), "__cause__", None)
        if isinstance(inner, ValidationError):
            for detail in leaf_errors(inner.errors()):
                yield {**detail, "loc": (*problem["loc"], *detail["loc"])}
        else:
            yield problem


def field_name(problem: ErrorDetails, tree: Any) -> str:
    """Return the dotted name of the value in ``tree`` that is wrong; "" for the whole tree.

    Pydantic's location also contains the union member that it tried. The dotted name omits it.
    """
    parts = []
    location = problem["loc"]
    for position, part in enumerate(location):
        inside = part in tree if isinstance(tree, dict) else isinstance(tree, list) and isinstance(part, int)
        if inside:
            tree = tree[part]
        elif position < len(location) - 1 or problem["type"] != "missing":
            continue
        parts.append(str(part))
    return ".".join(parts)


def short(value: object) -> str:
    """Return the value's ``repr``, cut to 80 characters."""
    return textwrap.shorten(repr(value), 80, placeholder=" …")


def _complaints(
    problem: ErrorDetails, name: str, subject: str, fields: Mapping[str, Field], advice: str
) -> list[tuple[str, str]]:
    """Return pairs of a subject and a complaint. Some subjects are field names without their value."""
    value, kind = problem["input"], problem["type"]
    if kind == "missing":
        return [(required, "is required") for required in _required(name, fields)]
    if kind == "extra_forbidden":
        return [(subject, f"no such field; {_suggestion(name, list(fields)) or advice}")]
    if kind == "value_error" and isinstance(value, (dict, BaseModel)):
        return [(name, _message(problem))]  # about several fields of a section, which the message names
    if kind in _SECTION_EXPECTED and name in fields:
        return [(subject, _section_expected(value, fields[name], fields))]
    return [(subject, _message(problem))]


def _required(name: str, fields: Mapping[str, Field]) -> list[str]:
    """Return the field itself or, if it is a section, the fields it requires."""
    inside = [n for n, f in fields.items() if n.startswith(f"{name}.") and f.default is PydanticUndefined]
    if any(n.startswith(f"{name}.*") for n in inside):  # a list or mapping, which may be empty
        return [name]
    return inside or [name]


def _section_expected(value: object, section: Field, fields: Mapping[str, Field]) -> str:
    inside = [name for name in fields if name.startswith(f"{section.name}.")]
    listed = ", ".join(inside[:_NAMED_FIELDS]) + (" …" if len(inside) > _NAMED_FIELDS else "")
    if NoneType not in get_args(section.annotation):
        return f"should be a section with the fields {listed}"
    meant = "; did you mean null?" if get_close_matches(str(value), ["null"]) else ""
    return f"should be null or a section with the fields {listed}{meant}"


def _message(problem: ErrorDetails) -> str:
    cause = problem.get("ctx", {}).get("error")
    return str(cause) if isinstance(cause, Exception) else problem["msg"].replace("Input should", "should", 1)


def _suggestion(name: str, known: Sequence[str]) -> str | None:
    """Suggest the same word in another section, or the nearest spelling."""
    last = name.rpartition(".")[2]
    same = [field for field in known if field.rpartition(".")[2] == last]
    near = same or get_close_matches(name, [n for n in known if not name.startswith(f"{n}.")], n=1)
    return f"did you mean {near[0]}?" if near else None


# -------------------------------------------------------------------------------- the fields of a model


class Field(NamedTuple):
    """One field of a model or of a section inside it.

    Attributes:
        name: dotted name; ``*`` is any element of a list or mapping.
        annotation: its type.
        default: its default; ``PydanticUndefined`` if it is required.
        description: for users; may be empty.
    """

    name: str
    annotation: Any
    default: Any
    description: str


def fields_of(model: type[BaseModel], prefix: str = "", values: BaseModel | None = None) -> Iterator[Field]:
    """Yield every field of ``model`` and of its sections; ``values``, if given, holds the defaults."""
    for name, info in model.model_fields.items():
        default = getattr(values, name) if values is not None else info.get_default(call_default_factory=True)
        choices = next((tuple(one) for one in info.metadata if isinstance(one, Registry)), None)
        annotation = info.annotation if choices is None else Literal[choices]
        yield Field(prefix + name, annotation, default, info.description or "")
        for section, path in models_in(info.annotation):
            own = default if type(default) is section else None
            yield from fields_of(section, f"{prefix}{name}{path}.", own)


def models_in(annotation: Any, path: str = "") -> Iterator[tuple[type[BaseModel], str]]:
    """Yield the models in an annotation, each with its path: ``""``, or ``".*"`` in a list or mapping."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, path
    deeper = path if get_origin(annotation) in (Union, UnionType) else f"{path}.*"
    for argument in get_args(annotation):
        yield from models_in(argument, deeper)
