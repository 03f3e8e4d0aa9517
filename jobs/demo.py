"""Fine-tune with full tokens and with Skip-Vision on a local Ray, and print what that saved and cost."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository root, wherever we are started

from pipelines.demo import DemoConfig, run_demo
from pipelines.shared.config import load_config, run_job


def main(argv: list[str]) -> dict[str, object]:
    """Run the demo and return where its results are."""
    return run_demo(load_config(DemoConfig, argv, description=__doc__))


if __name__ == "__main__":
    run_job(main, sys.argv[1:])
