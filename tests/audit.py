"""Audit the installed packages against the advisory database, as `make lint` does: ``python -m tests.audit``.

A package with a known vulnerability fails it. It needs the network; where the database cannot be reached, or
knows none of the packages, it prints that it was skipped and succeeds.
"""

from __future__ import annotations

import json
import subprocess
import sys

_SECONDS = 300
_UNREACHABLE = ("ConnectionError", "ConnectTimeout", "ServiceError", "Max retries", "ProxyError", "SSLError")
_COMMAND = [
    sys.executable,
    "-m",
    "pip_audit",
    "--format",
    "json",
    "--progress-spinner",
    "off",
    "--skip-editable",
]


def audit(command: list[str], seconds: float = _SECONDS) -> int:
    """Run pip-audit with JSON output. Return 0 unless it fails or knows a package to be vulnerable."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return _skipped(f"no answer of the advisory database within {seconds:g} s")
    try:
        packages = json.loads(run.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        last = (run.stdout + run.stderr).strip().splitlines()[-1:]
        if any(word in run.stderr for word in _UNREACHABLE):
            return _skipped(f"the advisory database cannot be reached ({''.join(last)})")
        print("pip-audit failed:", *last)
        return run.returncode or 1
    known = [package for package in packages if "vulns" in package]
    if not known:
        return _skipped(f"the advisory database knows none of the {len(packages)} packages")
    found = [(package, flaw) for package in known for flaw in package["vulns"]]
    for package, flaw in found:
        fixed = ", ".join(flaw["fix_versions"]) or "no version yet"
        print(f"{package['name']} {package['version']}: {flaw['id']}, fixed in {fixed}")
    unknown = len(packages) - len(known)
    print(f"pip-audit: {len(found)} vulnerabilities in {len(known)} packages; {unknown} packages are unknown")
    return 1 if found else 0


def _skipped(reason: str) -> int:
    print(f"pip-audit SKIPPED: {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(audit([*_COMMAND, *sys.argv[1:]]))
