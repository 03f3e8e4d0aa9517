"""The promotion job with a real registry: which candidates pass, and what each decision leaves in MLflow."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForImageTextToText

import skipvision as sv
from pipelines.engines.model import adapter_digest
from pipelines.evaluation.gate import Budget, judge, table
from pipelines.evaluation.items import Item, write_items
from pipelines.promote.config import PromoteConfig
from pipelines.promote.items import WrongItemsError
from pipelines.promote.job import RefusedError, run_promote
from pipelines.tracking.client import TrackingError
from pipelines.tracking.config import TrackingConfig
from pipelines.tracking.registry import AliasMovedError, ModelVersion, Registry
from pipelines.tracking.run import Tracker
from skipvision.errors import ConfigError, DataError
from tests.pipelines.tracking.test_run import no_metrics

SKIP = sv.SkipConfig(retained=4, skipped=4)
SCORED = {"weights": "w0", "sampling": "greedy", "judge": None, "dataset shapes": "q0"}
FULL = {"model": "base", "adapter": None, "skip": sv.SkipConfig.full().model_dump_json(), **SCORED}


def items(
    system: str, *, images: int = 200, wrong: Mapping[str, int], error: str | None = None
) -> list[Item]:
    """An item per image and task. ``wrong``: the number of images, from the first, with a wrong answer."""
    return [
        Item("shapes", f"{image}-{task}", system, task, str(image), "", float(image >= count), error)
        for image in range(images)
        for task, count in wrong.items()
    ]


@pytest.fixture(scope="module")
def storage(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry with three versions of ``ours``; version 1 is the champion."""
    folder = tmp_path_factory.mktemp("storage")
    uri = TrackingConfig().absolute_uri(folder)
    for seed in (1, 2, 3):
        torch.manual_seed(seed)
        base = AutoModelForImageTextToText.from_pretrained(tiny_model)
        lora = peft.LoraConfig(r=2, target_modules=r".*language_model.*\.q_proj", init_lora_weights=False)
        model = peft.get_peft_model(base, lora)
        sv.attach(model, SKIP)
        adapter = sv.save_adapter(model, folder / f"run-{seed}" / "adapter")
        tracker = Tracker.start(uri, experiment="tests", run_name=str(seed), artifacts=folder / "artifacts")
        tracker.register(adapter, "ours", "champion" if seed == 1 else "candidate")
    return folder


@pytest.fixture
def registry(storage: Path) -> Registry:
    """The registry, with the alias at version 1."""
    registry = Registry(TrackingConfig().absolute_uri(storage))
    registry._client.set_registered_model_alias("ours", "champion", "1")
    return registry


def made_by(version: int) -> dict[str, str | None]:
    return {
        "model": "base",
        "adapter": f"models:/ours/{version}",
        "skip": SKIP.model_dump_json(),
        **SCORED,
    }


