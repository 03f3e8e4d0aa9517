"""How every job is configured and run: one YAML file, dotted overrides, one JSON line of results.

A job is a file in ``jobs/`` and looks like this::

    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository root, wherever we are started

    from pipelines.shared.config import load_config, run_job
    from pipelines.finetune.job import FinetuneConfig, finetune

    def main(argv: list[str]) -> dict[str, object]:
        return finetune(load_config(FinetuneConfig, argv, description=__doc__))

    if __name__ == "__main__":
        run_job(main, sys.argv[1:])

The line with ``sys.path`` is there because ``python jobs/finetune.py`` starts with ``jobs/`` on the
path and not with the root. It holds from any working directory, and inside ``ray job submit
--working-dir .``, where the root is the uploaded copy. Ray workers get the root from the runtime
environment of the Ray they belong to, not from here.
"""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, PydanticUndefined, to_json

from pipelines.shared.stopping import stoppable
from skipvision.errors import ConfigError, SkipVisionError

M = TypeVar("M", bound=BaseModel)

_TEXT_EXPECTED = {"string_type", "path_type"}
"""The validation errors of a field that takes text and was given, say, the number 2026."""
_SECTION_EXPECTED = {"model_type", "model_attributes_type", "dict_type"}
_NAMED_FIELDS = 3


def load_config(model: type[M], argv: Sequence[str], *, description: str | None) -> M:
    """The job's settings: the model's defaults, then ``--config FILE``, then ``--dotted.field VALUE``.

    A section that is given in part keeps the rest of its defaults; a list is replaced whole. Values on
    the command line are YAML. ``--help`` prints every field and exits. Everything that is wrong with the
    settings is reported in one `ConfigError`.
    """
    options = _parse_options(argv)
    if "help" in options:
        print(_help(model, description))
        raise SystemExit(0)
    file = options.pop("config", None)
    tree = _section_defaults(model)
    if file is not None:
        _merge(tree, _read_mapping(Path(file)))
    for name, text in options.items():
        _set(tree, name, _parse_value(name, text))
    try:
        return _validate(model, tree, options)
    except ValidationError as error:
        problems = _problems(model, tree, error)
        count = "one problem" if len(problems) == 1 else f"{len(problems)} problems"
        sources = (
            " and ".join(filter(None, [file, "the command line" if options else None])) or "the defaults"
        )
        raise ConfigError(f"{count} in the settings from {sources}\n" + "\n".join(problems)) from None


def run_job(main: Callable[[list[str]], Mapping[str, object]], argv: Sequence[str]) -> None:
    """Run a job's ``main`` and print its results as one JSON line, the last of standard output.

    An error of our own is a message on standard error without a traceback, and exit status 2 if the
    settings are to blame, 1 if not. Any other exception is a bug and keeps its traceback (status 1).
    SIGTERM, SIGHUP and Ctrl-C let the job clean up as after an error; the status is 128 + the signal.
    """
    with stoppable() as stop:
        try:
            results = main(list(argv))
        except KeyboardInterrupt:
            raise SystemExit(stop.exit_status) from None
        except SkipVisionError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2 if isinstance(error, ConfigError) else 1) from None
    print(to_json(dict(results), inf_nan_mode="null", ensure_ascii=True, fallback=str).decode(), flush=True)


# ----------------------------------------------------------------------------------- reading settings


