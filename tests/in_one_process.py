"""Run the ``--help`` of many programs in one process, which imports the frameworks once."""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import subprocess
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve()


class Help(NamedTuple):
    """The exit status and the output of one program."""

    status: int
    text: str


def helps(programs: Iterable[str], folder: Path, *, modules: bool = False) -> dict[str, Help]:
    """Return the help of each program, run in ``folder``.

    Args:
        programs: paths of scripts; with ``modules``, names of modules, some with a subcommand.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, str(HERE), "modules" if modules else "scripts", *programs]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {name: Help(*each) for name, each in json.loads(done.stdout).items()}


def _help(program: str, modules: bool) -> Help:
    name, *subcommand = program.split(" ") if modules else [program]
    path, sys.argv = list(sys.path), [name, *subcommand, "--help"]
    # As Python itself does: the current folder for a module, that of the file for a script.
    sys.path[0] = str(Path.cwd()) if modules else str(Path(name).parent)
    status, out = 0, io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            run = runpy.run_module if modules else runpy.run_path
            run(name, run_name="__main__")
        except SystemExit as end:
            status = int(end.code or 0)
        except BaseException:
            status = 1
            traceback.print_exc()
    sys.path[:] = path
    return Help(status, out.getvalue())


if __name__ == "__main__":
    kind, *names = sys.argv[1:]
    found = {name: _help(name, kind == "modules") for name in names}
    print(json.dumps(found))
