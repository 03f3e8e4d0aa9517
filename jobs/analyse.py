"""Measure what the FFN does to visual tokens, and bound and measure the error of skipping it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository root, wherever we are started

from pipelines.analyse.config import AnalyseConfig
from pipelines.analyse.job import run_analyse
from pipelines.shared.config import load_config, run_job


def main(argv: list[str]) -> dict[str, object]:
    """Run the analysis and return its results."""
    return run_analyse(load_config(AnalyseConfig, argv, description=__doc__))


if __name__ == "__main__":
    run_job(main, sys.argv[1:])