class _Loader(yaml.SafeLoader):
    """YAML as people mean it: ``1e-4`` is a number, and a key that is given twice is an error."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(None, None, f"{key.value!r} is given twice", key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else key)
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _parse_options(argv: Sequence[str]) -> dict[str, str]:
    """``--name value`` and ``--name=value`` as a mapping; the last of a repeated name counts."""
    options: dict[str, str] = {}
    words = iter(argv)
    for word in words:
        if word in ("--help", "-h"):
            return {"help": ""}
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not all(name.split(".")):
            raise ConfigError(f"{word!r} is not an option: write --config FILE or --dotted.field VALUE")
        if not equals:
            value = next(words, "--")
            if value.startswith("--"):
                raise ConfigError(f"--{name} has no value: write --{name} VALUE or --{name}=VALUE")
        options[name] = value
    return options


def _read_mapping(file: Path) -> dict[str, Any]:
    try:
        content = yaml.load(file.read_bytes(), _Loader)  # noqa: S506 — a SafeLoader
    except OSError as error:
        raise ConfigError(f"cannot read {file} (in {Path.cwd()}): {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is not valid YAML: {_yaml_problem(error)}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{file} must hold `field: value` lines, not a {type(content).__name__}")
    return content


def _parse_value(name: str, text: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # noqa: S506 — a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(f"--{name} {text!r} is not valid YAML: {_yaml_problem(error)}") from None


def _yaml_problem(error: yaml.YAMLError) -> str:
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return str(error)
    mark, context = error.problem_mark, f" {error.context}" if error.context else ""
    return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}{context}"


def _merge(tree: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Lay ``changes`` over ``tree``, section by section."""
    for name, value in changes.items():
        if isinstance(value, dict) and isinstance(tree.get(name), dict):
            _merge(tree[name], value)
        else:
            tree[name] = value


def _set(tree: dict[str, Any], name: str, value: Any) -> None:
    """Set the dotted field; sections on the way that are missing or null come into being."""
    *sections, field = name.split(".")
    for depth, section in enumerate(sections, start=1):
        if tree.get(section) is None:
            tree[section] = {}
        if not isinstance(tree[section], dict):
            outer = ".".join(sections[:depth])
            raise ConfigError(
                f"--{name}: {outer} is {_short(tree[section])}, which has no fields; set --{outer}"
            )
        tree = tree[section]
    _merge(tree, {field: value})


def _get(tree: Any, name: str) -> Any:
    for part in name.split("."):
        tree = tree[part]
    return tree


def _validate(model: type[M], tree: dict[str, Any], options: Mapping[str, str]) -> M:
    """Validate; a text field that was set on the command line takes the words as they were typed."""
    try:
        return model.model_validate(tree, extra="forbid")
    except ValidationError as error:
        typed = {
            field_name(problem, tree)
            for problem in details(error.errors())
            if problem["type"] in _TEXT_EXPECTED
        }
        typed = {name for name in typed & options.keys() if _get(tree, name) is not None}
        if not typed:
            raise
    for name in typed:
        _set(tree, name, options[name])
    return model.model_validate(tree, extra="forbid")


# ---------------------------------------------------------------------------------- reporting problems


def _problems(model: type[BaseModel], tree: Mapping[str, Any], error: ValidationError) -> list[str]:
    """One line for each field that is wrong; the alternatives of a union are joined by "or"."""
    fields = {field.name: field for field in _fields(model)}
    lines: dict[str, list[str]] = {}
    for problem in details(error.errors()):
        name = field_name(problem, tree)
        if problem["type"] == "missing":
            found = [(one, "is required") for one in _required(name, fields)]
        elif problem["type"] == "extra_forbidden":
            found = [(name, f"there is no such field{_suggestion(name, list(fields))}")]
        elif isinstance(problem["input"], dict) and problem["type"] == "value_error":
            found = [(name or "together", _complaint(problem))]
        elif problem["type"] in _SECTION_EXPECTED and name in fields:
            found = [(f"{name} = {_short(problem['input'])}", _no_section(problem["input"], name, fields))]
        else:
            found = [(f"{name} = {_short(problem['input'])}", _complaint(problem))]
        for subject, complaint in found:
            complaints = lines.setdefault(subject, [])
            if complaint not in complaints:
                complaints.append(complaint)
    return [f"  {subject}: {' or '.join(complaints)}" for subject, complaints in lines.items()]


def details(problems: Iterable[ErrorDetails]) -> Iterator[ErrorDetails]:
    """Every problem in its place, also those that a section has raised as a `ConfigError` of its own."""
    for problem in problems:
        inner = getattr(problem.get("ctx", {}).get("error"), "__cause__", None)
        if isinstance(inner, ValidationError):
            for detail in details(inner.errors()):
                yield {**detail, "loc": (*problem["loc"], *detail["loc"])}
        else:
            yield problem


