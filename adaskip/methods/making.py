"""Makes the plan of any method at the same predicted time, so that methods can be compared."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial

from transformers import PreTrainedModel

from adaskip.budget import check_acceleration, reaches
from adaskip.errors import AdaskipError, unknown_name
from adaskip.fingerprint import model_fingerprint
from adaskip.importance import Importance
from adaskip.learning import learn_importance
from adaskip.methods.method import METHODS, Growth, Method
from adaskip.plan import COURSE, Phase, SkipPlan, Step, Sublayer
from adaskip.policies import POLICIES
from adaskip.policies.factory import LEARNED, build_policy, takes
from adaskip.profiling.plan_times import linear_like
from adaskip.replacements import Replacement
from adaskip.search import SEARCH, search_plan
from adaskip.search.course import Course, named
from adaskip.search.cross_fitting import Learned, for_all
from adaskip.search.describing import described, identity, reached, with_measured
from adaskip.search.journal import Journal, known_times
from adaskip.search.losses import Losses
from adaskip.search.rows import Row, checked_rows, row_ids
from adaskip.search.trials import Trials
from adaskip.streams import Sublayers, measuring
from adaskip.sublayer_times import PlanTimes, SublayerTimes, check_place, timed_as, times_given


def method_names() -> tuple[str, ...]:
    """What `make_plan` can make: the search, the field's methods, policies by their first plan."""
    # Those with a file have been made already.
    return (SEARCH, *METHODS, *(name for name in POLICIES if not takes(name, "plan_file")))


def make_plan(
    model: PreTrainedModel,
    calibration: Iterable[Row],
    method: str,
    *,
    acceleration: float = 1.2,
    phase: Phase | str = Phase.PREFILL,
    context: int | None = None,
    batch: int = 1,
    times: PlanTimes | SublayerTimes | None = None,
    importance: Importance | None = None,
    exact: bool = False,
    record: str | os.PathLike[str] | None = None,
    measure: bool = False,
    source: str = "",
    losses_on_the_way: bool = False,
    progress: bool = False,
) -> SkipPlan:
    """The least that a method replaces to reach an acceleration by predicted time.

    Args:
        model: a causal language model of a supported family, outside of `skipping()`.
        calibration: `(prompt ids, answer ids)` each; apart from what the plan is tested on.
        method: one of `method_names()`.
        acceleration: ratio of dense to predicted time to reach, 1 or more.
        phase: "prefill" or "decode", in which it is reached.
        context: prompt tokens at which times count; by default the longest calibration prompt.
        batch: sequences at which times count.
        times: of sublayers and of the method's replacements, in place of measured ones; of that
            phase, context and batch.
        importance: what a policy has learned; by default from the calibration's prompts. Methods
            that learn nothing so have no use for it.
        exact: whether a lazy method (`METHODS[name].lazy`) looks at all that is left in every
            round, as its paper has it, at five to ten times the cost.
        record: a file that keeps what was measured of the rows; whatever method and acceleration
            that was for, it is not computed again.
        measure: whether to measure at the end what the plan reaches.
        source: what the rows are, kept in the plan.
        losses_on_the_way: whether to compute the loss of every smaller plan that the method passes,
            also where it is not known anyway; for looking at (`about["course"]`).
        progress: whether to show a progress bar.

    Returns:
        The plan with the model's fingerprint; `about` has the method, the budget, what is predicted
        and perhaps measured, its loss (KL to the dense model), and what it took, in forwards of a
        row.

    Raises:
        AdaskipError: an argument is wrong, or the method does not reach the acceleration.
        RunError: the record is of another model or other rows, or damaged.
    """
    if method not in method_names():
        raise unknown_name("method", method, method_names())
    check_acceleration(acceleration)
    if exact and not (method in METHODS and METHODS[method].lazy):
        lazy = ", ".join(name for name in METHODS if METHODS[name].lazy)
        raise AdaskipError(f"exact=True is for {lazy}; {method} is always exact: leave it out.")
    if method == SEARCH:
        return search_plan(
            model,
            calibration,
            acceleration=acceleration,
            phase=phase,
            context=context,
            batch=batch,
            times=times,
            record=record,
            measure=measure,
            source=source,
            progress=progress,
        )
    check_place(phase, context, batch)
    # What cannot be taken through sublayer by sublayer, and a record of something else, is refused
    # before anything is learned.
    sublayers_of = Sublayers(model)
    config = model.config.get_text_config(decoder=True)
    sorts = [linear_like(model, None)] if method in METHODS and METHODS[method].linear else []
    if times is not None:
        n_layers = config.num_hidden_layers
        times = times_given(times, n_layers, phase=str(phase), context=context, batch=batch)
        for each in sorts:
            times.check_measured(timed_as(each))
    rows = checked_rows(calibration, config.vocab_size)
    journal = Journal(record, identity(model, rows))
    chosen = METHODS.get(method) or _of_policy(method, model, rows, importance)
    with measuring(model):
        losses = Losses(sublayers_of, rows, chosen.measure)
        if times is None:
            context = losses.longest_prompt if context is None else context
            times = known_times(journal, model, phase, context, sorts, batch=batch)
        trials = Trials(losses, None, journal, progress=progress)
        grow = partial(chosen.grow, exact=True) if exact else chosen.grow
        with closing(trials):
            course = Course.begun(losses, times)
            learned: Mapping[Sublayer, Learned] = {}
            plan: dict[Sublayer, Replacement] = {}
            for learned in _until_it_reaches(grow(trials), times, acceleration, method):
                lost, plan = _loss_of(learned, losses, compute=losses_on_the_way), for_all(learned)
                course.add(named(plan), *reached(described(model, plan, times, acceleration)), lost)
        cost = trials.forwards
        losses.accept(learned)
        loss = losses.of_the_plan()
        facts = described(model, plan, times, acceleration)
        course.alone = trials.alone
        course.add(named(plan), *reached(facts), loss)
    about: dict[str, str | float | None] = {
        "method": method,
        **facts,
        "loss": loss,
        "forwards": round(cost, 1),
        "calibration": source or f"{len(rows)} rows",
        COURSE: course.as_text(),
    }
    made = SkipPlan(plan, fingerprint=model_fingerprint(model), about=about)
    return with_measured(model, made, progress=progress) if measure else made


