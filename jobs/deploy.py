"""Deploy the OpenAI-compatible endpoint on Ray Serve, on a running cluster or on this machine."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository root, wherever we are started

from pipelines.shared.config import load_config, run_job
from serve.config import ServeConfig
from serve.deploy import run_deploy


def main(argv: list[str]) -> dict[str, object]:
    """Deploy the endpoint. Without a cluster, run it until Ctrl-C or SIGTERM."""
    return run_deploy(load_config(ServeConfig, argv, description=__doc__))


if __name__ == "__main__":
    run_job(main, sys.argv[1:])
