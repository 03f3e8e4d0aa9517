"""Train the small base model on shapes from scratch: about an hour on two recent CPU cores, resumable."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository root, wherever we are started

from pipelines.shapes.base.config import BaseModelConfig
from pipelines.shapes.base.model import train_base_model
from pipelines.shared.config import load_config, run_job


def main(argv: list[str]) -> dict[str, object]:
    """Train the base model and return its accuracy."""
    return train_base_model(load_config(BaseModelConfig, argv, description=__doc__))


if __name__ == "__main__":
    run_job(main, sys.argv[1:])
