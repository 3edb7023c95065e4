"""One model at one context length of a leaderboard: what is kept of it, and where.

Whatever was measured names the plan it was measured under. What was measured under an earlier plan
of the same point does not count any more.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, TypeVar

from adaskip.distilling import RATE, TWICE
from adaskip.errors import PlanError
from adaskip.leaderboard.restoring import take_as_long
from adaskip.leaderboard.rows import (
    DENSE_DIGEST,
    LossRow,
    PlanRow,
    PlanValues,
    ScoreRow,
    Timed,
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

    def point(self, name: str) -> Point:
        """The one of a name."""
        return next(point for point in self.points if point.name == name)

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

    def sitting(self, number: int) -> Store[TimesRow]:
        """Times of points that took turns with each other and with the dense model, from 1 on."""
        return self._store("times" if number == 1 else f"times-{number}", TimesRow)

    @property
    def sittings(self) -> list[Store[TimesRow]]:
        """Those that there are, in their order."""
        later = self.folder.glob(f"{self.name}-times-*.json")
        numbers = [text for path in later if (text := path.stem.rpartition("-")[2]).isdigit()]
        stores = map(self.sitting, sorted({1, *map(int, numbers)}))
        return [store for store in stores if store.path.exists()]

    @property
    def timed(self) -> dict[str, list[Timed]]:
        """Times of the plans that there are now, beside those of the dense model, by sitting.

        A plan whose linear maps were fitted anew has those of the plan that it was before: maps and
        gains take as long whatever their numbers are.
        """
        found: dict[str, list[Timed]] = {}
        for number, store in enumerate(self.sittings, start=1):
            known = self.known(store)
            if dense := known.pop(DENSE, None):
                for name, own in known.items():
                    found.setdefault(name, []).append(Timed(number, own, dense))
        chosen = self._same_choice
        return found | {n: found[of] for n, of in chosen.items() if n not in found and of in found}

    @property
    def to_time(self) -> list[str]:
        """Points whose times are still to be taken."""
        timed, chosen = self.timed, self._same_choice
        return [name for name in self.made if name not in timed and name not in chosen]

    @property
    def _same_choice(self) -> dict[str, str]:
        """Of each point whose linear maps are fitted anew the one that they were fitted for."""
        rows, fitted = self.made, [p for p in self.points if p.fit_rows is not None]
        pairs = ((point.name, point.unfitted.name) for point in fitted)
        return {
            name: chosen
            for name, chosen in pairs
            if name in rows
            and chosen in rows
            and take_as_long(rows[name].replaced, rows[chosen].replaced)
        }

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
        recipe = {
            "calibration": str(self.file.calibration(self.context, point)),
            "reference_tokens": self.file.reference_tokens,
            "phase": str(self.file.phase),
            "planned_at": self.context,
            "rank": point.rank,
        }
        if point.fit_rows is not None:
            chosen = self.made.get(point.unfitted.name)
            recipe["fit_rows"] = point.fit_rows
            recipe["fitted"] = None if chosen is None else chosen.plan_digest
            recipe |= {"distilled": f"{TWICE} times, rate {RATE:g}"} if point.is_distilled else {}
        return recipe

    def plan_of(self, point: Point, row: PlanRow | None) -> SkipPlan | None:
        """The plan that a row tells of, None if its file is gone, or is another plan's."""
        path = self.path_of(point)
        if row is None or row.error is not None or not path.exists():
            return None
        plan = SkipPlan.load(path)
        return plan if plan.digest == row.plan_digest else None

    @property
    def made(self) -> dict[str, PlanRow]:
        """What was made of each point that has a plan."""
        rows = {row.id: row for row in self.plans.rows() if row.error is None}
        return {point.name: rows[point.name] for point in self.points if point.name in rows}

    def plan(self, name: str) -> SkipPlan:
        """The plan of a point, or the dense model's.

        Raises:
            PlanError: its file is gone.
        """
        if name == DENSE:
            return EMPTY_PLAN
        point = self.point(name)
        plan = self.plan_of(point, self.made[name])
        if plan is None:
            raise PlanError(
                f"The plan {self.path_of(point)} is gone, or no longer the one that was made; "
                "give --parts plans first, which makes it anew."
            )
        return plan

    def lacking(self, store: Store[V]) -> list[str]:
        """The dense model and points with a plan of which a store of losses or scores has none."""
        known = self.known(store)
        return [name for name in (DENSE, *self.made) if name not in known]

    def unscored(self, task: str) -> list[str]:
        """Those that lack a task's scores, of the methods that are to have them."""
        methods = self.file.scores[task].methods
        asked = {p.name for p in self.points if methods is None or p.method in methods} | {DENSE}
        return [name for name in self.lacking(self.scores(task)) if name in asked]

    @property
    def untimed(self) -> list[str]:
        """Points with a plan that lack times, or rounds of them."""
        timed, wanted = self.timed, self.n_rounds
        lacks = {n for n, own in timed.items() if any(len(t.dense.ttft) < wanted for t in own)}
        return [name for name in self.made if name not in timed or name in lacks]

    def known(self, store: Store[V]) -> dict[str, V]:
        """What a store has of the plans that there are now, by the names of the file's points."""
        names = {DENSE, *self.made}
        return {name: row for name, row in self.current(store).items() if name in names}

    def current(self, store: Store[V]) -> dict[str, V]:
        """Likewise, of points that the file does not name (any more), too."""
        digests = {row.id: row.plan_digest for row in self.plans.rows() if row.error is None}
        digests[DENSE] = DENSE_DIGEST
        return {r.id: r for r in store.rows() if digests.get(r.id) == r.plan_digest}

    def _store(self, part: str, kind: type[Any], **settings: Any) -> Store[Any]:
        common = {"model": self.model, "task": self.file.task, "context": self.context}
        return Store(self.folder / f"{self.name}-{part}.json", kind, common | settings)
