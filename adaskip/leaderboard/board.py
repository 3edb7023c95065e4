"""Makes what a leaderboard shows of one context length, part by part; whatever exists is kept.

Plans come first, then the losses of the test rows under each, then the times of all of them by
turns: those want a quiet machine, and may be taken on another day.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from transformers import PreTrainedModel

from adaskip.entering import skipping
from adaskip.errors import AdaskipError
from adaskip.leaderboard.settings import LeaderboardFile, Point
from adaskip.methods import make_plan
from adaskip.plan import EMPTY_PLAN, SkipPlan, Sublayer
from adaskip.policies import FixedSkipping
from adaskip.profiling.calibration import random_prompt
from adaskip.profiling.interleaving import by_turns
from adaskip.profiling.timing import RequestTimes, time_request
from adaskip.runs.calibration import calibration_rows
from adaskip.runs.environment import environment
from adaskip.runs.loaded import LoadedModel
from adaskip.runs.perplexity import reference_perplexity
from adaskip.runs.rows import Stored
from adaskip.runs.runconfig import DENSE, RunConfig
from adaskip.runs.runner import resolve
from adaskip.runs.store import Store
from adaskip.search import search_plan
from adaskip.search.losses import Row as CalibrationRow
from adaskip.sublayer_times import replacement_name
from adaskip.tasks.prompts import Prompt
from adaskip.tasks.spec import Row

# Decode steps of a request that is timed.
STEPS = 16


class PlanRow(Stored):
    """A plan that was made, or why there is none.

    Attributes:
        id: of its point.
        about: what the plan tells of itself; empty if there is none.
        replaced: by what each sublayer is replaced.
        error: why the method reaches no such acceleration.
    """

    id: str
    about: dict[str, Any] = Field(default_factory=dict)
    replaced: dict[str, str] = Field(default_factory=dict)
    error: str | None = None


class LossRow(Stored):
    """`[nll, tokens]` of each test row's reference under a plan; `id` is its point's."""

    id: str
    rows: dict[str, list[float | int]]


class TimesRow(Stored):
    """Times of a plan: one value per round, in seconds; `id` is its point's.

    Attributes:
        ttft: of prefill.
        per_token: of a decode step.
        kv_bytes: held at the end of a request.
    """

    id: str
    ttft: list[float]
    per_token: list[float]
    kv_bytes: int


@dataclass
class Board:
    """One context length of a leaderboard.

    Attributes:
        file: what is compared.
        context: prompt tokens.
        folder: of the leaderboard's results.
    """

    file: LeaderboardFile
    context: int
    folder: Path

    def make_plans(self, *, progress: bool = True) -> None:
        """Makes the plans that are missing: those without a row, and those without their file."""
        store = self.plans
        tried = {row.id: row for row in store.rows()}
        for point in self.file.points(self.context):
            failed = point.name in tried and tried[point.name].error is not None
            if not failed and not (point.name in tried and self.path_of(point).exists()):
                store.append([self._made(point, progress=progress)])

    def score(self, *, progress: bool = True) -> None:
        """Scores the test rows under the plans that have no losses yet, dense first."""
        store = self.losses
        done = {row.id for row in store.rows()}
        for name, plan in self._found().items():
            if name in done:
                continue
            found = reference_perplexity(
                self._model,
                self._loaded.tokenizer,
                FixedSkipping(plan),
                self._items,
                max_tokens=self.file.reference_tokens,
                progress=progress,
            )
            rows = {
                row.id: [loss.nll, loss.tokens]
                for row, loss in zip(self._test_rows, found.rows, strict=True)
            }
            store.append([LossRow(id=name, rows=rows)])

    def time(self, *, progress: bool = True) -> None:
        """Times requests under all plans by turns, unless that was done for these plans."""
        store, plans = self.times, self._found()
        if {row.id for row in store.rows()} == {*plans}:
            return
        ids = random_prompt(self._model, self.context)
        kinds = {name: partial(self._request, plan, ids) for name, plan in plans.items()}
        self._request(EMPTY_PLAN, ids)
        rounds = [
            *by_turns(
                kinds, rounds=self.file.rounds, title=f"{self.context} tokens", progress=progress
            )
        ]
        store.path.unlink(missing_ok=True)
        taken = {name: [each[name][0] for each in rounds] for name in plans}
        store.append(
            [
                TimesRow(
                    id=name,
                    ttft=[request.ttft for request in own],
                    per_token=[request.per_token for request in own],
                    kv_bytes=own[0].kv_bytes,
                )
                for name, own in taken.items()
            ]
        )
        store.note(environment=environment(str(self._model.device)))

    @property
    def plans(self) -> Store[PlanRow]:
        """What was made of each point."""
        return self._store(
            "plans",
            PlanRow,
            calibration_rows=self.file.calibration_rows,
            calibration_tokens=self.file.calibration_tokens,
            phase=self.file.phase,
            planned_at=self._planned_at,
        )

    @property
    def losses(self) -> Store[LossRow]:
        """Losses of each point, and of the dense model."""
        return self._store(
            "losses", LossRow, rows=self.n_rows, reference_tokens=self.file.reference_tokens
        )

    @property
    def times(self) -> Store[TimesRow]:
        """Times of each point, and of the dense model."""
        return self._store("times", TimesRow, rounds=self.file.rounds)

    def path_of(self, point: Point) -> Path:
        """Where a plan lies."""
        name = point.name.replace(" ", "-")
        return self.folder / "plans" / f"{self._name}-{name}.safetensors"

    @property
    def _planned_at(self) -> int:
        return self.file.contexts[self.context].planned_at or self.context

    @property
    def n_rows(self) -> int:
        """Test rows."""
        return self.file.contexts[self.context].rows or self.file.rows

    @property
    def _name(self) -> str:
        return f"{self.file.model}-{self.context}"

    def _store(self, part: str, kind: type[Any], **settings: Any) -> Store[Any]:
        settings |= {"model": self.file.model, "task": self.file.task, "context": self.context}
        return Store(self.folder / f"{self._name}-{part}.json", kind, settings)

    def _made(self, point: Point, *, progress: bool) -> PlanRow:
        method, *rest = point.method.split()
        menu: Any = rest  # names that the search checks
        settings: dict[str, Any] = {
            "acceleration": point.acceleration,
            "phase": self.file.phase,
            "context": self._planned_at,
            "source": f"{self.file.calibration_rows} warm-up rows of {self.file.task}, "
            f"{self.file.calibration_tokens} tokens",
            "progress": progress,
        }
        # All plans are made from the same rows, so that one record serves them.
        settings["record"] = self.folder / "plans" / f"{self.file.model}.jsonl"
        try:
            if menu:
                plan = search_plan(self._model, self._calibration, replacements=menu, **settings)
            else:
                plan = make_plan(self._model, self._calibration, method, **settings)
        except AdaskipError as error:
            if "reach" not in str(error):
                raise
            return PlanRow(id=point.name, error=str(error))
        plan.save(self.path_of(point))
        replaced = {str(sublayer): _told(plan, sublayer) for sublayer in plan}
        return PlanRow(id=point.name, about=plan.facts, replaced=replaced)

    def _found(self) -> dict[str, SkipPlan]:
        """The plans that exist, dense first."""
        made = {row.id for row in self.plans.rows() if row.error is None}
        points = [point for point in self.file.points(self.context) if point.name in made]
        return {DENSE: EMPTY_PLAN} | {
            point.name: SkipPlan.load(self.path_of(point)) for point in points
        }

    def _request(self, plan: SkipPlan, ids: torch.Tensor) -> RequestTimes:
        with skipping(self._model, plan):
            return time_request(self._model, ids, STEPS)

    @cached_property
    def _loaded(self) -> LoadedModel:
        return LoadedModel.open(self._config(self.context))

    @cached_property
    def _model(self) -> PreTrainedModel:
        return self._loaded.model

    @cached_property
    def _test_rows(self) -> list[Row]:
        return self._loaded.rows(self._config(self.context), self.file.task)

    @cached_property
    def _items(self) -> list[tuple[Prompt, str]]:
        config = self._config(self.context)
        return [(self._loaded.prompt(config, row), row.reference) for row in self._test_rows]

    @cached_property
    def _calibration(self) -> list[CalibrationRow]:
        file, config = self.file, self._config(self.file.calibration_tokens)
        n_rows, n_tokens = file.calibration_rows, file.reference_tokens
        return calibration_rows(self._loaded, config, [file.task], n_rows, n_tokens)

    def _config(self, tokens: int) -> RunConfig:
        """The dense run whose rows have contexts of so many tokens."""
        return resolve(
            RunConfig(
                experiment="e2e",
                model_name=self.file.model,
                policy=DENSE,
                tasks=(self.file.task,),
                sample_tokens=tokens,
                limit=self.n_rows,
            )
        )


def _told(plan: SkipPlan, sublayer: Sublayer) -> str:
    """What takes a sublayer's place, for people."""
    replacement = plan[sublayer]
    return (
        f"gain {replacement:.3f}"
        if isinstance(replacement, float)
        else ("nothing" if replacement is None else replacement_name(replacement))
    )
