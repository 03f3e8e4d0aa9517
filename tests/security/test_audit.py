"""``make lint`` audits the dependencies where the network allows it, and never skips that in silence."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.audit import audit

ROOT = Path(__file__).parents[2]
SOUND = {"name": "torch", "version": "3", "vulns": []}
UNKNOWN = {"name": "mine", "skip_reason": "Dependency not found on PyPI"}
FLAWED = {
    "name": "pillow",
    "version": "1",
    "vulns": [{"id": "CVE-2021-1", "fix_versions": ["2"], "aliases": []}],
}


def prints(*packages: dict) -> str:
    return f"print({json.dumps({'dependencies': packages, 'fixes': []})!r})"


@pytest.mark.parametrize(
    ("program", "status", "printed"),
    [
        (prints(SOUND, UNKNOWN), 0, "0 vulnerabilities in 1 packages; 1 packages are unknown"),
        (prints(SOUND, FLAWED) + "; exit(1)", 1, "pillow 1: CVE-2021-1, fixed in 2"),
        (prints(UNKNOWN), 0, "pip-audit SKIPPED: the advisory database knows none of the 1 packages"),
        (
            "raise ConnectionError('pypi.org')",
            0,
            "pip-audit SKIPPED: the advisory database cannot be reached",
        ),
        ("import time; time.sleep(60)", 0, "pip-audit SKIPPED: no answer"),
        ("import sys; sys.exit('no such option')", 1, "pip-audit failed: no such option"),
    ],
)
def test_only_a_database_that_does_not_answer_is_skipped(program, status, printed, capsys):
    assert audit([sys.executable, "-c", program], seconds=5) == status
    assert printed in capsys.readouterr().out


def test_lint_runs_the_audit():
    assert "-m tests.audit" in (ROOT / "Makefile").read_text()
