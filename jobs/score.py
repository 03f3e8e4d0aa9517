"""Score models, adapters and SkipConfigs on benchmarks, and compare each with full tokens, item by item."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository root, wherever we are started

from pipelines.score.config import ScoreConfig
from pipelines.score.job import run_score
from pipelines.shared.config import load_config, run_job


def main(argv: list[str]) -> dict[str, object]:
    """Score, continue or report the job."""
    return run_score(load_config(ScoreConfig, argv, description=__doc__))


if __name__ == "__main__":
    run_job(main, sys.argv[1:])
