"""Makes the plans of a leaderboard and measures them, part by part; whatever exists is kept.

Plans come first, then the losses of the test rows and the scores of tasks under each, then the
times of all of them by turns: those want a quiet machine, and may be taken on another day.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path, PurePath
from typing import Any

from adaskip.distilling import can_learn, distill_plan
from adaskip.errors import AdaskipError, RunError
from adaskip.fingerprint import fingerprint_name, model_fingerprint
from adaskip.fitting import refit_linears
from adaskip.leaderboard.board import Board
from adaskip.leaderboard.restoring import put_together, replaced, stand_in, take_as_long
from adaskip.leaderboard.rows import LossRow, PlanRow, ScoreRow
from adaskip.leaderboard.settings import Point
from adaskip.leaderboard.sittings import Sittings
from adaskip.methods import make_plan
from adaskip.plan import EMPTY_PLAN, SkipPlan
from adaskip.policies import FixedSkipping
from adaskip.policies.made_plan import PlanFile
from adaskip.runs.calibration import calibration_rows
from adaskip.runs.files import writing
from adaskip.runs.loaded import LoadedModel
from adaskip.runs.perplexity import reference_ids, reference_perplexity
from adaskip.runs.runconfig import DENSE, RunConfig
from adaskip.runs.runner import resolve, run
from adaskip.runs.scoring import score_run
from adaskip.runs.store import Store
from adaskip.search import SEARCH, search_plan
from adaskip.search.rows import Row as CalibrationRow, reads
from adaskip.tasks.prompts import Prompt
from adaskip.tasks.spec import Row


@dataclass
class Maker:
    """Makes what is missing of a board.

    Attributes:
        board: what is made, and where it is kept.
        open_model: gives the loaded model when something is computed.
        progress: whether to show progress bars.
    """

    board: Board
    open_model: Callable[[], LoadedModel]
    progress: bool = True

    def make(self, part: str) -> None:
        """Makes what is missing of one of `PARTS`.

        Raises:
            AdaskipError: the model, the data or what exists does not fit.
        """
        PARTS[part](self)

    def make_plans(self) -> None:
        """Makes the plans that are missing, and those that were made from or for something else.

        One whose file is gone is put together again if losses or scores are still to be measured
        under it, or made anew where that cannot be. Times take no file.
        """
        board, store = self.board, self.board.plans
        made = {row.id: row for row in store.rows()}
        lacking = {*board.lacking(board.losses)}
        lacking |= {name for name in board.untimed if not made[name].replaced}
        lacking |= {name for task in board.file.scores for name in board.unscored(task)}
        for point in board.points:
            row = made.get(point.name)
            make = self._made if point.fit_rows is None else self._refitted
            if row is None or row.recipe != board.recipe(point):
                self._put(make(point), row)
            elif point.name in lacking and board.plan_of(point, row) is None:
                self._put(self._again(point, row) or make(point), row)

    def _put(self, made: PlanRow, before: PlanRow | None) -> None:
        """Writes down what was made of a point; it keeps the times of what was there if it may."""
        if before is not None and made.replaced and take_as_long(made.replaced, before.replaced):
            now, was = {"plan_digest": made.plan_digest}, (made.id, before.plan_digest)
            for store in self.board.sittings:
                timed = [row for row in store.rows() if (row.id, row.plan_digest) == was]
                if timed:
                    store.append([row.model_copy(update=now) for row in timed])
        self.board.plans.append([made])

    def measure_losses(self) -> None:
        """Scores the test rows under the plans that have no losses yet, dense first."""
        store = self.board.losses
        lacking = self._plans(self.board.lacking(store))
        if lacking:
            self._hold(store, self._items)
        for name, plan in lacking.items():
            found = reference_perplexity(
                self._model,
                self._loaded.tokenizer,
                FixedSkipping(plan),
                [*self._items.values()],
                max_tokens=self.board.file.reference_tokens,
                progress=self.progress,
            )
            losses = zip(self._items, found.rows, strict=True)
            rows = {row: [loss.nll, loss.tokens] for row, loss in losses}
            store.append([LossRow(id=name, plan_digest=plan.digest, rows=rows)])
        if store.rows() and "characters" not in store.record():
            store.note(**self._lengths())

    def measure_scores(self) -> None:
        """Generates and scores the answers that are missing, dense first."""
        for task in self.board.file.scores:
            store = self.board.scores(task)
            lacking = self._plans(self.board.unscored(task))
            if lacking:
                self._hold(store, self._asked(self._run_config(task, DENSE)))
            for name, plan in lacking.items():
                config = self._run_config(task, name)
                scores = score_run(run(config, self._loaded)).tasks[task].row_scores
                store.append([ScoreRow(id=name, plan_digest=plan.digest, rows=scores)])

    def measure_times(self) -> None:
        """Times dense and the plans that have no times yet, by turns.

        In the place of a plan whose file is gone one is timed that has the same in every place, but
        for the numbers of linear maps.
        """
        Sittings(self.board, lambda: self._model, self._timed, self.progress).take()

    def _hold(self, store: Store[Any], items: Mapping[str, tuple[Prompt, str]]) -> None:
        """Refuses to put beside what is there what has another model, precision or prompt."""
        sources = {
            name: hashlib.sha256(json.dumps([prompt.text, reference]).encode()).hexdigest()[:12]
            for name, (prompt, reference) in items.items()
        }
        store.hold(model_fingerprint(self._model), sources)
        here = f"{str(self._model.dtype).removeprefix('torch.')} on {self._model.device.type}"
        before = store.record().get("computed_in", here)
        if before != here:
            raise RunError(
                f"{store.path} was computed in {before}, it is now {here}, and methods would not "
                "compare: compute what is missing there, or delete the file to compute all here."
            )
        store.note(computed_in=here)

    def _plans(self, names: Sequence[str]) -> dict[str, SkipPlan]:
        """The plans of some points, all of which are there before anything is measured."""
        return {name: self.board.plan(name) for name in names}

    def _timed(self, name: str) -> SkipPlan:
        """The plan of a point, or one that takes as long."""
        plan = EMPTY_PLAN if name == DENSE else self._choice(self.board.point(name))
        # It says what to do about a plan that is gone.
        return self.board.plan(name) if plan is None else plan

    def _choice(self, point: Point) -> SkipPlan | None:
        """The plan of a point, or one that has the same in every place but for linear maps."""
        row = self.board.made.get(point.name)
        if row is None:
            return None
        plan = self.board.plan_of(point, row)
        return stand_in(self._model, row) if plan is None else plan

    def _made(self, point: Point) -> PlanRow:
        board, recipe = self.board, self.board.recipe(point)
        method = point.method.split()[0]
        settings: dict[str, Any] = {
            "acceleration": point.acceleration,
            "phase": board.file.phase,
            "context": board.context,
            "source": recipe["calibration"],
            "record": self._record(point),
            "progress": self.progress,
        }
        rows = self._calibration(point)
        try:
            if method == SEARCH:
                settings |= {"replacements": point.menu} if point.menu else {}
                settings |= {"rank": point.rank, "kv_share": point.kv_share}
                plan = search_plan(self._model, rows, **settings)
            else:
                plan = make_plan(self._model, rows, method, **settings)
        except AdaskipError as error:
            if "reach" not in str(error):
                raise
            return PlanRow(id=point.name, recipe=recipe, error=str(error))
        return self._kept(point, plan)

    def _refitted(self, point: Point) -> PlanRow:
        """The plan of a method with its linear maps fitted anew on more rows, or trained, too."""
        board, n_rows = self.board, point.fit_rows
        plan = self._choice(point.unfitted)
        trains = point.is_distilled
        if plan is None or not (can_learn(plan) if trains else plan.has_linears):
            lacks = "gain and no linear map to train" if trains else "linear map to fit anew"
            error = f"{point.unfitted.name} has no {lacks}."
            return PlanRow(id=point.name, recipe=board.recipe(point), error=error)
        done = "distilled on" if trains else "its linear maps fitted on"
        source = f"{plan.about['calibration']}; {done} {n_rows}"
        about = dict(plan.about) | {"calibration": source}
        plan = SkipPlan(plan, fingerprint=plan.fingerprint, about=about)
        prompts = reads(self._calibration(point, n_rows))
        told: dict[str, Any] = {"source": f"{n_rows} rows", "progress": self.progress}
        if plan.has_linears:
            plan = refit_linears(self._model, plan, prompts, **told)
        record = board.path_of(point).with_suffix(".distilling")
        if trains:
            plan = distill_plan(self._model, plan, prompts, record=record, **told)
        made = self._kept(point, plan)
        record.unlink(missing_ok=True)
        return made

    def _again(self, point: Point, row: PlanRow) -> PlanRow | None:
        """A plan put together again from what is known of it; None if that is too little."""
        plan = put_together(self._model, row, partial(self._calibration, point, point.fit_rows))
        return None if plan is None else self._kept(point, plan)

    def _kept(self, point: Point, plan: SkipPlan) -> PlanRow:
        """Writes a plan's file, and what the board has of it."""
        path = self.board.path_of(point)
        with writing(path):
            plan.save(path)
        return PlanRow(
            id=point.name,
            recipe=self.board.recipe(point),
            plan_digest=plan.digest,
            about=plan.facts,
            model=fingerprint_name(plan.fingerprint),
            replaced=replaced(plan),
        )

    def _record(self, point: Point) -> Path:
        """Where what was computed on the same calibration rows is kept: it serves all plans."""
        recipe = self.board.recipe(point)
        shared = {key: recipe[key] for key in ("calibration", "reference_tokens")}
        digest = hashlib.sha256(json.dumps(shared).encode()).hexdigest()[:8]
        return self.board.folder / "plans" / f"{PurePath(self.board.model).name}-{digest}.jsonl"

    @cached_property
    def _loaded(self) -> LoadedModel:
        return self.open_model()

    @property
    def _model(self) -> Any:
        return self._loaded.model

    @cached_property
    def _items(self) -> Mapping[str, tuple[Prompt, str]]:
        """Prompt and reference of each test row."""
        return self._asked(dense_config(self.board, limit=self.board.n_rows))

    def _asked(self, config: RunConfig) -> Mapping[str, tuple[Prompt, str]]:
        """Prompt and reference of each row of a run of one task."""
        rows: list[Row] = self._loaded.rows(config, config.tasks[0])
        return {row.id: (self._loaded.prompt(config, row), row.reference) for row in rows}

    def _lengths(self) -> dict[str, Any]:
        """Characters of each prompt, and of what counts of its reference."""
        tokenizer, n_tokens = self._loaded.tokenizer, self.board.file.reference_tokens
        characters = {
            name: len(str(tokenizer.decode(reference_ids(tokenizer, *item, n_tokens))))
            for name, item in self._items.items()
        }
        prompts = {name: len(prompt.text) for name, (prompt, _) in self._items.items()}
        return {"characters": characters, "prompt_characters": prompts}

    def _calibration(self, point: Point, n_rows: int | None = None) -> list[CalibrationRow]:
        """The rows that a point is made from, or so many of them and those that follow."""
        asked = self.board.file.calibration(self.board.context, point)
        seed = {} if asked.seed is None else {"seed": asked.seed}
        config = dense_config(self.board, tasks=[asked.task], sample_tokens=asked.tokens, **seed)
        n_tokens = self.board.file.reference_tokens
        return calibration_rows(self._loaded, config, [asked.task], n_rows or asked.rows, n_tokens)

    def _run_config(self, task: str, name: str) -> RunConfig:
        """The run that generates a task's answers under a plan."""
        asked = self.board.file.scores[task]
        own: dict[str, Any] = {"name": f"{self.board.name}-{DENSE}"}
        if name != DENSE:
            path = str(self.board.path_of(self.board.point(name)))
            # A plan that is made anew has a run of its own.
            own = {"name": PlanFile.read(path).name, "policy": "PLAN", "plan": path}
        own |= {"max_new_tokens": asked.new_tokens, "limit": asked.rows}
        return dense_config(self.board, tasks=[task], **own)


def dense_config(board: Board, **changes: Any) -> RunConfig:
    """The dense run of a board's test rows, or one that differs in some settings."""
    given = {
        "experiment": "e2e",
        "model_name": board.model,
        "policy": DENSE,
        "tasks": [board.file.task],
        "sample_tokens": board.context,
        "results_dir": str(board.folder / "runs"),
    }
    return resolve(RunConfig.from_dict(given | changes))


PARTS: dict[str, Callable[[Maker], None]] = {
    "plans": Maker.make_plans,
    "losses": Maker.measure_losses,
    "scores": Maker.measure_scores,
    "times": Maker.measure_times,
}
