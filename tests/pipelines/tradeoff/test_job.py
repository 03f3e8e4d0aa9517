"""The trade-off job on a tiny model: points are scored once, timed, and reported."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

import skipvision as sv
from pipelines.data.training_rows import read_rows
from pipelines.engines.loading import load_config
from pipelines.evaluation.items import read_items, write_items
from pipelines.evaluation.paired import Paired
from pipelines.tradeoff import job as tradeoff
from pipelines.tradeoff.config import TradeoffConfig
from pipelines.tradeoff.job import digests, run_tradeoff
from pipelines.tradeoff.points import Point, points
from pipelines.tradeoff.report import curves
from pipelines.tradeoff.results import PointResult
from pipelines.tradeoff.timing import Seconds
from skipvision.baselines import BASELINES
from skipvision.errors import AdapterError, ConfigError

SKIP = sv.SkipConfig(retained=0.25, skipped=0.25, select="norm", summary_tokens=2)


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = AutoModelForImageTextToText.from_pretrained(tiny_model)
    torch.manual_seed(1)
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    )
    sv.attach(model, SKIP)
    return sv.save_adapter(model, tmp_path_factory.mktemp("tuned") / "adapter")


@pytest.fixture(scope="module")
def given(tiny_model: Path, adapter: Path, shapes_data: Path, tmp_path_factory: Any) -> dict[str, Any]:
    return {
        "name": "tradeoff",
        "storage": str(tmp_path_factory.mktemp("runs")),
        "model": {"path": str(tiny_model)},
        "adapters": {"untuned": {}, "tuned": {"path": str(adapter), "reference": "untuned"}},
        "test": str(shapes_data / "test.json"),
        "methods": ["random", "visionzip", "pixels"],
        "fractions": [0.1, 0.8],
        "difficult": {"method": "pixels", "fraction": 0.8},
        "second_turn": ["as tuned", "pixels"],
        "grid": {"retained": [2], "skipped": [0, 3]},
        "max_new_tokens": 2,
        "latency_rounds": 2,
        "cpus_per_task": 1.5,  # two processes of one thread
    }


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_points_are_scored_once_and_reported(given, tmp_path, capsys):
    result = run_tradeoff(TradeoffConfig(**given, report=str(tmp_path)))
    printed = capsys.readouterr().out
    # Per adapter: full tokens, a grid of two, and two methods and two smaller images at one of two
    # budgets; and one point as tuned.
    assert result["points"] == 2 * (1 + 2 + 2 + 2) + 1
    assert printed.count("10.0% is too little for this model") == 4
    assert printed.count("an image of one patch costs more than 10.0% of the full prefill") == 2
    assert "15 points, 13 to be scored on 6 rows each" in printed
    assert "5 points to be scored on second turns" in printed
    numbers = {
        (one["point"]["adapter"], one["point"]["method"], json.dumps(one["point"]["skip"])): one
        for one in json.loads(Path(result["numbers"]).read_text())
    }
    assert len(numbers) == 15
    for (label, method, _), one in numbers.items():
        low, high = one["latency_quartiles"]
        assert 0 < low <= one["latency"] <= high
        seconds = one["first_token_seconds"]
        assert seconds == sorted(seconds)
        gap = one["gap"]["overall"]
        assert gap["items"] == 6
        if (label, method) == ("untuned", "full"):
            assert gap["low"] == gap["difference"] == gap["high"] == 0, "a point does not differ from itself"
        else:
            assert gap["low"] < gap["difference"] < gap["high"], "one image leaves everything open"
        if method == "full":
            assert one["language_flops"] == one["kv_bytes"] == one["latency"] == 1
        elif method in ("random", "visionzip"):
            assert 0.5 < one["language_flops"] <= 0.8
    tuned = next(one for (_, method, _), one in numbers.items() if method == "as tuned")["point"]["skip"]
    assert (tuned["retained"], tuned["skipped"], tuned["select"]) == (4, 4, "norm")
    table = Path(result["table"]).read_text()
    assert table.count("| as tuned | 4 + 4 |") == 1
    assert table.count("| 100 [100, 100] |") >= 2
    for title in ("calibration", "difficult items", "second turn", "smaller images at equal seconds"):
        assert table.count(f"**: {title}\n") == 2
    assert "not measured" not in table
    second = numbers["untuned", "full", "null"]["evidence"]["second turn"]
    assert 0 <= second["asked second"]["value"] <= 1
    for name in ("picture", "published"):
        assert Path(result[name]).read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / Path(result[name]).name).exists()
    assert (tmp_path / "tradeoff_table.md").read_text() == table

    files = sorted((Path(given["storage"]) / "tradeoff/points").iterdir())
    assert len(read_items(files[0])) == 6
    files[0].unlink()
    capsys.readouterr()
    again = run_tradeoff(TradeoffConfig(**given))
    printed = capsys.readouterr().out
    assert "15 points, 1 to be scored" in printed
    assert "second turns" not in printed
    assert "timing" not in printed
    assert again["found"] == result["found"]
    assert Path(again["table"]).read_text() == table, "the times are reused"
    assert sorted((Path(given["storage"]) / "tradeoff/points").iterdir()) == files


def test_other_points_rounds_or_cpus_are_timed_again(given, tmp_path, monkeypatch):
    timed, half = [], Seconds(0.5, 0.1, 0.1, 0.2, 0.3)

    def measured(tasks: Any, cpus: float) -> Any:
        [(_, (own, config, _))] = tasks
        timed.append((len(own), config.latency_rounds, cpus))
        yield 0, [[half] * config.latency_rounds for _ in own]

    monkeypatch.setattr(tradeoff, "in_parallel", measured)
    files = {(Point("a", (None,), name, None), 0): tmp_path / name for name in ("full", "norm")}
    fewer = dict([next(iter(files.items()))])
    for some, changes in [
        (files, {}),
        (files, {"latency_rounds": 1}),
        (files, {"cpus_per_task": 4}),
        (fewer, {}),
    ]:
        config = TradeoffConfig(**{**given, "adapters": {"a": {}}, **changes})
        for _ in range(2):
            seconds = tradeoff._time_points(some, tmp_path / "times", config, ())
            assert list(seconds.values()) == [[half] * config.latency_rounds] * len(some)
    assert timed == [(2, 2, 1.5), (2, 1, 1.5), (2, 2, 4), (1, 2, 1.5)]


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_answers_of_several_seeds_are_pooled_and_paired_by_seed(given, adapter, tmp_path):
    weights = adapter / "adapter_model.safetensors"
    shutil.copytree(adapter, tmp_path / "second")
    tensors = {name: -value for name, value in load_file(weights).items()}
    save_file(tensors, tmp_path / "second" / weights.name)
    one = {"path": str(adapter)}
    both = {**one, "other_seeds": [str(tmp_path / "second")]}
    settings = {
        **given,
        "name": "seeds",
        "adapters": {"tuned": both, "same again": {**both, "reference": "tuned"}, "first": one},
        "storage": str(tmp_path),
        "methods": ["downscaled", "norm", "skip-vision"],
        "difficult": None,
        "second_turn": [],
        "fractions": [0.8],
        "grid": {"retained": [], "skipped": []},
        "latency_rounds": 0,
    }
    run_tradeoff(TradeoffConfig(**settings))
    # Full tokens and three methods under two seeds; all labels share these answers, and so does `as tuned`.
    files = sorted((tmp_path / "seeds/points").iterdir())
    assert len(files) == 8
    _set_scores(files, {"full": [6, 6], "norm": [3, 0], "skip-vision": [6, 3]})
    result = run_tradeoff(TradeoffConfig(**settings))
    found = {
        (each["point"]["adapter"], each["point"]["method"]): each
        for each in json.loads(Path(result["numbers"]).read_text())
    }
    pooled, single = found["tuned", "as tuned"], found["first", "as tuned"]
    assert pooled["gap"]["overall"]["items"] == 2 * single["gap"]["overall"]["items"] == 12
    assert sorted(pooled["by_seed"]) == [-0.5, 0]
    assert pooled["by_seed"][0] == single["gap"]["overall"]["difference"]
    assert pooled["gap"]["overall"]["difference"] == -0.25
    assert found["same again", "as tuned"]["gap"] == pooled["gap"]
    behind = found["tuned", "norm"]["behind"]
    assert (behind["difference"], behind["other"], behind["items"]) == (0.5, 0.75, 12)
    assert behind["low"] < 0 < 0.5 < behind["high"], "one image proves little"
    assert all(found["tuned", name]["behind"] is None for name in ("full", "as tuned", "skip-vision"))
    assert result["table"] == str(tmp_path / "seeds/seeds_table.md")
    table = Path(result["table"]).read_text()
    assert "**tuned**, 2 seeds" in table
    assert table.count("by seed") == 2
    assert "latency |" not in table
    # The budget allows a grid of 11 tokens; the largest square grid within it has 9.
    assert found["tuned", "downscaled"]["point"]["skip"]["skipped"] == 11
    assert re.search(r"\| downscaled \| 0 \+ 9 \| \d\d\.\d of 80 \|", table)
    assert f"+50.0 [{100 * behind['low']:+.1f}, {100 * behind['high']:+.1f}] |\n" in table
    by_task = table.split("**tuned**: − full, by task")[1].split("**")[0]
    rows = [line for line in by_task.splitlines() if line.startswith("| norm")]
    gaps = [gap for task, gap in found["tuned", "norm"]["gap"].items() if task != "overall"]
    for gap in gaps:
        low, high = (round(100 * gap[end], 1) + 0.0 for end in ("low", "high"))
        assert f"{100 * gap['difference']:+.1f} [{low:+.1f}, {high:+.1f}]" in rows[0]
    assert "| full" not in by_task


def _set_scores(files: list[Path], right: dict[str, list[int]]) -> None:
    """Rewrite the scores: each method has the given number of right answers under each seed, others none."""
    for file in files:
        items = read_items(file)
        many = right[items[0].system].pop() if items[0].system in right else 0
        write_items(file, [replace(item, score=float(at < many)) for at, item in enumerate(items)])


def test_the_figure_names_every_line_and_draws_each_reference():
    """The reference of the second adapter is another adapter's full tokens, not its own."""

    def result(label: str, method: str, share: float, **point: Any) -> PointResult:
        gap = Paired(share - 0.9, -1, 1, None, 0.9, share, 10, 10, 0, 0)
        cost = 1.0 if method == "full" else 0.3
        return PointResult(
            Point(label, (None,), method, None, **point),
            *(cost, cost, cost, None, None, None),
            {"overall": share},
            {"overall": gap},
            [gap.difference],
            None,
        )

    figure = curves(
        [
            result("a long label of the first adapter", "full", 0.9),
            result("a long label of the first adapter", "norm", 0.5, budget=0.3),
            result("second", "full", 0.8),
            result("second", "as tuned", 0.7),
        ]
    )
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["reference: full tokens", "norm", "as tuned"]
    panels = figure.axes
    assert len(panels) == 2 * 2, "no panel for latency, which was not measured"
    for panel in panels:
        [line] = [line for line in panel.lines if line.get_linestyle() == ":"]
        assert line.get_ydata()[0] == pytest.approx(90)
    titles = [panel.get_title(loc="left") for panel in panels]
    assert titles == ["a long label of the first adapter", "", "second", ""]