def promote(
    storage: Path,
    *,
    before: list[Item],
    after: list[Item],
    systems: Mapping[str, Any] | None = None,
    slices: Mapping[str, float] | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """Promote version 2, by default with its own items and the champion's."""
    systems = systems or {"old": made_by(1), "new": made_by(2)}
    write_items(storage / "items.parquet", [*before, *after], systems)
    given = {
        "candidate": {"model": "models:/ours/2", "items": str(storage / "items.parquet")},
        "reference": {"items": str(storage / "items.parquet")},
        "budget": {"overall": 0.05, "slices": slices or {}},
        "storage": str(storage),
        "tracking": {"experiment": "gate"},
        **changes,
    }
    return run_promote(PromoteConfig.model_validate(given))


GOOD = items("old", wrong={"number": 20, "colour": 20})
SAME = items("new", wrong={"number": 22, "colour": 18})
NUMBERS_LOST = items("new", wrong={"number": 44, "colour": 4})


def tags(registry: Registry, version: str = "2") -> dict[str, str]:
    given = registry._client.get_model_version("ours", version).tags
    return {key.removeprefix("promotion/champion/"): value for key, value in given.items()}


def test_a_candidate_within_its_budget_becomes_champion_with_evidence(storage, registry, capsys):
    evidence = promote(storage, before=GOOD, after=SAME, slices={"number": 0.1, "shapes/colour": 0.1})
    assert registry.holder("ours", "champion") == "2"
    assert [v["outcome"] for v in evidence["verdicts"]] == ["within"] * 3
    tagged = tags(registry)
    assert tagged["outcome"] == evidence["outcome"] == "promoted"
    assert tagged["table"].strip() in capsys.readouterr().out
    assert "| shapes/colour | 200 | 0 / 0 | 200 | 90.0 | 91.0 | +1.0" in tagged["table"]
    stored = registry.artifact(evidence["mlflow_run_id"], "promotion.json", storage)
    assert tagged["evidence"] == f"runs:/{evidence['mlflow_run_id']}/promotion.json"
    saved = json.loads(stored.read_text())
    assert saved["champion"] == "models:/ours/1"
    assert saved["items"]["candidate"]["made_with"] == made_by(2)
    assert len(saved["items"]["reference"]["sha256"]) == 64
    metrics = Tracker(registry.uri, evidence["mlflow_run_id"])._client.get_run(evidence["mlflow_run_id"]).data
    assert metrics.metrics["difference/overall"] == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(
    ("before", "after", "slices", "message"),
    [
        (GOOD, NUMBERS_LOST, {"number": 0.05}, "worse than the budget on number$"),
        (GOOD, items("new", wrong={"number": 60, "colour": 60}), {}, "worse than the budget on overall"),
        (
            GOOD,
            SAME,
            {"number": 0.011},
            r"too few items to decide on number \(200 items, about \d+ needed",
        ),
        (
            items("old", wrong={"number": 200}, error="corrupt"),
            items("new", wrong={"number": 200}, error="corrupt"),
            {},
            r"left more than 2 % without an answer on overall \(200 and 200 of 200\)",
        ),
    ],
)
def test_a_refusal_moves_nothing_and_is_recorded(storage, registry, before, after, slices, message):
    with pytest.raises(RefusedError, match=message) as refusal:
        promote(storage, before=before, after=after, slices=slices)
    assert registry.holder("ours", "champion") == "1"
    assert tags(registry)["outcome"] == "refused"
    assert tags(registry)["reason"] == str(refusal.value)


@pytest.mark.filterwarnings("ignore:MLflow at .* does not take metrics")
def test_no_alias_moves_without_its_numbers(storage, registry):
    with no_metrics(registry.uri):
        with pytest.raises(TrackingError, match=r"did not take \d+ values.*\n.*'champion' stays"):
            promote(storage, before=GOOD, after=SAME)
        (run,) = registry._client.search_runs(
            [registry._client.get_experiment_by_name("gate").experiment_id], max_results=1
        )
    assert (registry.holder("ours", "champion"), run.info.status) == ("1", "FAILED")
    promote(storage, before=GOOD, after=SAME)
    assert registry.holder("ours", "champion") == "2"


@pytest.mark.parametrize("away", [False, True])
def test_an_alias_has_moved_even_if_the_response_of_mlflow_is_lost(storage, registry, monkeypatch, away):
    """The response to the move is lost; MLflow is then away, or works again."""
    ask, lost = Registry._call, []

    def ask_and_lose(self: Registry, doing: str, call: Any) -> Any:
        if lost and away:
            raise TrackingError(f"no answer to {doing}")
        answer = ask(self, doing, call)
        if doing.startswith("moving"):
            lost.append(doing)
            raise TrackingError(f"no answer to {doing}")
        return answer

    with monkeypatch.context() as patched:
        patched.setattr(Registry, "_call", ask_and_lose)
        if away:
            with pytest.raises(
                TrackingError, match=r"no answer to setting the tag .*\n.*'champion' may have moved"
            ):
                promote(storage, before=GOOD, after=SAME)
        else:
            assert promote(storage, before=GOOD, after=SAME)["outcome"] == "promoted"
    assert registry.holder("ours", "champion") == "2"
    assert away or tags(registry)["outcome"] == "promoted"


def test_a_failed_move_is_no_refusal(storage, registry, monkeypatch):
    ask = Registry._call

    def refuse_to_move(self: Registry, doing: str, call: Any) -> Any:
        if doing.startswith("moving"):
            raise TrackingError(f"no answer to {doing}")
        return ask(self, doing, call)

    with monkeypatch.context() as patched:
        patched.setattr(Registry, "_call", refuse_to_move)
        with pytest.raises(TrackingError, match=r"no answer to moving .*\n.*'champion' stays"):
            promote(storage, before=GOOD, after=SAME)
    assert registry.holder("ours", "champion") == "1"
    assert tags(registry)["outcome"] == "passed"
    promote(storage, before=GOOD, after=SAME)
    assert (registry.holder("ours", "champion"), tags(registry)["outcome"]) == ("2", "promoted")


def test_slices_with_the_same_name_in_mlflow_stay_apart(storage, registry):
    wrong = {"is it?": 20, "is it!": 10}
    sides = {"before": items("old", wrong=wrong), "after": items("new", wrong={**wrong, "is it!": 9})}
    evidence = promote(storage, **sides, slices=dict.fromkeys(wrong, 0.1))
    run = registry._client.get_run(evidence["mlflow_run_id"])
    assert run.data.metrics["difference/is it_"] == pytest.approx(0.0)
    assert run.data.metrics["difference/is it__"] == pytest.approx(1 / 200)


def test_a_missing_folder_is_not_created(storage, tmp_path):
    items = str(storage / "items.parquet")
    given = {"candidate": {"model": "models:/ours/2", "items": items}, "reference": {"items": items}}
    with pytest.raises(ConfigError, match=r"there is no .*typo/mlflow\.db"):
        run_promote(PromoteConfig.model_validate({**given, "storage": str(tmp_path / "typo")}))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"slices": {"shape": 0.1}}, ConfigError, "no slice 'shape'; the slices are colour, number, shapes"),
        ({"reference": {"items": "nowhere.parquet"}}, ConfigError, "items = nowhere.parquet"),
        ({"after": SAME[:-3]}, DataError, "3 of the reference's 400 items are missing"),
        ({"old": {"adapter": "models:/ours/3"}}, WrongItemsError, "needs items of models:/ours/1"),
        ({"new": {"adapter": "models:/ours/3"}}, WrongItemsError, "needs items of models:/ours/2"),
        ({"new": {"skip": FULL["skip"]}}, WrongItemsError, "needs items of models:/ours/2"),
        ({"systems": {"x": {}}}, WrongItemsError, "needs items of"),
        ({"new": {"weights": "w1"}}, WrongItemsError, "with weights w1, the reference with weights w0"),
        (
            {"new": {"dataset shapes": "q1"}},
            WrongItemsError,
            "with dataset shapes q1, .* shapes q0:",
        ),
        ({"new": {"dataset POPE": "q2"}}, WrongItemsError, "dataset POPE q2, .* with no dataset POPE"),
        ({"old": {"judge": "strict"}}, WrongItemsError, "with no judge, the reference with judge strict"),
        (
            {
                "systems": {
                    "old": made_by(1),
                    "new": {k: v for k, v in made_by(2).items() if k not in SCORED},
                }
            },
            WrongItemsError,
            "lack weights, sampling, judge",
        ),
    ],
)
def test_a_mistake_in_the_settings_is_no_decision(storage, registry, changes, error, message):
    """The tags of the last decision stay."""
    registry.tag(ModelVersion("ours", "2"), {"promotion/champion/outcome": "earlier"})
    systems = {
        "old": {**made_by(1), **changes.get("old", {})},
        "new": {**made_by(2), **changes.get("new", {})},
    }
    given = {key: value for key, value in changes.items() if key not in ("old", "new")}
    with pytest.raises(error, match=message):
        promote(storage, **{"before": GOOD, "after": SAME, "systems": systems, **given})
    assert registry.holder("ours", "champion") == "1"
    assert tags(registry)["outcome"] == "earlier"


