"""Where to skip: the greedy path over layers, its divergence against a naive one, and the whole job."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.calibrate import job as calibrate
from pipelines.calibrate.config import CalibrateConfig, PromptsSection
from pipelines.calibrate.job import run_calibrate
from pipelines.calibrate.layers import divergence
from pipelines.calibrate.layers.divergence import LayerTask, Measurer, with_answers
from pipelines.calibrate.layers.moves import everywhere, moves
from pipelines.calibrate.layers.prompts import Prompts, read_prompts
from pipelines.calibrate.layers.search import LayerSearch, Space, chosen_line
from pipelines.calibrate.search import NothingWithinBudgetError
from pipelines.data.rows import Message, TrainingRow
from pipelines.engines.model import EngineModel
from pipelines.shapes.files import ShapesConfig, write_shapes
from pipelines.shared.folder import JobFolder
from skipvision.config import SkipConfig
from skipvision.errors import ConfigError, DataError

SKIP = SkipConfig(retained=4, skipped=4, summary_tokens=0)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three images with several questions each; one row has no answer."""
    folder = tmp_path_factory.mktemp("rows")
    write_shapes(ShapesConfig(output=folder, train=3, validation=1, test=1))
    records = json.loads((folder / "train.json").read_text())
    records[0]["conversations"] = records[0]["conversations"][:1]
    (folder / "train.json").write_text(json.dumps(records))
    return folder / "train.json"


