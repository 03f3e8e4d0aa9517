"""Fine-tune a vision-language model with LoRA and Skip-Vision on Ray Train, tracked in MLflow."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository root, wherever we are started

from pipelines.finetune.config import FinetuneConfig
from pipelines.finetune.job import run_finetune
from pipelines.shared.config import load_config, run_job


def main(argv: list[str]) -> dict[str, object]:
    """Train, resume or report the run."""
    return run_finetune(load_config(FinetuneConfig, argv, description=__doc__))


if __name__ == "__main__":
    run_job(main, sys.argv[1:])
