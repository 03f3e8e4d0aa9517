"""Move a registered model's alias to a candidate if it is no worse than the budget allows."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository root, wherever we are started

from pipelines.promote.config import PromoteConfig
from pipelines.promote.job import run_promote
from pipelines.shared.config import load_config, run_job


def main(argv: list[str]) -> dict[str, object]:
    """Decide about the candidate and return the verdict."""
    return run_promote(load_config(PromoteConfig, argv, description=__doc__))


if __name__ == "__main__":
    run_job(main, sys.argv[1:])
