"""The times of a leaderboard's plans, taken by turns in sittings; what exists is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from adaskip.entering import skipping
from adaskip.errors import RunError
from adaskip.leaderboard.board import Board
from adaskip.leaderboard.rows import DENSE_DIGEST, TimesRow
from adaskip.plan import EMPTY_PLAN, SkipPlan
from adaskip.profiling.calibration import random_prompt
from adaskip.profiling.interleaving import by_turns, per_round
from adaskip.profiling.timing import RequestTimes, time_request
from adaskip.runs.environment import environment
from adaskip.runs.files import put_aside
from adaskip.runs.runconfig import DENSE
from adaskip.runs.store import Store

# Decode steps of a request that is timed.
STEPS = 16


class Sittings:
    """Times requests by turns, round by round: dense and the plans that have no times yet.

    Times compare only within a sitting, so each has dense requests of its own, and one that was
    interrupted goes on with the same plans.

    Args:
        board: whose plans are timed.
        model: gives the loaded model when something is timed.
        plan_of: the plan of a name, or one that takes as long.
        progress: whether to show progress bars.
    """

    def __init__(
        self,
        board: Board,
        model: Callable[[], Any],
        plan_of: Callable[[str], SkipPlan],
        progress: bool,
    ) -> None:
        self._board = board
        self._model = model
        self._plan_of = plan_of
        self._progress = progress

    def take(self) -> None:
        """Goes on with the sittings there are, then times what has no times in one of its own.

        Raises:
            RunError: there are no plans, or times of another machine.
        """
        board = self._board
        if not board.plans.rows():
            raise RunError(
                f"{board.plans.path} has no plans, and times say nothing without those that they "
                "were taken of: give --parts plans first, or put the file back."
            )
        if board.untimed:
            self._refuse_elsewhere()
        for store in board.sittings:
            self._go_on(store)
        if names := board.to_time:
            numbers = range(1, len(board.sittings) + 2)
            store = next(s for s in map(board.sitting, numbers) if not s.path.exists())
            self._take_turns(store, names)

    def _go_on(self, store: Store[TimesRow]) -> None:
        """Finishes a sitting; what plans had that were made anew since is not kept.

        One that lacks rounds, but was taken in other versions, is taken anew.
        """
        known = self._board.current(store)
        if not known.keys() <= {DENSE, *self._board.made}:
            # Of another file, too, which goes on with it.
            return
        taken = len(known[DENSE].ttft) if DENSE in known else 0
        unfinished = taken < self._board.n_rounds
        here = environment(str(self._model().device)) if unfinished else {}
        if not taken or known.keys() == {DENSE}:
            store.path.unlink()
            return
        store.keep(known)
        if unfinished:
            anew = not _same(_SITTING, store.record().get("environment", here), here)
            self._take_turns(store, [name for name in known if name != DENSE], anew=anew)

    def _refuse_elsewhere(self) -> None:
        """Refuses to time on another machine than before, as methods would not compare."""
        here = environment(str(self._model().device))
        for store in self._board.sittings:
            there = store.record().get("environment", here)
            if not _same(_MACHINE, there, here):
                raise RunError(
                    f"{store.path} has times of {there.get('device')}, {there.get('threads')} "
                    f"threads; here is {here['device']}, {here['threads']} threads, whose ratios "
                    "are others. Take the times of new plans there, or delete the board's files "
                    "of times to time all plans here."
                )

    def _take_turns(
        self, store: Store[TimesRow], names: Sequence[str], *, anew: bool = False
    ) -> None:
        """Times the rounds that a sitting lacks; all, if anew, and what is there goes for them."""
        board = self._board
        plans = {name: self._plan_of(name) for name in [DENSE, *names]}
        digests = {DENSE: DENSE_DIGEST} | {n: row.plan_digest for n, row in board.made.items()}
        taken = {} if anew else {row.id: row for row in store.rows()}
        n_taken = min((len(row.ttft) for row in taken.values()), default=0)
        ids = random_prompt(self._model(), board.context)
        kinds = {name: partial(self._request, plan, ids) for name, plan in plans.items()}
        self._request(EMPTY_PLAN, ids)
        rounds = by_turns(
            kinds,
            rounds=board.n_rounds - n_taken,
            baselines=[DENSE],
            title=f"{board.name} times",
            progress=self._progress,
        )
        for number, each in enumerate(rounds):
            for name in plans:
                (ttft,) = per_round([each], name, lambda request: request.ttft)
                (per_token,) = per_round([each], name, lambda request: request.per_token)
                before = taken.get(name)
                taken[name] = TimesRow(
                    id=name,
                    plan_digest=digests[name],
                    ttft=[*(before.ttft if before else []), ttft],
                    per_token=[*(before.per_token if before else []), per_token],
                    kv_bytes=each[name][0].kv_bytes,
                )
            if number == 0:
                # Not before there is a round to stand for what was taken.
                if anew:
                    put_aside(store.path)
                store.note_environment(str(self._model().device))
            store.append([*taken.values()])

    def _request(self, plan: SkipPlan, ids: torch.Tensor) -> RequestTimes:
        model = self._model()
        with skipping(model, plan):
            return time_request(model, ids, STEPS)


# What ratios of times depend on: between the sittings of a board, and within one.
_MACHINE = ("device", "threads")
_SITTING = (*_MACHINE, "torch", "transformers")


def _same(keys: Sequence[str], one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two environments agree in some of what they say."""
    return all(one.get(key) == other.get(key) for key in keys)
