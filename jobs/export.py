"""Export base model and adapter as one folder that transformers, skipvision and vLLM load."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository root, wherever we are started

from pipelines.export.config import ExportConfig
from pipelines.export.job import run_export
from pipelines.shared.config import load_config, run_job


def main(argv: list[str]) -> dict[str, object]:
    """Run the export and return its results."""
    return run_export(load_config(ExportConfig, argv, description=__doc__))


if __name__ == "__main__":
    run_job(main, sys.argv[1:])
