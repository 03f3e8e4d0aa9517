"""Configure and run a job: one YAML file, dotted overrides, one JSON line of results.

A job is a file in ``jobs/`` and looks like this::

    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository root

    from pipelines.finetune.config import FinetuneConfig
    from pipelines.finetune.job import run_finetune
    from pipelines.shared.config import load_config, run_job

    def main(argv: list[str]) -> dict[str, object]:
        return run_finetune(load_config(FinetuneConfig, argv, description=__doc__))

    if __name__ == "__main__":
        run_job(main, sys.argv[1:])

``python jobs/finetune.py`` puts ``jobs/`` on the path, not the root: hence the line with ``sys.path``. It
works from any directory and in the copy that ``ray job submit --working-dir .`` uploads. Ray's workers get
the root from Ray's runtime environment.

The file and the command line are read here, not by pydantic-settings. With its YAML and command-line sources
(2.16), 34 of the 58 tests of this module fail: it ignores a missing file and keys given twice, reads ``1e-4``
as text, takes JSON instead of YAML on the command line, and stops at the first option that it does not know,
so misspelt options are not reported with the other problems.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import to_json

from pipelines.shared.arguments import read_argument
from pipelines.shared.fields import help_text, section_defaults
from pipelines.shared.files import is_storage_error, storage_error
from pipelines.shared.proxies import bypass_proxies_on_loopback
from pipelines.shared.settings import merge, set_field
from pipelines.shared.stopping import stoppable
from pipelines.shared.yaml_loader import Loader, describe
from skipvision.errors import ConfigError, SkipVisionError
from skipvision.files import check_regular
from skipvision.problems import problem_lines

M = TypeVar("M", bound=BaseModel)


def load_config(model: type[M], argv: Sequence[str], *, description: str | None) -> M:
    """Return the settings: the model's defaults, then ``--config FILE``, then ``--dotted.field VALUE``.

    A section given in part keeps its other defaults; a list is replaced whole. `read_argument` reads a value
    of the command line: text literally, lists and sections as YAML. ``--help`` prints every field and exits.

    Raises:
        ConfigError: the settings are wrong; the message lists every problem.
    """
    options = _parse_options(argv)
    if "help" in options:
        print(help_text(model, description))
        raise SystemExit(0)
    file = options.pop("config", None)
    tree = section_defaults(model)
    if file is not None:
        merge(tree, _read_mapping(Path(file)))
    for name, text in options.items():
        set_field(tree, name, read_argument(model, name, text))
    try:
        return model.model_validate(tree, extra="forbid")
    except ValidationError as error:
        problems = problem_lines(error, model, tree, all_fields="--help lists the fields")
        count = "one problem" if len(problems) == 1 else f"{len(problems)} problems"
        sources = (
            " and ".join(filter(None, [file, "the command line" if options else None])) or "the defaults"
        )
        raise ConfigError(
            f"{count} in the settings from {sources}\n" + "\n".join(f"  {line}" for line in problems)
        ) from None


def run_job(main: Callable[[list[str]], Mapping[str, object]], argv: Sequence[str]) -> None:
    """Run a job's ``main`` and print its results as one JSON line, the last line of standard output.

    A `SkipVisionError` is printed to standard error without a traceback; the exit status is 2 for wrong
    settings (`ConfigError`) and 1 for others. An `OSError` of a full disk or of missing permissions is
    reported in the same way (status 1). Any other exception is a bug and keeps its traceback (status 1). On
    SIGTERM, SIGHUP and Ctrl-C the job cleans up; the status is 128 + the signal's number.
    """
    bypass_proxies_on_loopback()
    with stoppable() as stop:
        try:
            results = main(list(argv))
        except KeyboardInterrupt:
            raise SystemExit(stop.exit_status) from None
        except SkipVisionError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2 if isinstance(error, ConfigError) else 1) from None
        except OSError as error:
            if not is_storage_error(error):
                raise
            print(f"error: {storage_error(error, error.filename or 'a file', 'use')}", file=sys.stderr)
            raise SystemExit(1) from None
    print(to_json(dict(results), inf_nan_mode="null", ensure_ascii=True, fallback=str).decode(), flush=True)


# ----------------------------------------------------------------------------------- reading settings


def _parse_options(argv: Sequence[str]) -> dict[str, str]:
    """Parse ``--name value`` and ``--name=value``; the last value of a repeated name counts."""
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
        check_regular(file, or_descriptor=True)
        content = yaml.load(file.read_bytes(), Loader)  # noqa: S506 — a SafeLoader
    except OSError as error:
        raise ConfigError(f"cannot read {file} (in {Path.cwd()}): {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is not valid YAML: {describe(error)}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{file} must have `field: value` lines; it holds a {type(content).__name__}")
    return content