def test_answers_keep_their_names_when_skip_config_gains_a_field(monkeypatch):
    """The name is that of a file of answers before SkipConfig had any later field."""
    point = Point("a", (None,), "norm", BASELINES["norm"].model_copy(update={"retained": 64}))
    assert point.digest("evaluation", None, 0) == "5d828653043b4b6c"
    monkeypatch.setattr("pipelines.tradeoff.points._FIRST_FIELDS", ("retained", "skipped"))
    other = Point("a", (None,), "norm", point.skip.model_copy(update={"summary_tokens": 1}))
    assert other.digest("evaluation", None, 0) != point.digest("evaluation", None, 0)


def test_the_difficult_point_is_added_if_no_budget_has_it(given, tiny_model):
    settings = {**given, "methods": ["norm"], "fractions": [0.8], "second_turn": []}
    model = load_config(str(tiny_model))

    def found(**changes: Any) -> list[tuple[str, float | None]]:
        config = TradeoffConfig(**{**settings, "adapters": {"a": {}}, **changes})
        return [(one.method, one.budget) for one in points(config, model, 20) if one.budget]

    assert found(difficult=None) == [("norm", 0.8)]
    assert found(difficult={"method": "norm", "fraction": 0.8}) == [("norm", 0.8)]
    assert found(difficult={"method": "random", "fraction": 0.7}) == [("norm", 0.8), ("random", 0.7)]
    smaller = found(difficult={"method": "pixels", "fraction": 0.9})
    assert smaller == [("norm", 0.8), ("pixels", 0.9), ("pixels, tower counted", 0.9)]