def _required(name: str, fields: Mapping[str, _Field]) -> list[str]:
    """What is missing where ``name`` is: the field itself, or a section's required fields."""
    inside = [n for n, f in fields.items() if n.startswith(f"{name}.") and f.default is PydanticUndefined]
    return inside or [name]


def _no_section(value: object, name: str, fields: Mapping[str, _Field]) -> str:
    inside = [other for other in fields if other.startswith(f"{name}.")]
    listed = ", ".join(inside[:_NAMED_FIELDS]) + (" …" if len(inside) > _NAMED_FIELDS else "")
    if "null" not in fields[name].type.split(" | "):
        return f"should be a section with the fields {listed}"
    meant = "; did you mean null?" if get_close_matches(str(value), ["null"]) else ""
    return f"should be null or a section with the fields {listed}{meant}"


def field_name(problem: ErrorDetails, tree: Any) -> str:
    """Where in ``tree`` a validation error is, with dots, without pydantic's names of a union's members."""
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


def _complaint(problem: ErrorDetails) -> str:
    cause = problem.get("ctx", {}).get("error")
    return str(cause) if cause is not None else problem["msg"].replace("Input should", "should", 1)


def _suggestion(name: str, known: Sequence[str]) -> str:
    """The known field that was probably meant: the same word in another section, or the nearest spelling."""
    last = name.rpartition(".")[2]
    same = [field for field in known if field.rpartition(".")[2] == last]
    near = same or get_close_matches(name, [n for n in known if not name.startswith(f"{n}.")], n=1)
    return f"; did you mean {near[0]}?" if near else "; --help lists the fields"


def _short(value: object) -> str:
    return textwrap.shorten(repr(value), 80, placeholder=" …")


# ------------------------------------------------------------------------------------ describing fields


class _Field(NamedTuple):
    name: str
    type: str
    default: Any
    description: str


def _fields(model: type[BaseModel], prefix: str = "", values: BaseModel | None = None) -> Iterator[_Field]:
    """Every field below ``model``; defaults are taken from ``values`` where a section has its own."""
    for name, info in model.model_fields.items():
        default = getattr(values, name) if values is not None else info.get_default(call_default_factory=True)
        yield _Field(prefix + name, _type_name(info.annotation), default, info.description or "")
        for section, path in _models_in(info.annotation):
            yield from _fields(
                section, f"{prefix}{name}{path}.", default if type(default) is section else None
            )


def _models_in(annotation: Any, path: str = "") -> Iterator[tuple[type[BaseModel], str]]:
    """The models an annotation mentions, and where: ``""`` or, inside a list or mapping, ``".*"``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, path
    deeper = path if get_origin(annotation) in (Union, UnionType) else f"{path}.*"
    for argument in get_args(annotation):
        yield from _models_in(argument, deeper)


def _section_defaults(model: type[BaseModel]) -> dict[str, Any]:
    """The defaults of the sections that are there by default, as the mappings a file would hold."""
    tree: dict[str, Any] = {}
    for name, info in model.model_fields.items():
        default = info.get_default(call_default_factory=True)
        if isinstance(default, BaseModel) and len(list(_models_in(info.annotation))) == 1:
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


def _help(model: type[BaseModel], description: str | None) -> str:
    lines = [
        f"usage: {Path(sys.argv[0]).name} [--config FILE] [--FIELD VALUE ...]",
        *("", (description or "").strip()),
        *("", "Fields, nested in the YAML file where a name has dots; * stands for any element:", ""),
    ]
    for field in _fields(model):
        lines.append(f"  {field.name}    {field.type}{_default_note(field.default)}")
        lines += textwrap.wrap(field.description, 100, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return "\n".join(lines)


def _default_note(default: Any) -> str:
    if default is PydanticUndefined:
        return ", required"
    if isinstance(default, BaseModel):
        return ""
    return f", default {default if isinstance(default, Path) else _short(default)}"
