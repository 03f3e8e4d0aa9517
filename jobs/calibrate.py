"""Find the SkipConfig within a budget for your model and data, and verify it on held-out images."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository root, wherever we are started

from pipelines.calibrate.config import CalibrateConfig
from pipelines.calibrate.job import run_calibrate
from pipelines.shared.config import load_config, run_job


def main(argv: list[str]) -> dict[str, object]:
    """Run the calibration and return its results."""
    return run_calibrate(load_config(CalibrateConfig, argv, description=__doc__))


if __name__ == "__main__":
    run_job(main, sys.argv[1:])
