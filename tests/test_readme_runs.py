"""The Python and the commands of the README and the user pages run, in a folder of their own."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from pipelines.cluster.local import local_ray

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "docs/library.md", "docs/finetuning.md", "docs/captioning.md"]
"""Pages whose commands start with ``.venv/bin/``; `test_job_files` parses the commands of all pages."""


def blocks(page: str) -> list[str]:
    """The Python of a page."""
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)


def commands(page: str) -> set[str]:
    """The commands of a page, each on one line and without its comment."""
    lines = re.findall(r"^    (\.venv/bin/(?:.*\\\n)*.*)$", (ROOT / page).read_text(), flags=re.MULTILINE)
    return {shlex.join(shlex.split(re.sub(r"\\\n\s*", "", line), comments=True)) for line in lines}


COMMANDS = set().union(*map(commands, PAGES))
SMALL = {
    "make_shapes.py": "--train 40 --validation 1 --test 1",
    "finetune.py": "--training.max_steps 2 --training.batch_size 4 --evaluation.answer_rows 6 "
    "--evaluation.loss_rows 6 --evaluation.max_new_tokens 4",
    "analyse.py": "--ratio_rows 6 --bound_rows 1 --adapter null --skip.retained 0.25",
}
"""Options that make a job small enough for a test."""


def command(*words: str) -> list[str]:
    """The shortest documented command that contains these words, for this environment's Python."""
    line = min((line for line in COMMANDS if all(word in line for word in words)), key=len)
    given = shlex.split(line)
    binary = Path(sys.executable).with_name(Path(given[0]).name)
    return [str(binary), *given[1:]]


def small(line: list[str]) -> list[str]:
    job = next(Path(word).name for word in line if word.startswith("jobs/"))
    return [*line, *SMALL[job].split()]


