"""Measure accuracy against cost for Skip-Vision and for baselines at equal FLOPs; draw a table and curves."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository root, wherever we are started

from pipelines.shared.config import load_config, run_job
from pipelines.tradeoff.config import TradeoffConfig
from pipelines.tradeoff.job import run_tradeoff


def main(argv: list[str]) -> dict[str, object]:
    """Run the trade-off and return its results."""
    return run_tradeoff(load_config(TradeoffConfig, argv, description=__doc__))


if __name__ == "__main__":
    run_job(main, sys.argv[1:])
