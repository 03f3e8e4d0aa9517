"""The demo: fine-tune with full tokens and with Skip-Vision on a local Ray, compare, and caption images."""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field

from pipelines.cluster.local import local_ray
from pipelines.cluster.session import ROOT
from pipelines.finetune.config import FinetuneConfig
from pipelines.shared.config import load_config
from pipelines.shared.console import say
from pipelines.shared.paths import HOME, output_path

_RUNS = ("demo-full", "demo")
_CAPTIONS = "demo-captions"
_SHOWN = 4
_QUIET = {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
_WIDER = "time_follows_flops --settings 144+144 --layers 4 --batch 2 --dtype float32 --repeats 3"
"""The benchmark of a wider model, with the demo's shares of retained and skipped tokens."""


class DemoConfig(BaseModel):
    """Settings for variations of the demo; the defaults are the demo itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    storage: Path = Field(Path("runs"), description="folder for runs, MLflow's database and the comparison")
    fresh: bool = Field(False, description="delete the demo's earlier runs instead of resuming them")
    wider_model: bool = Field(
        True,
        description="also time prefill and training step of a wider model with random weights, in which time "
        "follows FLOPs more closely than in the demo's small one",
    )
    readme: str | None = Field(
        None, description="file whose demo table is updated, between `<!-- demo table -->` and its end mark"
    )
    overrides: list[str] = Field(
        [], description="options for both fine-tuning jobs, e.g. [--training.max_steps, 20]"
    )


class Step(NamedTuple):
    """A job of the demo: its title, its file in ``jobs/``, its settings, and options on top of them."""

    title: str
    script: str
    settings: str
    options: tuple[str, ...] = ()

    def arguments(self, root: Path) -> list[str]:
        """Return the arguments of the job; ``root`` is the root of the repository."""
        return ["--config", str(root / "jobs/configs" / self.settings), *self.options]


def run_demo(config: DemoConfig) -> dict[str, object]:
    """Draw the data, fine-tune twice, compare, caption, and time a wider model, each as a Ray job.

    This takes eight minutes on two cores.

    Raises:
        ConfigError: the settings are wrong, ``overrides`` included. This comes before Ray starts.
    """
    started = time.monotonic()
    storage = output_path(config.storage, "storage")
    steps = _steps(config, str(storage))
    for step in steps:
        if step.script == "finetune.py":
            load_config(FinetuneConfig, step.arguments(ROOT), description=None)
    if config.fresh:
        for run in (*_RUNS, _CAPTIONS):
            shutil.rmtree(storage / run, ignore_errors=True)
    with local_ray() as ray:
        _log(started, f"Ray runs at {ray.dashboard}")
        for step in steps:
            _log(started, step.title)
            ray.submit(
                ["python", f"jobs/{step.script}", *step.arguments(Path())],
                environment={HOME: os.environ.get(HOME, str(ROOT)), **_QUIET},
            )
        if config.wider_model:
            _log(started, "time a model of width 1024 with random weights: see 'time ÷ FLOPs'")
            ray.submit(
                ["python", "-m", "benchmarks", "run", *_WIDER.split()],
                environment={"PYTHONWARNINGS": "ignore::FutureWarning", **_QUIET},  # PEFT's and transformers'
            )
    _print_captions(storage / _CAPTIONS / "captions")
    _log(started, "done; the demo has stopped its Ray")
    uri = f"sqlite:///{storage / 'mlflow.db'}"
    mlflow = Path(sys.executable).with_name("mlflow")
    say(f"Runs, curves, adapters and the comparison in MLflow: {mlflow} ui --backend-store-uri {uri}")
    return {"storage": str(storage), "mlflow_uri": uri, "seconds": round(time.monotonic() - started)}


def _steps(config: DemoConfig, storage: str) -> list[Step]:
    store = ("--storage", storage)
    tuning = (*store, *config.overrides)
    full, skip = _RUNS
    readme = ("--readme", str(output_path(config.readme, "readme"))) if config.readme else ()
    return [
        Step("draw the data", "make_shapes.py", "shapes_demo.yaml"),
        Step(
            "fine-tune with full tokens",
            "finetune.py",
            "finetune_demo.yaml",
            ("--name", full, "--skip", "null", *tuning),
        ),
        Step("fine-tune with Skip-Vision", "finetune.py", "finetune_demo.yaml", ("--name", skip, *tuning)),
        Step("compare both on test images", "compare.py", "compare_demo.yaml", (*store, *readme)),
        Step(
            "caption a folder with that adapter",
            "caption.py",
            "caption_demo.yaml",
            ("--model.adapter", f"{storage}/{skip}/adapter", *store),
        ),
    ]


def _print_captions(captions: Path) -> None:
    """Print the first few captions."""
    say("")
    for row in pq.read_table(captions).slice(0, _SHOWN).to_pylist():
        say(f"  {row['key']}  {row['text'] or row['error']}")


def _log(started: float, text: str) -> None:
    say(f"\n=== {time.monotonic() - started:4.0f} s  {text}")
