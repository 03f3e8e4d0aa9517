"""The search for a SkipConfig: rungs of questions, then the verification of the finalists."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Literal

from pipelines.calibrate.config import CalibrateConfig
from pipelines.calibrate.halving import (
    Candidate,
    Standing,
    cheapest_within,
    in_order_of_safety,
    most_accurate,
    rung_sizes,
)
from pipelines.calibrate.pool import RunTasks
from pipelines.calibrate.workers import FULL, Task
from pipelines.evaluation.gate import Budget, judge
from pipelines.evaluation.items import Item, read_items, write_items
from pipelines.score.dataset import Dataset
from pipelines.shared.console import say
from pipelines.shared.folder import JobFolder
from skipvision.config import SkipConfig
from skipvision.errors import SkipVisionError

HELD_OUT = "held-out"


class NothingWithinBudgetError(SkipVisionError):
    """No SkipConfig of the search space is shown to stay within the budget."""


class Calibration:
    """One search: rungs, then verification. Earlier results are read from the job's folder."""

    def __init__(
        self,
        config: CalibrateConfig,
        folder: JobFolder,
        run_tasks: RunTasks,
        search: Dataset,
        held_out: Dataset,
    ) -> None:
        self._config, self._folder, self._run_tasks = config, folder, run_tasks
        self._search, self._held_out = search, held_out
        self._history: list[dict[str, Any]] = []
        self._items: dict[str, list[Item]] = {}
        # Without a limit on accuracy, verdicts decide nothing. Errors are not limited: an unusable question
        # fails under every config, and a rung of few questions may have many of them.
        self._budget = Budget(
            overall=config.budget.accuracy_drop or 1.0,
            max_errors=1.0,
            confidence=config.budget.confidence,
            seed=config.search.seed,
        )

    def run(self, candidates: Sequence[Candidate]) -> dict[str, Any]:
        """Search, verify, and return the evidence as JSON."""
        limits, search = self._config.budget, self._config.search
        timed = self._timed(candidates, "search")
        alive = [candidate for candidate in timed if self._fast(candidate)]
        self._note_slow([candidate for candidate in timed if not self._fast(candidate)])
        if not alive:
            best = min(timed, key=lambda candidate: candidate.costs["latency"])
            return self._evidence(
                None,
                {**varied(best, self._config), "latency": round(best.costs["latency"], 4)},
                f"no config of the space keeps time to the first token to {limits.latency} of full tokens",
            )
        groups = list(dict.fromkeys(question.group for question in self._search.questions))
        sizes = rung_sizes(len(groups), search.rungs, search.factor)
        standings: list[Standing] = []
        keep, before = len(alive), 0
        for rung, size in enumerate(sizes):
            chosen = set(groups[before:size])
            before = size
            questions = tuple(question for question in self._search.questions if question.group in chosen)
            standings = self._standings(alive, replace(self._search, questions=questions), f"rung-{rung}")
            keep = max(search.finalists, math.ceil(keep / search.factor))
            if rung == len(sizes) - 1:
                keep = search.finalists
            if limits.accuracy_drop is not None:
                kept, out = cheapest_within(standings, limits.minimise, keep)
            else:
                kept, out = most_accurate(standings, keep, self._budget)
            self._note(f"rung {rung + 1}", standings, out)
            alive = [one.candidate for one in kept]
            if not alive:
                break
        if limits.accuracy_drop is None:
            kept = kept[:1]
        return self._verified(kept, standings)

    def _timed(self, candidates: Sequence[Candidate], part: str) -> list[Candidate]:
        """Add the latency to the candidates' costs, if the budget depends on it."""
        limits = self._config.budget
        if limits.latency is None and limits.minimise != "latency":
            return list(candidates)
        dataset = self._held_out if part == HELD_OUT else self._search
        usable = [question for question in dataset.questions if question.problem is None]
        timed = replace(dataset, questions=tuple(usable[: self._config.search.latency_questions]))
        known: dict[str, float] = dict(self._folder.state.get("latency", {}))
        missing = [c for c in candidates if f"{part}-{c.name}" not in known]
        for task, ratio in self._run_tasks([Task("latency", c.name, c.skip, timed) for c in missing]):
            known[f"{part}-{task.system}"] = ratio
            self._folder.remember(latency=known)
        return [replace(c, costs={**c.costs, "latency": known[f"{part}-{c.name}"]}) for c in candidates]

    def _fast(self, candidate: Candidate) -> bool:
        limit = self._config.budget.latency
        return limit is None or candidate.costs["latency"] <= limit

    def _standings(self, candidates: Sequence[Candidate], dataset: Dataset, part: str) -> list[Standing]:
        """Evaluate the questions under every candidate and with full tokens; add them to earlier rungs."""
        systems: dict[str, SkipConfig | Literal["full"]] = {
            FULL: "full",
            **{c.name: c.skip for c in candidates},
        }
        files = {name: self._folder.path / "scores" / f"{part}-{name}.parquet" for name in systems}
        tasks = [
            Task("score", name, skip, dataset)
            for name, skip in systems.items()
            if dataset.questions and not files[name].exists()
        ]
        for number, (task, items) in enumerate(self._run_tasks(tasks), start=1):
            write_items(files[task.system], items)
            say(f"{part}: {number} of {len(tasks)} configs evaluated on {len(dataset.questions)} questions")
        for name, file in files.items():
            new = read_items(file) if dataset.questions else []
            before = [] if part == HELD_OUT else self._items.get(name, [])
            self._items[name] = [*before, *new]
        full = self._items[FULL]
        return [
            Standing(c, self._items[c.name], judge(full, self._items[c.name], self._budget)[0])
            for c in candidates
        ]

    def _verified(self, finalists: Sequence[Standing], last: Sequence[Standing]) -> dict[str, Any]:
        """Verify the finalists on the held-out images, one after the other, until one fails."""
        limits = self._config.budget
        # If no candidate can be within the budget, report the numbers of the best one.
        queue = in_order_of_safety(finalists) or [max(last, key=lambda one: one.difference)]
        passed: list[Standing] = []
        verified: list[Standing] = []
        reason = ""
        for one in queue:
            timed = self._timed([one.candidate], HELD_OUT)
            (found,) = self._standings(timed, self._held_out, HELD_OUT)
            verified.append(found)
            reason = _failure(found, self._fast(found.candidate))
            if reason:
                break
            passed.append(found)
        self._note("held out", verified, {verified[-1].candidate.name: reason} if reason else {})
        best = max(verified, key=lambda one: one.difference)
        return self._evidence(
            min(passed, key=lambda one: one.candidate.costs[limits.minimise], default=None),
            {**varied(best.candidate, self._config), "difference": round(best.difference, 4)},
            f"no config of the space is shown to stay within the budget: {reason}",
        )

    def _evidence(self, chosen: Standing | None, best: dict[str, Any], otherwise: str) -> dict[str, Any]:
        """Return the evidence; ``otherwise`` is the reason if nothing was chosen."""
        return {
            "chosen": None if chosen is None else chosen.candidate.skip.model_dump(),
            "costs": None if chosen is None else dict(chosen.candidate.costs),
            "verdict": None if chosen is None else asdict(chosen.verdict),
            "best": best,
            "reason": otherwise if chosen is None else "",
            "history": self._history,
        }

    def _note_slow(self, slow: Sequence[Candidate]) -> None:
        """Add the candidates over the limit on latency to the history. They are not evaluated further."""
        for one in slow:
            unknown = dict.fromkeys(("difference", "low", "high", "full"))
            self._history.append(
                {
                    "stage": "latency",
                    "name": one.name,
                    "values": varied(one, self._config),
                    "costs": dict(one.costs),
                    **unknown,
                    "items": 0,
                    "out": "time to the first token over the limit",
                }
            )

    def _note(self, stage: str, standings: Sequence[Standing], out: Mapping[str, str]) -> None:
        for one in standings:
            found = one.verdict.found
            self._history.append(
                {
                    "stage": stage,
                    "name": one.candidate.name,
                    "values": varied(one.candidate, self._config),
                    "costs": dict(one.candidate.costs),
                    "difference": found.difference,
                    "low": one.verdict.worst,
                    "high": one.verdict.best,
                    "full": found.reference,
                    "items": found.items,
                    "out": out.get(one.candidate.name, ""),
                }
            )
        say(f"{stage}: {len(standings) - len(out)} of {len(standings)} configs continue")


def _failure(one: Standing, fast: bool) -> str:
    """Return the reason why a finalist fails on the held-out rows, or an empty text."""
    verdict = one.verdict
    if not fast:
        latency = one.candidate.costs["latency"]
        return f"its time to the first token on the held-out rows is {latency:.2f} of full tokens"
    if verdict.outcome == "within":
        return ""
    difference = (
        f"a difference of {100 * verdict.found.difference:+.1f} points ({100 * verdict.worst:+.1f} at worst)"
    )
    more = f"; about {verdict.needed} items would be needed to decide" if verdict.needed else ""
    allowed = f"{-100 * verdict.budget:g} is allowed"
    return f"{difference} on {verdict.found.items} held-out items, where {allowed}{more}"


def varied(candidate: Candidate, config: CalibrateConfig) -> dict[str, Any]:
    """Return the candidate's values of the fields that are searched."""
    return {name: getattr(candidate.skip, name) for name in config.space}
