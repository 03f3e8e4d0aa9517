"""Write a shapes data set: real image files and LLaVA JSON for training, validation and test."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository root, wherever we are started

from pipelines.shapes.files import ShapesConfig, write_shapes
from pipelines.shared.config import load_config, run_job


def main(argv: list[str]) -> dict[str, object]:
    """Write the data set and return its numbers of rows and images."""
    return write_shapes(load_config(ShapesConfig, argv, description=__doc__ or ""))


if __name__ == "__main__":
    run_job(main, sys.argv[1:])
