"""One model at one context length of a leaderboard: what is kept of it, and where.

Whatever was measured names the plan it was measured under. What was measured under an earlier plan
of the same point does not count any more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, TypeVar

from adaskip.errors import PlanError
from adaskip.leaderboard.rows import (
    DENSE_DIGEST,
    LossRow,
    PlanRow,
    PlanValues,
    ScoreRow,
    TimesRow,
)
from adaskip.leaderboard.settings import LeaderboardFile, Point
from adaskip.plan import EMPTY_PLAN, SkipPlan
from adaskip.runs.runconfig import DENSE
from adaskip.runs.store import Store

V = TypeVar("V", bound=PlanValues)


@dataclass(frozen=True)
class Board:
    """One model at one context length.

    Attributes:
        file: what is compared.
        model: its name.
        context: prompt tokens.
        folder: of the leaderboard's results.
    """

    file: LeaderboardFile
    model: str
    context: int
    folder: Path

    @property
    def name(self) -> str:
        """What its files begin with."""
        return f"{PurePath(self.model).name}-{self.context}"

    @property
    def points(self) -> list[Point]:
        """All that is made here, in the file's order."""
        file, here = self.file, self.context
        return [*file.main(here), *file.others(self.model, here)]

    @property
    def n_rows(self) -> int:
        """Test rows whose references are scored."""
        return self.file.contexts[self.context].rows or self.file.rows

    @property
    def n_rounds(self) -> int:
        """Rounds in which times are taken."""
        return self.file.contexts[self.context].rounds or self.file.rounds

    @property
    def plans(self) -> Store[PlanRow]:
        """What was made of each point."""
        return self._store("plans", PlanRow)

    @property
    def losses(self) -> Store[LossRow]:
        """Losses of each point, and of the dense model."""
        length = self.file.reference_tokens
        return self._store("losses", LossRow, rows=self.n_rows, reference_tokens=length)

    @property
    def times(self) -> Store[TimesRow]:
        """Times of each point, and of the dense model."""
        return self._store("times", TimesRow)

    def scores(self, task: str) -> Store[ScoreRow]:
        """Scores of a task, of each point and of the dense model."""
        asked = self.file.scores[task]
        given = {"rows": asked.rows, "new_tokens": asked.new_tokens, "task": task}
        return self._store(f"scores-{task}", ScoreRow, **given)

    def path_of(self, point: Point) -> Path:
        """Where a plan lies."""
        name = point.name.replace(" ", "-")
        return self.folder / "plans" / f"{self.name}-{name}.safetensors"

    def recipe(self, point: Point) -> dict[str, Any]:
        """What a point's plan is made from and for, ready for JSON."""
        return {
            "calibration": str(self.file.calibration(self.context, point)),
            "reference_tokens": self.file.reference_tokens,
            "phase": str(self.file.phase),
            "planned_at": self.context,
            "rank": point.rank,
        }

    def plan_of(self, point: Point, row: PlanRow | None) -> SkipPlan | None:
        """The plan that a row tells of, None if its file is gone, or is another plan's."""
        path = self.path_of(point)
        if row is None or row.error is not None or not path.exists():
            return None
        plan = SkipPlan.load(path)
        return plan if plan.digest == row.plan_digest else None

    def found(self) -> dict[str, SkipPlan]:
        """The plans that exist by their points' names, the dense model's first.

        Raises:
            PlanError: the file of one is gone.
        """
        made = {row.id: row for row in self.plans.rows() if row.error is None}
        found = {DENSE: EMPTY_PLAN}
        for point in self.points:
            if point.name in made:
                plan = self.plan_of(point, made[point.name])
                if plan is None:
                    raise PlanError(
                        f"The plan {self.path_of(point)} is gone, or no longer the one that was "
                        "made; give --parts plans first, which makes it anew."
                    )
                found[point.name] = plan
        return found

    def missing(self, store: Store[V], plans: Mapping[str, SkipPlan]) -> dict[str, SkipPlan]:
        """Those of some plans of which a store has nothing, or something of an earlier plan."""
        kept = {row.id: row.plan_digest for row in store.rows()}
        return {name: p for name, p in plans.items() if kept.get(name) != p.digest}

    def known(self, store: Store[V]) -> dict[str, V]:
        """What a store has of the plans that there are now, by their points' names."""
        digests = {row.id: row.plan_digest for row in self.plans.rows() if row.error is None}
        digests[DENSE] = DENSE_DIGEST
        return {r.id: r for r in store.rows() if digests.get(r.id) == r.plan_digest}

    def _store(self, part: str, kind: type[Any], **settings: Any) -> Store[Any]:
        common = {"model": self.model, "task": self.file.task, "context": self.context}
        return Store(self.folder / f"{self.name}-{part}.json", kind, common | settings)
