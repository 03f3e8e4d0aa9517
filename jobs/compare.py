"""Compare two finished fine-tuning runs, full tokens against Skip-Vision, on test rows."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository root, wherever we are started

from pipelines.compare.config import CompareConfig
from pipelines.compare.job import run_compare
from pipelines.shared.config import load_config, run_job


def main(argv: list[str]) -> dict[str, object]:
    """Run the comparison and return its results."""
    return run_compare(load_config(CompareConfig, argv, description=__doc__))


if __name__ == "__main__":
    run_job(main, sys.argv[1:])