@pytest.mark.parametrize(
    "file", ["model/model.safetensors", "adapter/adapter_config.json", "the first image"]
)
def test_points_are_named_by_the_contents_of_files(given, tiny_model, adapter, shapes_data, tmp_path, file):
    for source, name in ((tiny_model, "model"), (adapter, "adapter"), (shapes_data, "data")):
        shutil.copytree(source, tmp_path / name)
    rows = read_rows(str(tmp_path / "data/test.json"))
    skip = sv.SkipConfig(retained=4, skipped=0, merge="drop", select="random")
    point = Point("tuned", (str(tmp_path / "adapter"),) * 2, "random", skip)
    config = TradeoffConfig(**{**given, "model": {"path": str(tmp_path / "model")}})
    before = digests([point], config, rows)
    assert len(set(before.values())) == 2  # each seed draws another pattern
    assert digests([point], config, rows) == before
    changed = Path(str(rows[0].images[0])) if "image" in file else tmp_path / file
    changed.write_bytes(changed.read_bytes() + b" ")
    assert not set(digests([point], config, rows).values()) & set(before.values())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"methods": ["fast"], "difficult": None},
            ValidationError,
            "unknown: fast; known methods: random, uniform",
        ),
        (
            {"difficult": {"method": "fast"}},
            ValidationError,
            "difficult.method\\n.*unknown: fast; known methods: random",
        ),
        ({"second_turn": ["norm"]}, ValidationError, "second_turn: norm is none of random, visionzip"),
        (
            {"methods": ["random"], "difficult": None, "second_turn": [], "pixel_sides": [28]},
            ValidationError,
            "pixel_sides needs pixels in methods",
        ),
        ({"pixel_sides": [30]}, ConfigError, "pixel_sides: 30 is not a multiple of the patch size 14"),
        ({"fractions": [0.5, 25]}, ValidationError, r"\[25.0\]: a budget is above 0"),
        ({"adapters": {"a": {"reference": "b"}}}, ValidationError, "adapters.a.reference: no adapter 'b'"),
        ({"adapters": {}}, ValidationError, "at least 1"),
        ({"adapters": {"a": {"other_seeds": ["b"]}}}, ValidationError, "a: other_seeds needs a path"),
        (
            {"adapters": {"a": {"path": "x", "other_seeds": ["y"]}, "b": {"path": "x", "reference": "a"}}},
            ValidationError,
            "b has 0 other seeds and its reference 'a' has 1",
        ),
        ({"test": "nowhere.json"}, ConfigError, "test = nowhere.json"),
        ({"adapters": {"a": {"path": "models"}}}, AdapterError, "models is not a Skip-Vision adapter"),
        ({"model": {"path": "models/nothing"}}, ConfigError, "model.path = models/nothing"),
        ({"report": f"{__file__}/here"}, ConfigError, "report = .*here: Not a directory"),
    ],
)
def test_unusable_settings_are_rejected_before_the_evaluation(given, changes, error, message):
    with pytest.raises(error, match=message):
        run_tradeoff(TradeoffConfig(**{**given, **changes}))
