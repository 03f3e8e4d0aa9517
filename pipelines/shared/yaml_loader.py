"""Read YAML without the surprises: ``1e-4`` is a number, a repeated key is an error."""

from __future__ import annotations

import re
from typing import Any

import yaml


class Loader(yaml.SafeLoader):
    """Reads a YAML file without running code from it."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(None, None, f"{key.value!r} is given twice", key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else key)
        return node


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


class ArgumentLoader(Loader):
    """Reads a command-line argument, in which a comment is an error: it would cut the argument short."""

    def scan_to_next_token(self) -> None:
        start, mark = self.index, self.get_mark()
        before = self.pointer
        super().scan_to_next_token()
        if self.index > start and "#" in self.buffer[before : self.pointer]:
            raise yaml.MarkedYAMLError(None, None, "`#` begins a comment: quote the text", mark)


def describe(error: yaml.YAMLError) -> str:
    """Return the problem of the YAML, with line and column if they are known."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return str(error)
    mark, context = error.problem_mark, f" {error.context}" if error.context else ""
    return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}{context}"
