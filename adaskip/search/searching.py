"""Chooses what is replaced so that a predicted time meets a budget at the least loss."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial

from transformers import PreTrainedModel

from adaskip.budget import check_acceleration
from adaskip.errors import AdaskipError
from adaskip.fingerprint import model_fingerprint
from adaskip.fitting import check_rank
from adaskip.numbers import is_finite, is_whole
from adaskip.plan import COURSE, Phase, SkipPlan
from adaskip.search.course import Course, named
from adaskip.search.describing import described, identity, reached, with_measured
from adaskip.search.exchange import exchange
from adaskip.search.greedy import Choice, fill
from adaskip.search.journal import Journal, known_times
from adaskip.search.losses import Losses
from adaskip.search.menu import MENU, Budget, Dishes, Menu, Name, check_reach
from adaskip.search.rows import Row, checked_rows
from adaskip.search.trials import Trials
from adaskip.streams import Sublayers, measuring
from adaskip.sublayer_times import PlanTimes, SublayerTimes, check_place, times_given
from adaskip.supported import check_model

NAME = "SEARCH"
WINDOWS = (64, 128, 256)


def search_plan(
    model: PreTrainedModel,
    calibration: Iterable[Row],
    *,
    acceleration: float = 1.2,
    phase: Phase | str = Phase.PREFILL,
    context: int | None = None,
    batch: int = 1,
    kv_share: float | None = None,
    replacements: Sequence[Name] = MENU,
    windows: Sequence[int] = WINDOWS,
    rank: int | None = None,
    times: PlanTimes | SublayerTimes | None = None,
    exchanges: int = 24,
    record: str | os.PathLike[str] | None = None,
    measure: bool = False,
    source: str = "",
    progress: bool = False,
) -> SkipPlan:
    """The plan that reaches an acceleration at the least loss it finds.

    What replaces a sublayer is chosen one by one, by the loss it adds per progress towards the
    budget (seconds saved and, under a `kv_share`, keys and values freed): the divergence
    `KL(dense || plan)` over the answer tokens of the calibration rows, with what was learned on the
    stream of the plan so far; no row is judged by a linear map that was fitted on it. Losses are
    looked at on every fourth row first, and again only when their option comes to the top.
    Afterwards options are exchanged for others while that helps; last, gains and linear maps are
    learned anew, in depth order, on the streams that the whole plan produces, if that helps.

    Args:
        model: a causal language model of a supported family, outside of `skipping()`.
        calibration: `(prompt ids, answer ids)` each; apart from what the plan is tested on, and as
            long as the context that matters: a window loses nothing in prompts that fit in it.
        acceleration: ratio of dense to predicted time to reach, 1 or more.
        phase: "prefill" or "decode", in which it is reached.
        context: prompt tokens at which times count; by default the longest calibration prompt.
        batch: sequences at which times count.
        kv_share: the largest share of the dense keys and values that may be held at that context;
            None for any.
        replacements: what may take a sublayer's place, of "gain", "linear", "window" (of a whole
            attention) and "heads" (the largest of the windows in all key-value heads but the one,
            two, four, ... that it harms most, as the stream behind that attention tells; where it
            saves a quarter of the attention's time, as in long prompts, or under a `kv_share`).
        windows: sizes of windows, in tokens.
        rank: of linear maps; None for full ones.
        times: of sublayers and replacements, in place of measured ones; of that phase, context
            and batch.
        exchanges: exchanges tried at most.
        record: a file that keeps what was measured of these rows; an interrupted search goes on
            from there and finds the same plan, and so does one towards another budget, with other
            replacements or at another context, as far as it meets the same candidates.
        measure: whether to measure at the end what the plan reaches.
        source: what the rows are, kept in the plan.
        progress: whether to show a progress bar.

    Returns:
        The plan with the model's fingerprint; `about` has the budget, what is predicted of time,
        keys and values and loss (in nats per answer token), what was measured if that was asked
        for, and what the search takes without a record, in forwards of a row.

    Raises:
        AdaskipError: an argument is wrong, a row has no answer, or the budget cannot be reached.
        RunError: the record is of another model or other rows, or damaged.

    Source: lazy greedy as in SLEB (arXiv 2402.09025) and BlockPruner (2406.10594), here by loss per
    time, with exchange; METHOD, "Search".
    """
    check_model(model)
    dishes = Dishes(replacements, windows, rank)
    asked = _Asked(acceleration, str(phase), context, batch, kv_share, exchanges)
    asked.check()
    dishes.check()
    given = None
    if times is not None:
        n_layers = model.config.get_text_config(decoder=True).num_hidden_layers
        given = times_given(times, n_layers, phase=asked.phase, context=context, batch=batch)
        asked = replace(asked, context=given.dense.context)
    config = model.config.get_text_config(decoder=True)
    check_rank(rank, config.hidden_size)
    # What does not fit the model, and a record of another, is refused before anything is computed.
    dishes.samples(model)
    if given is not None:
        dishes.check_timed(model, given)
    rows, sublayers_of = checked_rows(calibration, config.vocab_size), Sublayers(model)
    journal = Journal(record, identity(model, rows))
    with measuring(model):
        losses = Losses(sublayers_of, rows)
        if asked.context is None:
            asked = replace(asked, context=losses.longest_prompt)
        frees = asked.kv_share is not None
        plan_times = given or _times(model, asked, dishes, journal, frees=frees)
        by_harm = losses.heads_by_harm
        menu = Menu(model, dishes, plan_times, by_harm, frees=frees)
        trials = Trials(losses, rank, journal, progress=progress)
        with closing(trials):
            course = Course.begun(losses, plan_times)
            choice = _choose(trials, menu, asked, plan_times)
        loss = losses.of_the_plan()
        course.alone = trials.alone
        _tell(course, choice, plan_times)
        replaced = losses.plan
        facts = described(model, replaced, plan_times, acceleration)
        course.add(named(replaced), *reached(facts), loss)
    about: dict[str, str | float | None] = {
        "method": NAME,
        "replacements": str(dishes),
        **facts,
        **({} if kv_share is None else {"kv share": float(kv_share)}),
        "loss": loss,
        "forwards": round(trials.forwards, 1),
        "calibration": source or f"{len(rows)} rows",
        COURSE: course.as_text(),
    }
    plan = SkipPlan(replaced, fingerprint=model_fingerprint(model), about=about)
    return with_measured(model, plan, progress=progress) if measure else plan


@dataclass(frozen=True)
class _Asked:
    """What a plan has to reach, where, and how long it is exchanged; as `search_plan` takes it."""

    acceleration: float
    phase: str
    context: int | None
    batch: int
    kv_share: float | None
    exchanges: int

    def check(self) -> None:
        """Raises an `AdaskipError` if something cannot be asked for."""
        check_acceleration(self.acceleration)
        check_place(self.phase, self.context, self.batch)
        if self.kv_share is not None and not (is_finite(self.kv_share) and 0 < self.kv_share <= 1):
            raise AdaskipError(
                f"A kv_share of {self.kv_share!r} is none; give a number above 0, up to 1."
            )
        if not (is_whole(self.exchanges) and self.exchanges >= 0):
            raise AdaskipError(f"exchanges is {self.exchanges!r}; give a whole number, 0 or more.")


def _times(
    model: PreTrainedModel, asked: _Asked, dishes: Dishes, journal: Journal, *, frees: bool
) -> PlanTimes:
    """Measured times of what may be chosen, of some heads where they are looked at."""
    assert asked.context is not None  # noqa: S101 - the longest prompt took its place
    times_of = partial(known_times, journal, model, asked.phase, asked.context, batch=asked.batch)
    samples = dishes.samples(model)
    times = times_of(samples)
    some = dishes.samples_of_some_heads(model, times, frees=frees)
    return times_of([*samples, *some]) if some else times


def _choose(trials: Trials, menu: Menu, asked: _Asked, times: PlanTimes) -> Choice:
    """Makes the plan of the trials the one that is asked for."""
    seconds = times.dense.total * (1 - 1 / asked.acceleration)
    budget = Budget(seconds, 1 - (asked.kv_share or 1))
    check_reach(
        menu, budget, times, {"acceleration": asked.acceleration, "kv_share": asked.kv_share}
    )
    choice = Choice(trials, menu, budget)
    fill(choice)
    exchange(choice, asked.exchanges)
    trials.relearn(choice.chosen.values())
    return choice


def _tell(course: Course, choice: Choice, times: PlanTimes) -> None:
    """Adds the plan after each choice on the way to the budget."""
    total = times.dense.total
    for chosen, loss in choice.grown:
        saved = sum(option.saved for option in chosen.values())
        freed = sum(option.freed for option in chosen.values())
        names = {sublayer: option.name for sublayer, option in chosen.items()}
        course.add(names, total / (total - saved), 1 - freed, loss)
