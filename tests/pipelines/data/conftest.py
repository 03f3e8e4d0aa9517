"""A folder for tests of permissions, which root does not have to obey."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

_NOBODY = 65534


@pytest.fixture
def unprivileged():
    """Yield a folder, while this process has the rights of an ordinary user."""
    folder = Path(tempfile.mkdtemp(prefix="skipvision-test-"))
    folder.chmod(0o777)
    root = os.geteuid() == 0
    if root:
        os.seteuid(_NOBODY)
    try:
        yield folder
    finally:
        if root:
            os.seteuid(0)
        for path in [folder, *folder.rglob("*")]:
            if path.is_dir() and not path.is_symlink():
                path.chmod(0o700)
        shutil.rmtree(folder)