def _until_it_reaches(growth: Growth, times: PlanTimes, acceleration: float, method: str) -> Growth:
    """Ever larger plans, up to the first that is fast enough; none for an acceleration of 1."""
    best = 1.0
    if acceleration <= 1:
        return
    for plan in growth:
        yield plan
        speedup = times.speedup(for_all(plan))
        if reaches(speedup, acceleration):
            return
        best = max(best, speedup)
    raise AdaskipError(
        f"{method} does not reach an acceleration of {acceleration} in {times.dense.phase} at "
        f"{times.dense.context} tokens; its best is {best:.2f}. Give less."
    )


def _loss_of(plan: Mapping[Sublayer, Learned], losses: Losses, *, compute: bool) -> float | None:
    """The loss of a plan on the way; None if it is neither at hand nor to be computed."""
    if losses.plan == for_all(plan):
        # The streams are those of the plan.
        return losses.of_the_plan()
    if not compute:
        return None
    before = losses.n_run
    loss = losses.loss(plan, measure="kl")
    # No part of what the method takes.
    losses.n_run = before
    return loss if math.isfinite(loss) else None


def _of_policy(
    name: str, model: PreTrainedModel, rows: Sequence[Row], importance: Importance | None
) -> Method:
    """A policy as a method: by the plan it has in the prefill experiment, at every step."""
    if importance is None and takes(name, LEARNED):
        parts = map(row_ids, rows)
        importance = learn_importance(model, [both[:, : -len(answer)] for both, answer in parts])
    elif importance is not None:
        importance.check_model(model)

    def learned() -> Importance:
        assert importance is not None  # noqa: S101 - asked for only where a policy learns
        return importance

    def grow(trials: Trials) -> Iterator[SkipPlan]:
        n_layers = len(trials.losses.order) // 2
        step = Step(Phase.PREFILL, request=0, index=0, tokens=1)
        for n_skip in range(1, POLICIES[name].most(n_layers) + 1):
            policy = build_policy(name, n_skip, {"online": False}, learned)
            policy.scope = "prefill"
            policy.bind(n_layers)
            yield policy.plan(step)

    return Method(name, grow)