def run(line: list[str], home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        line,
        cwd=home,
        env={**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of a clone and a small copy of the demo's data."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("skipvision", "pipelines", "serve", "jobs", "models"):
        (folder / name).symlink_to(ROOT / name)
    run(small(command("make_shapes.py")), folder)
    return folder


def test_every_command_is_known_here():
    """Add new commands of the pages here, and a test below that runs them where that is possible."""
    known = [
        ("make_shapes.py",),
        ("--name mine",),
        ("--name mine", "--resume_with_changes"),
        ("--name distilled",),
        ("--name unlabelled",),
        ("finetune.py --help",),
        ("ray job submit", "--name slower"),
        ("ray job submit", "SKIPVISION_METHODS"),
        ("caption_demo.yaml",),
        ("caption_demo.yaml", "--name sampled"),
        ("caption_demo.yaml", "--name on-vllm"),
        ("caption.py --help",),
        ("--name cats",),
        ("--name products",),
        ("score.py",),
        ("calibrate.py",),
        ("promote.py",),
        ("skipvision overlay",),
        ("skipvision overlay", "--select variance"),
        ("analyse.py",),
        ("mlflow ui",),
        ("serve run",),
        ("deploy.py",),
        ("tradeoff.py",),
        ("export.py",),
    ]
    assert len({shlex.join(command(*words)) for words in known}) == len(known) == len(COMMANDS)


def test_the_data_are_where_the_next_command_reads_them(home):
    assert len(json.loads((home / "data/shapes/train.json").read_text())) == 40


def test_the_readmes_python_runs(home):
    assert "number" in run_python("README.md", home)


def test_the_librarys_python_runs_from_the_first_line_to_the_last(home):
    run_python("docs/library.md", home)
    assert (home / "out/adapter/skip_config.json").exists()
    adapter = "--model.adapter out/adapter --tracking.registered_model null"
    export = [*command("export.py"), *adapter.split()]
    assert json.loads(run(export, home).stdout.splitlines()[-1])["model"] == str(
        home / "runs/demo-export/model"
    )


def run_python(page: str, home: Path) -> str:
    """Run all Python of a page as one program; return what it prints."""
    return run([sys.executable, "-c", "\n".join(blocks(page))], home, PYTHONPATH=".").stdout


def test_the_overlay_is_drawn(home):
    done = run(command("skipvision overlay"), home)
    assert "overlay.png: retained 64, skipped 64, merged 128" in done.stdout
    assert (home / "overlay.png").exists()


def test_the_overlay_is_drawn_with_the_methods_of_the_librarys_page(home):
    module = next(code for code in blocks("docs/library.md") if "register_merge" in code)
    (home / "my_methods.py").write_text(module)
    line = command("skipvision overlay", "--select variance")
    done = run(line, home, PYTHONPATH=".", SKIPVISION_METHODS="my_methods")
    assert "variance.png: retained 64, skipped 64, merged 0, dropped 128" in done.stdout


@pytest.mark.slow
def test_the_analysis_reports_its_files(home):
    result = json.loads(run(small(command("analyse.py")), home).stdout.splitlines()[-1])
    assert str(home / "runs/demo-analysis/skip_errors.png") in result["files"]
    assert all(Path(file).exists() for file in result["files"])


def test_help_is_given(home):
    assert "  training.learning_rate    float" in run(command("finetune.py --help"), home).stdout


def test_mlflow_accepts_the_documented_options(home):
    line = command("mlflow ui")
    assert line[1:3] == ["ui", "--backend-store-uri"]
    assert "--backend-store-uri" in run([*line[:2], "--help"], home).stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("local_ray")  # it must not join a Ray that happens to run
def test_fine_tuning_prints_its_progress_and_nothing_else(home):
    """Nothing of Ray's own, nothing on standard error."""
    done = run(small(command("finetune.py", "--name mine")), home)
    *lines, last = done.stdout.splitlines()
    result = json.loads(last)
    assert result["adapter"] == str(home / "runs/mine/adapter")
    assert done.stderr == ""
    expected = [
        r"run 'mine': checking the model and the data …",
        r"run 'mine': 40 rows, 2 steps, MLflow at sqlite:///.*/runs/mlflow.db",
        r"starting Ray on this machine for this run …",
        r"waiting for a worker with \d+ CPU to start and to load the model …",
        r"training begins: 2 steps",
        r"step 2/2  loss \d\.\d{4}  [\d.]+ images/s",
        r"validation after step 2: answering 6 questions …",
        r"validation after step 2: loss [\d.]+, exact match [\d.]+ \(caption [\d.]+, .*\), \d+ s",
        r"uploading the adapter .* to MLflow …",
    ]
    assert len(lines) == len(expected), done.stdout
    for line, pattern in zip(lines, expected, strict=True):
        assert re.fullmatch(pattern, line), line


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("local_ray")
def test_the_job_can_be_submitted(home):
    line = [word.replace("/shared/project", str(home)) for word in command("ray job submit", "--name slower")]
    with local_ray() as ray:
        # The upload follows no symbolic links, so it is the repository's own folder that is uploaded.
        done = run(
            small(line), ROOT, RAY_ADDRESS=ray.dashboard, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=ray.token
        )
    assert str(home / "runs/slower/adapter") in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("local_ray")
def test_the_captioning_job_writes_what_its_page_reads(home):
    """Without the demo's adapter, and the page's own Python on the result."""
    less = ["--model.adapter", "null", "--sampling.max_new_tokens", "4"]
    done = run([*command("caption_demo.yaml"), *less], home)
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["captions"] == str(home / "runs/demo-captions/captions")
    (code,) = blocks("docs/captioning.md")
    read = run([sys.executable, "-c", f"{code}\nprint(len(captions), *captions.columns)"], home).stdout
    rows, *columns = read.split()
    assert int(rows) == result["rows"] == 1
    assert {"key", "text", "visual_tokens_cached", "error_kind"} <= set(columns)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("local_ray")
def test_the_tradeoff_job_runs_without_the_demos_adapters(home):
    less = ["--adapters", '{"untuned": {}}', "--rows", "6", "--methods", '["tome"]', "--latency_rounds", "0"]
    less += ["--pixel_sides", "[]", "--second_turn", "[]", "--difficult", "null"]
    grid = ["--grid.retained", "[32]", "--grid.skipped", "[0]", "--max_new_tokens", "4"]
    done = run([*command("tradeoff.py"), *less, *grid], home)
    assert json.loads(done.stdout.splitlines()[-1])["points"] == 4


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("way", ["serve run", "deploy.py"])
def test_the_endpoint_answers_the_client_of_its_page(home, way):
    """Both ways to start it, and the client of docs/serving.md."""
    if not (home / "runs/demo").exists():
        run_python("docs/library.md", home)
        (home / "runs/demo").mkdir(parents=True)
        (home / "out/adapter").rename(home / "runs/demo/adapter")
    (client,) = blocks("docs/serving.md")
    line = command(way)
    environment = {**os.environ, "PYTHONPATH": ".", "HF_HUB_OFFLINE": "1", "RAY_AUTH_MODE": "disabled"}
    with subprocess.Popen(
        line, cwd=home, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as serving:
        try:
            wait_for("http://127.0.0.1:8000/healthz", serving)
            printed = run([sys.executable, "-c", f"{client}\nprint(answer.usage.visual_tokens)"], home).stdout
        finally:
            serving.send_signal(signal.SIGINT if way == "serve run" else signal.SIGTERM)
            serving.communicate(timeout=60)
    assert "'retained': 64, 'skipped': 64, 'cached': 66" in printed
    assert serving.returncode == 0


def wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    while True:
        assert process.poll() is None, process.stdout.read().decode()
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.5)