def test_items_of_the_same_files_count_for_the_version(storage, registry):
    digest = adapter_digest(storage / "run-2" / "adapter")
    systems = {"old": made_by(1), "new": {**made_by(2), "adapter": f"runs/x/adapter@{digest}"}}
    promote(storage, before=GOOD, after=SAME, systems=systems)
    assert registry.holder("ours", "champion") == "2"


def test_an_alias_that_moved_meanwhile_is_not_moved_again(storage, registry, monkeypatch):
    """Another job moves it to version 3 while our items are compared."""
    from pipelines.promote import job as module

    def compare_slowly(*arguments):
        registry._client.set_registered_model_alias("ours", "champion", "3")
        return judge(*arguments)

    monkeypatch.setattr(module, "judge", compare_slowly)
    with pytest.raises(AliasMovedError, match="moved from version 1 to version 3"):
        promote(storage, before=GOOD, after=SAME)
    assert registry.holder("ours", "champion") == "3"
    assert tags(registry)["outcome"] == "refused"


def test_the_first_champion_is_compared_with_full_tokens(storage, registry):
    """Its items may come from an MLflow run, and the run that registered the version may name it."""
    write_items(storage / "artifact" / "items.parquet", GOOD, {"old": FULL})
    tracker = Tracker.start(
        registry.uri, experiment="tests", run_name="score", artifacts=storage / "artifacts"
    )
    tracker.store(storage / "artifact" / "items.parquet")
    made = registry._client.get_model_version("ours", "2").run_id
    given: dict[str, Any] = {
        "before": [],
        "after": SAME,
        "systems": {"new": made_by(2)},
        "alias": "first",
        "candidate": {"model": f"runs:/{made}", "items": str(storage / "items.parquet")},
    }
    reference = {"items": f"runs:/{tracker.run_id}"}
    elsewhere = {"new": {**made_by(2), "weights": "w1"}}
    with pytest.raises(WrongItemsError, match="scored with weights w1, the reference with weights w0"):
        promote(storage, **{**given, "systems": elsewhere}, reference={**reference, "against": "full"})
    with pytest.raises(ConfigError, match="no version of 'ours' has the alias 'first' yet"):
        promote(storage, **given, reference=reference)
    promote(storage, **given, reference={**reference, "against": "full"})
    assert registry.holder("ours", "first") == "2"
    with pytest.raises(ConfigError, match="already has the alias 'first'"):
        promote(storage, **given, reference={**reference, "against": "full"})
    registry._client.delete_registered_model_alias("ours", "first")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("ours", "names no model version"),
        ("models:/ours/9", "no such version"),
        ("models:/nobody/1", "no such version"),
        ("models:/ours@best", "no version of 'ours' .* has the alias 'best'"),
        ("runs:/0123", "registered no model version"),
    ],
)
def test_a_name_without_a_version_raises(registry, model, message):
    with pytest.raises(ConfigError, match=message):
        registry.find(model)


