"""Check names for MLflow with the other settings: MLflow refuses them only after the work is done."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator

_MAX_LENGTH = 255
"""Characters of a name. MLflow's databases have columns of 256."""


def _experiment(name: str) -> str:
    return _checked(name)


def _model(name: str) -> str:
    _checked(name)
    if found := re.search(r"""[/:@?'"]""", name):
        raise ValueError(
            f"a registered model's name must not contain {found[0]!r}, because it is part of addresses such "
            "as models:/NAME@ALIAS: choose another name"
        )
    if name == "." or name.startswith(".."):
        raise ValueError("MLflow does not accept a registered model of this name: choose another name")
    return name


def _alias(name: str) -> str:
    _checked(name)
    if not re.fullmatch(r"[\w-]+", name):
        raise ValueError("an alias consists of letters, digits, underscores and dashes")
    if re.fullmatch(r"latest|v\d+", name, re.IGNORECASE):
        raise ValueError(
            "MLflow reserves `latest`, and `v` with a number, for versions: choose another alias"
        )
    return name


def _checked(name: str) -> str:
    if not name.strip():
        raise ValueError("should not be empty")
    if len(name) > _MAX_LENGTH:
        raise ValueError(f"has {len(name)} characters; MLflow accepts {_MAX_LENGTH}")
    if not name.isprintable():
        raise ValueError("should not contain line breaks or control characters")
    return name


ExperimentName = Annotated[str, AfterValidator(_experiment)]
"""Name of an MLflow experiment."""

ModelName = Annotated[str, AfterValidator(_model)]
"""Name of a registered model, the NAME of ``models:/NAME@ALIAS``."""

AliasName = Annotated[str, AfterValidator(_alias)]
"""Alias of a version of a registered model."""
