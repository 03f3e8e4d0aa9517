"""Check the regular expressions of an adapter before PEFT applies them.

An adapter may choose its modules by regular expressions. Some need exponential time to reject a name, and
Python cannot stop a match in a thread. They are therefore tried in another process, which can be killed.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from skipvision.errors import AdapterError

PATTERN_SECONDS = 5.0
"""Limit on matching all patterns with all names of modules, which usually takes milliseconds (s)."""

_WHOLE = ("target_modules", "exclude_modules", "target_parameters", "modules_to_save")
"""Fields that are regular expressions for whole names if they are texts."""
_BY_NAME = ("rank_pattern", "alpha_pattern")
"""Mappings whose keys are regular expressions that match the end of a name."""
_LAYERS = "layers_pattern"
_PROGRAM = """
import json, re, sys
patterns, names = json.load(sys.stdin)
try:
    for pattern in patterns:
        compiled = re.compile(pattern)
        for name in names:
            compiled.fullmatch(name)
except (re.error, OverflowError, RecursionError) as error:
    print(f"{pattern!r} is not a regular expression: {error}"[:500])
else:
    print("fine")
"""


def check_patterns(config: Path, names: Iterable[str]) -> None:
    """Try the regular expressions of PEFT's config with the names of a model's modules.

    Args:
        config: PEFT's ``adapter_config.json``; ignored if it does not exist.
        names: names of modules.

    Raises:
        AdapterError: one is invalid, or they take too long.
    """
    if not config.exists():
        return
    patterns = _patterns(json.loads(config.read_text()))
    if not any(re.search(r"[*+{\\(\[?]", pattern) for pattern in patterns):
        return
    command = [sys.executable, "-I", "-S", "-c", _PROGRAM]
    given = json.dumps([patterns, list(names)])
    try:
        # Not by the exit code: Ray's workers ignore the ends of their children.
        answer = subprocess.run(
            command, input=given, capture_output=True, text=True, timeout=PATTERN_SECONDS, check=False
        ).stdout.strip()
    except subprocess.TimeoutExpired:
        answer = (
            f"its regular expressions ({', '.join(patterns)[:200]}) take more than {PATTERN_SECONDS:g} s to "
            "match the names of this model's modules: list the names instead"
        )
    if answer != "fine":
        raise AdapterError(f"{config}: {answer or 'its regular expressions cannot be tried'}")


def _patterns(fields: dict[str, Any]) -> list[str]:
    whole = [fields[name] for name in _WHOLE if isinstance(fields.get(name), str)]
    layers = fields.get(_LAYERS) or []
    layers = [layers] if isinstance(layers, str) else layers
    keys = [key for name in _BY_NAME if isinstance(fields.get(name), dict) for key in fields[name]]
    return [
        *whole,
        *(rf"(.*\.)?({key})" for key in keys),
        *(rf".*\.[^.]*\.{layer}\.(\d+)(\..*)?" for layer in layers if isinstance(layer, str)),
    ]