@pytest.fixture(scope="module")
def settings(rows: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {
        "name": "job",
        "storage": str(tmp_path_factory.mktemp("runs")),
        "model": {"path": str(tiny_model), "dtype": "float32"},
        "strategy": "layers",
        "prompts": {"path": str(rows), "rows": 3, "held_out": 0.3, "max_new_tokens": 3, "batch_size": 2},
        "skip": SKIP.model_dump(),
        "budget": {"prefill_flops": 0.75},
        "tracking": {"experiment": "tests"},
        "scaling": {"workers": 1, "cpus_per_worker": 1},
    }


# ----------------------------------------------------------------------------------------------- moves


def where(skip: SkipConfig) -> tuple[Any, Any]:
    return skip.skip_layers if skip.skip_ffn else "none", skip.drop_after


@pytest.mark.parametrize(
    ("present", "block", "expected"),
    [
        (
            {"skip_ffn": False},
            1,
            {
                "skip 0": ((0,), None),
                "skip 1": ((1,), None),
                "skip 2": ((2,), None),
                "drop after 1": ("none", 1),
            },
        ),
        (
            {"skip_layers": [0, 2]},
            1,
            {"skip 1": ("all", None), "drop after 1": ((0, 2), 1)},
        ),
        ({"skip_layers": "all", "drop_after": 1}, 1, {"drop after 0": ("all", 0)}),
        ({"skip_layers": "all", "drop_after": 0}, 1, {}),
        (
            {"skip_layers": [0]},
            2,
            {"skip 0–1": ((0, 1), None), "skip 2": ((0, 2), None), "drop after 1": ((0,), 1)},
        ),
        ({"skip_layers": "all", "drop_after": 1}, 2, {}),
    ],
)
def test_a_move_changes_one_block_of_layers(present, block, expected):
    found = moves(SkipConfig(**present), layers=3, block=block)
    assert {move: where(skip) for move, skip in found.items()} == expected


# ---------------------------------------------------------------------------------------------- prompts


def test_prompts_are_one_row_per_image_without_its_answer(rows):
    prompts = read_prompts(PromptsSection(path=str(rows), rows=3, held_out=0.3), seed=0)
    assert [len(prompts.search), len(prompts.held_out)] == [2, 1]
    assert all([message.role for message in row.messages] == ["user"] for row in prompts.rows)
    assert len({str(row.images[0]) for row in prompts.rows}) == 3
    assert read_prompts(PromptsSection(path=str(rows), rows=3, held_out=0.3), seed=0) == prompts


def test_a_file_with_one_image_is_refused(rows, tmp_path):
    (record, *_) = json.loads(rows.read_text())
    record["image"] = str(rows.parent / record["image"])
    (tmp_path / "one.json").write_text(json.dumps([record, record]))
    with pytest.raises(DataError, match=r"one\.json: 1 usable rows with different images; at least 2"):
        read_prompts(PromptsSection(path=str(tmp_path / "one.json")), seed=0)


# ------------------------------------------------------------------------------------------ divergence


@pytest.fixture(scope="module")
def measurer(tiny_model: Path) -> Iterator[Measurer]:
    """A worker that compares every token of the vocabulary, so that divergences are exact."""
    model = EngineModel(str(tiny_model), "", None, None, everywhere(SKIP), "float32", "sdpa")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(divergence, "_TOP_K", 10**6)
        yield Measurer(model, batch_size=2, max_new_tokens=3)


@pytest.fixture(scope="module")
def answered(measurer: Measurer, rows: Path) -> tuple[TrainingRow, ...]:
    prompts = read_prompts(PromptsSection(path=str(rows), rows=3), seed=0).rows
    _, texts = measurer.do(0, LayerTask(prompts, None))
    return with_answers(prompts, [text or "red" for text in texts])


def test_full_tokens_do_not_diverge(measurer, answered):
    _, found = measurer.do(0, LayerTask(answered, SkipConfig.full()))
    assert [one.agreement for one in found] == [1.0] * 3
    assert max(one.divergence for one in found) < 1e-6


@pytest.mark.parametrize(
    "skip", [everywhere(SKIP), SKIP.model_copy(update={"skip_layers": (1,), "drop_after": 0})]
)
def test_the_divergence_is_that_of_each_row_alone(measurer, answered, skip):
    """Against the formula on the logits of single rows, over the whole vocabulary."""
    _, found = measurer.do(0, LayerTask(answered, skip))
    for row, one in zip(answered, found, strict=True):
        batch = measurer._collate([row])
        at = batch.labels[0, 1:] != -100
        logs = []
        for config in (SkipConfig.full(), skip):
            with measurer._attachment.using(config), torch.no_grad():
                decoded = batch.labels != -100
                out = measurer._model(**batch.inputs, skip_vision_decoded=decoded, use_cache=False)
                logs.append(out.logits[0, :-1][at].log_softmax(-1))
        full, skipping = logs
        exact = (full.exp() * (full - skipping)).sum(-1).mean().item()
        assert exact > 1e-6
        assert one.divergence == pytest.approx(exact, rel=1e-2, abs=1e-7)
        assert one.agreement == (full.argmax(-1) == skipping.argmax(-1)).float().mean().item()


# ------------------------------------------------------------------------------------------- the search


class Priced:
    """Costs 100 % minus 10 points for each skipped layer and 20 for each layer without visual tokens."""

    def costs(self, skip: SkipConfig) -> dict[str, float]:
        layers, drop = where(skip)
        skipped = {"none": 0, "all": 4}.get(layers, len(layers)) if isinstance(layers, str) else len(layers)
        dropped = 0 if drop is None else 3 - drop
        return {"prefill_flops": 1 - 0.1 * skipped - 0.2 * dropped, "kv_bytes": 1.0}

    @staticmethod
    def name(skip: SkipConfig) -> str:
        return str(where(skip))


def harm(skip: SkipConfig) -> float:
    """Layer 0 is precious, layer 2 free, and dropping after layer 2 is cheap for what it saves."""
    layers, drop = where(skip)
    members = {"none": (), "all": range(4)}.get(layers, layers) if isinstance(layers, str) else layers
    price = {0: 1.0, 1: 0.02, 2: 0.0, 3: 0.03}
    return sum(price[layer] for layer in members) + {None: 0.0, 2: 0.01, 1: 0.5, 0: 2.0}[drop]


def search(folder: Path, measured: list[str], supports: Any = lambda skip: None) -> LayerSearch:
    row = TrainingRow("a", (), (Message("user", "x"),))

    def run_tasks(tasks: Sequence[LayerTask]):
        for task in tasks:
            if task.skip is None:
                yield task, ["y"] * len(task.rows)
            else:
                measured.append(Priced.name(task.skip))
                yield task, [(harm(task.skip), 1.0)] * len(task.rows)

    space = Space(4, 1, Priced(), supports)  # type: ignore[arg-type]
    (folder / "job").mkdir(exist_ok=True)
    return LayerSearch(JobFolder(folder, "job"), run_tasks, Prompts((row,), (row,), ()), space)


def path(evidence: dict[str, Any]) -> list[str]:
    chosen = [one for one in evidence["history"] if (one["stage"], one["part"]) == ("chosen", "search")]
    return [one["move"] for one in chosen]


def test_each_round_takes_the_least_divergence_per_saved_flops(tmp_path):
    measured: list[str] = []
    evidence = search(tmp_path, measured).run(SKIP, budget=0.5)
    assert path(evidence) == ["skip 2", "drop after 2", "skip 1", "skip 3"]
    assert where(SkipConfig(**evidence["chosen"])) == ((1, 2, 3), 2)
    assert evidence["costs"]["prefill_flops"] == pytest.approx(0.5)
    assert chosen_line(evidence)["divergence"] == pytest.approx(0.06)
    assert len(measured) == len(set(measured)) + 3  # on the held-out rows once more


def test_an_interrupted_search_measures_nothing_twice(tmp_path):
    whole: list[str] = []
    evidence = search(tmp_path, whole).run(SKIP, budget=0.5)
    state = json.loads((tmp_path / "job" / "run.json").read_text())
    kept = dict(list(state["divergences"].items())[:5])
    (tmp_path / "job" / "run.json").write_text(json.dumps({**state, "divergences": kept}))
    folder = JobFolder(tmp_path, "job")
    measured: list[str] = []
    with folder.claimed():
        again = search(tmp_path, measured)
        again._folder = folder
        assert again.run(SKIP, budget=0.5) == evidence
    assert len(measured) == len(whole) - 5


def test_configs_that_the_model_does_not_support_are_not_measured(tmp_path):
    def supports(skip: SkipConfig) -> None:
        if skip.drop_after is not None:
            raise ConfigError("no")

    evidence = search(tmp_path, [], supports).run(SKIP, budget=0.7)
    assert path(evidence) == ["skip 2", "skip 1", "skip 3"]


# ---------------------------------------------------------------------------------------------- the job


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_job_finds_records_and_continues(settings, local_ray, capsys, monkeypatch):
    config = CalibrateConfig.model_validate(settings)
    result = run_calibrate(config)
    chosen = SkipConfig(**result["chosen"])
    assert chosen == SkipConfig.from_yaml(Path(result["skip"]).read_text())
    assert result["costs"]["prefill_flops"] <= 0.75
    assert (chosen.retained, chosen.skipped) == (4, 4)
    assert "| held out (1) |" in Path(result["table"]).read_text()
    assert Path(result["picture"]).read_bytes().startswith(b"\x89PNG")
    assert "round 1: " in capsys.readouterr().out
    monkeypatch.setattr(calibrate, "ray_session", lambda: 1 / 0)
    assert run_calibrate(config)["already_finished"]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"budget": {"prefill_flops": 0.05}}, NothingWithinBudgetError, "no choice of layers reaches"),
        ({"budget": {"prefill_flops": 0.99}}, ConfigError, "if no layer skips anything: lower the budget"),
        ({"prompts": {"path": "nowhere.json"}}, ConfigError, "nowhere.json"),
        ({"skip": {"retained": 4, "probe_layer": 9}}, ConfigError, "probe_layer"),
    ],
)
def test_unusable_settings_are_reported_before_ray_starts(settings, monkeypatch, changes, error, message):
    monkeypatch.setattr(calibrate, "ray_session", lambda: 1 / 0)
    with pytest.raises(error, match=message):
        run_calibrate(CalibrateConfig.model_validate({**settings, "name": "wrong", **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"strategy": "space"},
            "strategy = space needs the section data; .* does not read the section prompts",
        ),
        ({"prompts": None}, "strategy = layers needs the section prompts"),
        ({"budget": {"kv_bytes": 0.5}}, r"needs budget.prefill_flops.*does not read budget.kv_bytes"),
        ({"space": {"retained": [1]}}, "does not read space"),
        ({"budget": {"prefill_flops": 0.5, "accuracy_drop": 0.1}}, "does not read budget.accuracy_drop"),
    ],
)
def test_sections_of_the_other_strategy_are_refused(settings, changes, message):
    with pytest.raises(ValueError, match=message):
        CalibrateConfig.model_validate({**settings, **changes})
