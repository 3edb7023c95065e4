"""Reads what was made of a leaderboard into values; runs nothing."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from statistics import fmean, median
from typing import Any

from adaskip.leaderboard.board import Board
from adaskip.leaderboard.comparing import fronts, ratio_interval
from adaskip.leaderboard.draws import Draws
from adaskip.leaderboard.rows import LossRow, PlanRow, ScoreRow, Timed, TimesRow
from adaskip.leaderboard.settings import LeaderboardFile, Point
from adaskip.leaderboard.values import (
    BASE,
    COLLAPSE,
    Entry,
    Interval,
    Reference,
    Report,
    Score,
    Table,
    TaskFacts,
    first_search,
)
from adaskip.profiling.interleaving import Ratio
from adaskip.profiling.intervals import paired_interval
from adaskip.runs.environment import joined
from adaskip.runs.runconfig import DENSE
from adaskip.tasks.chance import at_chance
from adaskip.tasks.spec import task_spec


def collect(file: LeaderboardFile, boards: Iterable[Board]) -> Report:
    """What the boards of a file have; those without dense losses are left out.

    Raises:
        RunError: a file is damaged, or was made with other settings.
    """
    tables = [table for table in map(table_of, boards) if table is not None]
    return Report(file.task, file.reference_tokens, str(file.phase), tuple(tables))


def table_of(board: Board) -> Table | None:
    """What one board has; None before the dense losses are there.

    Raises:
        RunError: as `collect`.
    """
    kept = _Kept.of(board)
    if DENSE not in kept.losses:
        return None
    main = kept.entries(board.file.main(board.context))
    others = kept.entries(board.file.others(board.model, board.context))
    again = {(entry.method, entry.asked) for entry in others}
    others = [entry for entry in main if (entry.method, entry.asked) in again] + others
    record = board.losses.record()
    lengths = record.get("characters", {}), record.get("prompt_characters", {})
    references = {
        name: Reference(nll, int(tokens), *(known.get(name) for known in lengths))
        for name, (nll, tokens) in kept.losses[DENSE].rows.items()
    }
    sittings = kept.sittings
    nll, n_tokens = _sums(kept.losses[DENSE])
    return Table(
        model=board.model,
        context=board.context,
        headline=board.file.contexts[board.context].headline or board.file.headline,
        perplexity=math.exp(nll / n_tokens),
        rounds=tuple(len(dense.ttft) for dense in sittings),
        seconds=median(sittings[0].ttft) if sittings else None,
        per_token=median(sittings[0].per_token) if sittings else None,
        references=references,
        entries=tuple(_compared(main, main)),
        calibrations=tuple(_compared(others, main)),
        tasks=kept.tasks(),
        missing=kept.missing(),
        environment=joined(
            [
                store.record().get("environment", {})
                for store in board.sittings
                if sittings and len(board.known(store)) > 1
            ]
        ),
    )


@dataclass(frozen=True)
class _Kept:
    """What is on the disk of the plans that there are now."""

    board: Board
    plans: Mapping[str, PlanRow]
    losses: Mapping[str, LossRow]
    times: Mapping[str, Sequence[Timed]]
    scores: Mapping[str, Mapping[str, ScoreRow]]

    @classmethod
    def of(cls, board: Board) -> _Kept:
        return cls(
            board,
            {row.id: row for row in board.plans.rows()},
            board.known(board.losses),
            board.timed,
            {task: board.known(board.scores(task)) for task in board.file.scores},
        )

    @property
    def sittings(self) -> list[TimesRow]:
        """The dense model's times of each sitting that counts, that of most plans first."""
        timed = [each for taken in self.times.values() for each in taken]
        plans = Counter(each.sitting for each in timed)
        found = {each.sitting: each.dense for each in timed}
        return [found[number] for number, _ in plans.most_common()]

    def entries(self, points: Iterable[Point]) -> list[Entry]:
        """Those of the points whose plans can be compared, not compared yet."""
        names = self.losses.keys() - self._untimed
        return [self._entry(point) for point in points if point.name in names]

    @property
    def _untimed(self) -> set[str]:
        """Those without times where others have some: a predicted speed is no measured one."""
        return {*self.losses} - {DENSE, *self.times} if self.times else set()

    def missing(self) -> dict[str, str]:
        """Points that no table shows, and why."""
        asked, told = {point.name for point in self.board.points}, "has losses, but no times yet."
        found = {row.id: row.error for row in self.plans.values() if row.error}
        found |= dict.fromkeys(sorted(self._untimed), told)
        return {name: why for name, why in found.items() if name in asked}

    def tasks(self) -> dict[str, TaskFacts]:
        """What the dense model can do of the tasks that it was scored on."""
        found = {}
        for task, rows in self.scores.items():
            if DENSE in rows:
                values, chance = rows[DENSE].rows, task_spec(task).chance
                score = 100 * fmean(values.values())
                dense = Score(score, None, _interval(values, dict.fromkeys(values, 0.0)))
                guessed = at_chance(task, [*values.values()])
                percent = None if chance is None else 100 * chance
                found[task] = TaskFacts(len(values), dense, percent, guessed)
        return found

    def _entry(self, point: Point) -> Entry:
        about = self.plans[point.name].about
        own, dense = self.losses[point.name], self.losses[DENSE]
        lost = {name: (nll - dense.rows[name][0], n) for name, (nll, n) in own.rows.items()}
        by_row = {name: more / n for name, (more, n) in lost.items()}
        nats, tokens = map(math.fsum, zip(*lost.values(), strict=True))
        return Entry(
            method=point.method,
            asked=point.acceleration,
            variant=point.variant,
            calibration=str(about.get("calibration", "")),
            predicted=float(about["predicted acceleration"]),
            **self._measured(point.name),
            gap=nats / tokens,
            interval=ratio_interval([*lost.values()]),
            by_row=by_row,
            collapsed=sum(gap > COLLAPSE for gap in by_row.values()),
            front=False,
            beside={},
            scores=self._scores(point.name),
        )

    def _measured(self, name: str) -> dict[str, Any]:
        if name not in self.times:
            return {"by_round": {}, **dict.fromkeys(("seconds", "ttft", "per_token", "kv_share"))}
        taken = self.times[name]
        by_round = {t.sitting: _ratios(t.dense.ttft, t.own.ttft) for t in taken}
        per_token = [_ratios(t.dense.per_token, t.own.per_token) for t in taken]
        ttft = Ratio.of([*chain(*by_round.values())])
        return {
            # Its own sitting may have been a slower one.
            "seconds": median(self.sittings[0].ttft) / ttft.median,
            "by_round": by_round,
            "ttft": ttft,
            "per_token": Ratio.of([*chain(*per_token)]),
            "kv_share": taken[-1].own.kv_bytes / taken[-1].dense.kv_bytes,
        }

    def _scores(self, name: str) -> dict[str, Score]:
        found = {}
        for task, rows in self.scores.items():
            if name in rows and DENSE in rows:
                own, dense = rows[name].rows, rows[DENSE].rows
                score, base = (100 * fmean(each.values()) for each in (own, dense))
                found[task] = Score(score, score - base, _interval(own, dense))
        return found


def _compared(entries: Sequence[Entry], among: Sequence[Entry]) -> list[Entry]:
    """The entries beside AdaSkip and the searched plan of a list, and whether they are in front."""
    search = first_search([entry.method for entry in among])
    methods, draws = [*filter(None, (BASE, search))], Draws(among)
    compared = []
    for entry, front in zip(entries, fronts(entries), strict=True):
        others = (method for method in methods if method != entry.method)
        found = {method: draws.over_plan(entry, method) for method in others}
        reached = {method: here for method, here in found.items() if here is not None}
        compared.append(replace(entry, front=front, beside=reached))
    return compared


def _ratios(dense: Sequence[float], own: Sequence[float]) -> tuple[float, ...]:
    """By round."""
    return tuple(a / b for a, b in zip(dense, own, strict=True))


def _sums(row: LossRow) -> tuple[float, int]:
    values = row.rows.values()
    return math.fsum(nll for nll, _ in values), int(sum(tokens for _, tokens in values))


def _interval(own: Mapping[str, float], base: Mapping[str, float]) -> Interval | None:
    """That of the mean difference of scores, 0 to 100."""
    found = paired_interval(own, base)
    return None if found is None else (100 * found[0], 100 * found[1])