# ----------------------------------------------------------------------------------- the gate alone


def verdict(before: list[Item], after: list[Item], drop: float):
    return judge(before, after, Budget(overall=drop))[0]


def test_few_items_with_the_same_answers_are_undecided():
    """The rule of three: nothing lost in n groups leaves a loss of 3.7/n possible (97.5 %, one-sided)."""
    few = items("a", images=40, wrong={"number": 0})
    one = verdict(few, few, 0.02)
    assert (one.found.low, one.outcome) == (0, "undecided")
    assert one.worst == pytest.approx(-(1 - 0.025 ** (1 / 40)))
    assert one.needed == 183
    assert verdict(*[items("a", images=183, wrong={"number": 0})] * 2, 0.02).outcome == "within"
    assert verdict(*[items("a", images=182, wrong={"number": 0})] * 2, 0.02).outcome == "undecided"


def test_the_estimated_number_of_items_usually_decides():
    """With a loss of one point and a budget of three, four of five samples of the estimated size pass."""
    generator = torch.Generator().manual_seed(0)

    def draw(images: int) -> tuple[list[Item], list[Item]]:
        chance = torch.rand(images, generator=generator)
        scores = (0.5 - 0.5 * (chance < 0.08).float() + 0.5 * (chance > 0.94).float()).tolist()
        sides = ([0.5] * images, scores)
        one, other = (
            [Item("d", str(i), "s", "", str(i), "", x) for i, x in enumerate(side)] for side in sides
        )
        return one, other

    first = next(
        v for v in (verdict(*draw(300), 0.03) for _ in range(99)) if round(v.found.difference, 3) == -0.01
    )
    assert (first.outcome, first.needed) == ("undecided", pytest.approx(650, abs=150))
    passed = [verdict(*draw(int(first.needed or 0)), 0.03).outcome == "within" for _ in range(30)]
    assert 0.6 < sum(passed) / 30 < 1


def test_errors_of_the_reference_do_not_count_as_gains():
    broken = items("old", images=20, wrong={"number": 20}, error="unreadable image")
    with pytest.raises(DataError, match="20 items of the reference 'old' have an error"):
        verdict(broken, items("new", images=20, wrong={"number": 0}), 0.1)
    assert "within" in table([verdict(GOOD, GOOD, 0.1)], 0.95)


def test_items_without_an_answer_on_both_sides_are_left_out_and_counted():
    sides = [items(name, wrong={"number": 0}) for name in ("old", "new")]
    for side, failed in zip(sides, (1, 3), strict=True):  # the candidate fails on two more and loses them
        side[:failed] = [replace(item, score=0.0, error="corrupt") for item in side[:failed]]
    found = verdict(*sides, 0.1)
    assert (found.errors, found.found.items, found.found.lost) == ((1, 3), 199, 2)
    assert "| overall | 199 | 1 / 3 | 199 | 100.0 | 99.0 |" in table([found], 0.95)
    assert verdict(*sides, 0.1).outcome == "within"
    assert judge(*sides, Budget(overall=0.1, max_errors=0.01))[0].outcome == "unanswered"


@pytest.mark.parametrize("slices", [{"number": 0.0}, {"number": 2}, {"overall": 0.1}])
def test_an_invalid_budget_is_refused(slices):
    with pytest.raises(ValueError, match=r"is not a drop|set budget\.overall"):
        Budget(slices=slices)
