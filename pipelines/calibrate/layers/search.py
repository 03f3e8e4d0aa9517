"""The greedy path: in each round, the move that adds the least divergence for the FLOPs that it saves."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.calibrate.layers.divergence import LayerTask, with_answers
from pipelines.calibrate.layers.moves import before_all, everywhere, moves
from pipelines.calibrate.layers.prompts import Prompts
from pipelines.calibrate.pool import RunTasks
from pipelines.calibrate.pricing import Pricing
from pipelines.data.rows import TrainingRow
from pipelines.shared.console import say
from pipelines.shared.folder import JobFolder
from skipvision.config import SkipConfig
from skipvision.errors import ConfigError, DataError

_LEAST_SAVING = 1e-6
"""A move must save more than this share of the prefill FLOPs of full tokens."""


@dataclass(frozen=True)
class Space:
    """The configs that a model supports, with their costs.

    Attributes:
        layers: decoder layers.
        block: adjacent layers that a move changes together.
        pricing: predicts costs.
        supports: raises `ConfigError` for a config that the model cannot run under.
    """

    layers: int
    block: int
    pricing: Pricing
    supports: Callable[[SkipConfig], None]

    def cheaper(self, skip: SkipConfig) -> dict[str, SkipConfig]:
        """Return the supported configs one move away that cost less, by move."""
        limit = self.cost(skip) - _LEAST_SAVING
        found = moves(skip, self.layers, self.block)
        return {move: one for move, one in found.items() if self.is_supported(one) and self.cost(one) < limit}

    def is_supported(self, skip: SkipConfig) -> bool:
        """Whether the model can run under a config."""
        try:
            self.supports(skip)
        except ConfigError:
            return False
        return True

    def cost(self, skip: SkipConfig) -> float:
        """Return the prefill FLOPs as a ratio to full tokens."""
        return self.pricing.costs(skip)["prefill_flops"]

    def cheapest(self, skip: SkipConfig) -> SkipConfig:
        """Return the config at the end of any path from ``skip``."""
        while found := self.cheaper(skip):
            skip = min(found.values(), key=self.cost)
        return skip


class LayerSearch:
    """One search. Earlier measurements are read from the job's folder."""

    def __init__(self, folder: JobFolder, run_tasks: RunTasks, prompts: Prompts, space: Space) -> None:
        self._folder, self._run_tasks, self._space = folder, run_tasks, space
        self._rows = {
            "search": self._answered("search", prompts.search),
            "held out": self._answered("held out", prompts.held_out),
        }
        self._history: list[dict[str, Any]] = []

    def run(self, base: SkipConfig, budget: float) -> dict[str, Any]:
        """Move until the prefill FLOPs are within the budget, verify, and return the evidence as JSON."""
        start, every = before_all(base), everywhere(base)
        current = start
        self._measure("search", [start, every])
        self._note("start", "", start, "search")
        self._note("compared", "skip in every layer", every, "search")
        number = 0
        while self._space.cost(current) > budget:
            number += 1
            options = self._space.cheaper(current)
            self._measure("search", list(options.values()))
            move = min(options, key=lambda name: self._price(current, options[name]))
            for name, one in options.items():
                self._note("chosen" if name == move else "option", name, one, "search", round_=number)
            current = options[move]
            say(f"round {number}: {move}, prefill FLOPs {100 * self._space.cost(current):.1f} %")
        self._measure("held out", [start, every, current])
        for stage, one in (("start", start), ("compared", every), ("chosen", current)):
            self._note(stage, "", one, "held out")
        return {
            "chosen": current.model_dump(),
            "costs": self._space.pricing.costs(current),
            "best": None,
            "reason": "",
            "history": self._history,
        }

    def _price(self, before: SkipConfig, after: SkipConfig) -> float:
        """Return the divergence that a move adds per share of FLOPs that it saves."""
        added = self._divergence(after) - self._divergence(before)
        saved = self._space.cost(before) - self._space.cost(after)
        # A move that adds nothing is best where it saves most.
        return added / saved if added > 0 else added * saved - saved

    def _divergence(self, skip: SkipConfig) -> float:
        return statistics.fmean(one[0] for one in self._known("search", skip))

    def _answered(self, part: str, prompts: Sequence[TrainingRow]) -> tuple[TrainingRow, ...]:
        """Return the rows with the answers of the model with full tokens."""
        answers: dict[str, list[str]] = dict(self._folder.state.get("answers", {}))
        if part not in answers:
            say(f"the model with full tokens answers {len(prompts)} prompts ({part})")
            for _, texts in self._run_tasks([LayerTask(tuple(prompts), None)]):
                answers[part] = texts
            self._folder.remember(answers=answers)
        rows = with_answers(prompts, answers[part])
        if not rows:
            raise DataError(
                f"the model with full tokens has an empty answer to each of {len(prompts)} prompts ({part}), "
                "so there is nothing to compare: use other prompts"
            )
        return rows

    def _known(self, part: str, skip: SkipConfig) -> list[Sequence[float]]:
        found: list[Sequence[float]] = self._folder.state["divergences"][self._key(part, skip)]
        return found

    def _key(self, part: str, skip: SkipConfig) -> str:
        return f"{part} {self._space.pricing.name(skip)}"

    def _measure(self, part: str, configs: Sequence[SkipConfig]) -> None:
        """Measure the configs that were not measured yet on the rows of a part."""
        known: dict[str, Any] = dict(self._folder.state.get("divergences", {}))
        rows = self._rows[part]
        tasks = [LayerTask(rows, skip) for skip in configs if self._key(part, skip) not in known]
        for task, distances in self._run_tasks(tasks):
            known[self._key(part, task.skip)] = [list(one) for one in distances]
            self._folder.remember(divergences=known)

    def _note(self, stage: str, move: str, skip: SkipConfig, part: str, round_: int = 0) -> None:
        distances = self._known(part, skip)
        divergences = [one[0] for one in distances]
        spread = statistics.stdev(divergences) / len(divergences) ** 0.5 if len(divergences) > 1 else None
        self._history.append(
            {
                "part": part,
                "round": round_,
                "stage": stage,
                "move": move,
                "skip": skip.model_dump(include={"skip_ffn", "skip_layers", "drop_after"}),
                "costs": self._space.pricing.costs(skip),
                "rows": len(distances),
                "divergence": statistics.fmean(divergences),
                "standard_error": spread,
                "agreement": statistics.fmean(one[1] for one in distances),
            }
        )


def chosen_line(evidence: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the history's line of the chosen config on the held-out rows."""
    lines: list[Mapping[str, Any]] = evidence["history"]
    return next(one for one in lines if (one["part"], one["stage"]) == ("held out", "chosen"))
