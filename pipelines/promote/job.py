"""The promotion job: an MLflow alias moves to a model version only if the version passes the gate.

The decision is recorded as an MLflow run with table and evidence, and as tags of the model version: before
the alias moves, and also if it does not.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pipelines.evaluation.gate import Verdict, judge, table
from pipelines.evaluation.items import Item
from pipelines.promote.config import PromoteConfig
from pipelines.promote.items import (
    FullTokens,
    NeededSystem,
    RegisteredSystem,
    check_comparable,
    items_file,
    items_of,
)
from pipelines.shared.console import say
from pipelines.tracking.client import TrackingError
from pipelines.tracking.registry import AliasMovedError, ModelVersion, Registry
from pipelines.tracking.run import Tracker
from pipelines.tracking.tracked import ended
from skipvision.errors import ConfigError, SkipVisionError


class RefusedError(SkipVisionError):
    """The candidate does not pass; the alias does not move."""


@dataclass
class Decision:
    """A decision with its inputs and reasons, as MLflow records it."""

    candidate: ModelVersion
    champion: ModelVersion | None
    config: PromoteConfig
    at: str
    items: dict[str, dict[str, Any]] = field(default_factory=dict)
    verdicts: Sequence[Verdict] = ()
    outcome: Literal["promoted", "passed", "refused"] = "refused"
    reason: str = ""

    def markdown(self) -> str:
        """Format the verdicts, the outcome and its reason."""
        verdicts = f"{table(self.verdicts, self.config.budget.confidence)}\n" if self.verdicts else ""
        return f"{verdicts}{self.candidate} as {self.config.alias!r}: {self.outcome}. {self.reason}\n"

    def evidence(self) -> dict[str, Any]:
        """Return the whole decision as JSON."""
        return {
            "outcome": self.outcome,
            "reason": self.reason,
            "at": self.at,
            "candidate": str(self.candidate),
            "alias": self.config.alias,
            "champion": self.champion and str(self.champion),
            "items": self.items,
            "verdicts": [asdict(verdict) for verdict in self.verdicts],
            "config": self.config.model_dump(mode="json"),
        }


def run_promote(config: PromoteConfig) -> dict[str, Any]:
    """Compare the candidate, record the decision, and move the alias if it passed; return the evidence.

    Raises:
        RefusedError: the candidate did not pass. The refusal is recorded.
        AliasMovedError: the alias moved during the comparison. The refusal is recorded.
        WrongItemsError: the items belong to other models, or were scored on different questions.
        ConfigError: a model version, file of items or slice does not exist, or there is no registry.
        DataError: the items cannot be read or paired, or the reference has errors of its own.
        TrackingError: MLflow cannot be reached, or does not accept the decision.
    """
    absolute = config.resolved()
    storage = Path(absolute.storage)
    registry = Registry(config.tracking.absolute_uri(storage))
    candidate = registry.find(config.candidate.model)
    before = registry.holder(candidate.name, config.alias)
    champion = None if before is None else ModelVersion(candidate.name, before)
    if champion == candidate:
        raise ConfigError(f"{candidate} already has the alias {config.alias!r}: there is nothing to decide")
    if champion is None and config.reference.against == "champion":
        raise ConfigError(
            f"no version of {candidate.name!r} has the alias {config.alias!r} yet: compare the first with "
            "full tokens, --reference.against full"
        )
    decision = Decision(candidate, champion, config, datetime.now(UTC).isoformat(timespec="seconds"))
    # This comes before the MLflow run, because a mistake in the settings must not replace the last decision.
    decision.verdicts = _verdicts(decision, absolute, registry)
    tracker = Tracker.start(
        registry.uri,
        experiment=config.tracking.experiment,
        run_name=f"{candidate.name}/{candidate.version} as {config.alias}",
        artifacts=storage / "mlflow-artifacts",
    )
    refusal: RefusedError | AliasMovedError | None = None
    with ended(tracker):
        settings = config.model_dump(mode="json")
        tracker.describe(settings, settings)
        try:
            _decide(decision, registry, tracker)
        except (RefusedError, AliasMovedError) as error:
            decision.outcome, decision.reason, refusal = "refused", str(error), error
        finally:
            if decision.reason:  # otherwise the job was stopped before it decided anything
                say(decision.markdown())
                _record(decision, registry, tracker)
    if refusal is not None:
        raise refusal
    return {**decision.evidence(), "mlflow_uri": registry.uri, "mlflow_run_id": tracker.run_id}


def _decide(decision: Decision, registry: Registry, tracker: Tracker) -> None:
    """Move the alias, after recording why; raise `RefusedError` if the candidate does not pass."""
    _check_verdicts(decision)
    decision.outcome, decision.reason = "passed", "Every slice stays within its budget."
    _record(decision, registry, tracker)  # no alias moves without its evidence
    _move(decision, registry)
    decision.outcome = "promoted"


def _verdicts(decision: Decision, absolute: PromoteConfig, registry: Registry) -> list[Verdict]:
    config, champion = decision.config, decision.champion
    sides: dict[str, list[Item]] = {}
    with tempfile.TemporaryDirectory() as folder:
        downloads = Path(folder)
        needed: dict[str, NeededSystem] = {
            "candidate": RegisteredSystem(decision.candidate, registry, downloads / "candidate-model"),
            "reference": FullTokens(),
        }
        if champion is not None and config.reference.against == "champion":
            needed["reference"] = RegisteredSystem(champion, registry, downloads / "champion-model")
        for side, given, section in (
            ("candidate", config.candidate, absolute.candidate),
            ("reference", config.reference, absolute.reference),
        ):
            file = items_file(section, registry, downloads / side)
            sides[side], decision.items[side] = items_of(needed[side], file, given)
    check_comparable(*(decision.items[side]["made_with"] for side in ("candidate", "reference")))
    return judge(sides["reference"], sides["candidate"], config.budget)


def _check_verdicts(decision: Decision) -> None:
    """Raise `RefusedError` with all reasons unless every slice is within its budget."""
    unanswered = [v for v in decision.verdicts if v.outcome == "unanswered"]
    undecided = [v for v in decision.verdicts if v.outcome == "undecided"]
    worse = [v for v in decision.verdicts if v.outcome == "worse"]
    reasons = []
    if unanswered:
        share = f"{100 * decision.config.budget.max_errors:g} %"
        counts = ", ".join(
            "{} ({} and {} of {})".format(v.slice, *v.errors, v.found.items) for v in unanswered
        )
        reasons.append(f"reference and candidate left more than {share} without an answer on {counts}")
    if worse:
        reasons.append(f"worse than the budget on {', '.join(v.slice for v in worse)}")
    if undecided:
        needs = ", ".join(f"{v.slice} ({v.found.items} items, about {v.needed} needed)" for v in undecided)
        reasons.append(f"too few items to decide on {needs}")
    if reasons:
        raise RefusedError(
            f"{decision.candidate} does not become {decision.config.alias!r}: {'; '.join(reasons)}"
        )


def _move(decision: Decision, registry: Registry) -> None:
    before = None if decision.champion is None else decision.champion.version
    try:
        registry.move(decision.config.alias, decision.candidate, expected=before)
    except TrackingError as error:
        # If the candidate has the alias, the move succeeded and only MLflow's response was lost.
        if not _has_alias(decision, registry):
            raise _about_alias(error, decision, registry) from error


def _has_alias(decision: Decision, registry: Registry) -> bool | None:
    """Return whether the candidate has the alias now; None if MLflow does not answer."""
    try:
        holder = registry.holder(decision.candidate.name, decision.config.alias)
    except TrackingError:
        return None
    return holder == decision.candidate.version


def _about_alias(error: TrackingError, decision: Decision, registry: Registry) -> TrackingError:
    """Return the error with a line that says whether the alias has moved."""
    moved = decision.outcome == "promoted" or _has_alias(decision, registry)
    alias = {
        True: "has moved",
        False: "stays; run the job again",
        None: "may have moved; check it before you run the job again",
    }[moved]
    return TrackingError(f"{error}\nThe alias {decision.config.alias!r} {alias}")


# --------------------------------------------------------------------------------------------- recording


def _record(decision: Decision, registry: Registry, tracker: Tracker) -> None:
    """Record the decision; a `TrackingError` says whether the alias has moved."""
    try:
        _store(decision, registry, tracker)
    except TrackingError as error:
        raise _about_alias(error, decision, registry) from error


def _store(decision: Decision, registry: Registry, tracker: Tracker) -> None:
    """Store table, evidence and numbers in the run, and tag the model version with the outcome."""
    with tempfile.TemporaryDirectory() as folder:
        for name, text in (
            ("promotion.md", decision.markdown()),
            ("promotion.json", json.dumps(decision.evidence(), indent=2)),
        ):
            (Path(folder) / name).write_text(text)
            tracker.store(Path(folder) / name)
    numbers: dict[str, float] = {}
    for verdict in decision.verdicts:
        found = verdict.found
        numbers |= {
            f"difference/{verdict.slice}": found.difference,
            f"low/{verdict.slice}": found.low,
            f"high/{verdict.slice}": found.high,
            f"worst/{verdict.slice}": verdict.worst,
        }
    tracker.metrics(numbers, 0)  # all at once, because two slices may have the same name in MLflow
    tracker.upload()
    gate = f"promotion/{decision.config.alias}"
    registry.tag(
        decision.candidate,
        {
            f"{gate}/outcome": decision.outcome,
            f"{gate}/at": decision.at,
            f"{gate}/reason": decision.reason,
            f"{gate}/table": decision.markdown(),
            f"{gate}/evidence": f"runs:/{tracker.run_id}/promotion.json",
        },
    )
