"""Caption a data set of images with Skip-Vision on Ray Data. The same command continues a stopped job."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository root, wherever we are started

from pipelines.caption.config import CaptionConfig
from pipelines.caption.job import run_caption
from pipelines.shared.config import load_config, run_job


def main(argv: list[str]) -> dict[str, object]:
    """Caption, continue or report the job."""
    return run_caption(load_config(CaptionConfig, argv, description=__doc__))


if __name__ == "__main__":
    run_job(main, sys.argv[1:])
