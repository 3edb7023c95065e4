"""Fills a plan option by option, by the loss each adds on the way to the budget."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isfinite

from adaskip.errors import AdaskipError
from adaskip.plan import Sublayer
from adaskip.search.menu import Budget, Menu, Option
from adaskip.search.trials import Trials

# Of so many sublayers the factor between two options has to be known before it tells of others.
_ENOUGH = 3


@dataclass
class Choice:
    """A plan in the making.

    Attributes:
        trials: the calibration rows.
        menu: all options.
        budget: what has to be saved.
        chosen: the plan.
        lost: nats per answer token that an option was last seen to lose, against its sublayer.
        grown: the plan after each choice on the way to the budget, and its loss.
    """

    trials: Trials
    menu: Menu
    budget: Budget
    chosen: dict[Sublayer, Option] = field(default_factory=dict)
    lost: dict[Option, float] = field(default_factory=dict)
    grown: list[tuple[dict[Sublayer, Option], float]] = field(default_factory=list)

    def seen(self, option: Option) -> float:
        """What an option loses, as far as is known.

        One that nobody looked at loses more than one that replaces less of the same sublayer. How
        much more, other sublayers of its kind tell: by the root of the least factor between the two
        that was seen in any of them. The factors differ by far; what is taken for too harmful would
        never be looked at.
        """
        if option in self.lost:
            return self.lost[option]
        less = [
            self.lost[other] * self._factor(other, option)
            for other in self.menu.options[option.sublayer]
            if other in self.lost and other.less_than(option)
        ]
        return max(less, default=0.0)

    def _factor(self, less: Option, more: Option) -> float:
        """How much more one option was seen to lose than another one of its sublayer, at least."""
        found = []
        for sublayer, options in self.menu.options.items():
            if sublayer.kind == more.sublayer.kind:
                lost = {o.sort: self.lost[o] for o in options if o in self.lost}
                if lost.get(less.sort, 0.0) > 0 and more.sort in lost:
                    found.append(lost[more.sort] / lost[less.sort])
        return max(1.0, min(found)) ** 0.5 if len(found) >= _ENOUGH else 1.0

    def seen_now(self, sublayer: Sublayer) -> float:
        """What the option chosen for a sublayer loses; 0 where it runs."""
        return self.lost[self.chosen[sublayer]] if sublayer in self.chosen else 0.0

    def accept(self, options: list[Option], *, dropped: Sublayer | None = None) -> None:
        """Makes options part of the plan."""
        # An exchange may leave a smaller option that nobody has looked at on its own.
        self.lost |= {option: self.seen(option) for option in options}
        self.trials.accept(options, dropped=dropped)
        self.chosen |= {option.sublayer: option for option in options}
        if dropped is not None:
            del self.chosen[dropped]


class _Lazy:
    """How well options are known, and what they add, as far as it is.

    A first look takes few rows; a second one takes all of them, under the plan of that moment, and
    is stale once something else has been chosen.
    """

    def __init__(self, choice: Choice) -> None:
        self._choice = choice
        self._few: set[Option] = set()
        # Options accepted when one was looked at on all rows, and the loss of the plan with it.
        self._at: dict[Option, tuple[int, float]] = {}
        # What options lost on all rows that were looked at on few before, and on those few.
        self._on_all = self._on_few = 0.0

    def added(self, option: Option) -> float:
        """Nats per answer token that an option adds to the plan, as far as is known."""
        choice = self._choice
        lost = choice.seen(option)
        if option not in self._at and self._on_few > 0 and self._on_all > 0:
            # In the unit of those seen on all rows.
            lost *= self._on_all / self._on_few
        return lost - choice.seen_now(option.sublayer)

    def certain(self, option: Option, n_accepted: int) -> float | None:
        """The loss of the present plan with an option on all rows; None if nobody looked."""
        at, loss = self._at.get(option, (-1, 0.0))
        return loss if at == n_accepted else None

    def look(self, option: Option, base: float, n_accepted: int) -> None:
        """Looks at an option once more: at few rows first, then at all of them.

        Args:
            option: which.
            base: loss of the plan.
            n_accepted: options accepted so far.
        """
        choice = self._choice
        few = option not in self._few and option not in self._at
        if few and n_accepted:
            base = choice.trials.loss(few=True)
        loss = choice.trials.loss([option], few=few)
        if not isfinite(loss):
            choice.menu.leave_out(option)
            return
        lost = loss - base + choice.seen_now(option.sublayer)
        if few:
            self._few.add(option)
        else:
            if option not in self._at:
                self._on_few += max(choice.lost[option], 0.0)
                self._on_all += max(lost, 0.0)
            self._at[option] = n_accepted, loss
        choice.lost[option] = lost


def fill(choice: Choice) -> None:
    """Chooses options until the budget is met.

    The next one is that of the least added loss per progress towards the budget. Losses that were
    seen under an earlier plan, or on few rows, are looked at anew only when their option comes to
    the top: lazy greedy. An option of a sublayer that has one already takes its place.

    Raises:
        AdaskipError: no choice meets both budgets together.
    """
    lazy, base, n_accepted = _Lazy(choice), 0.0, 0
    for options in choice.menu.options.values():
        useful = [option for option in options if _is_open(choice, option)]
        if useful:
            lazy.look(useful[0], base, 0)
    while not choice.budget.met(choice.chosen.values()):
        best = _best(choice, lazy)
        loss = lazy.certain(best, n_accepted)
        if loss is None:
            lazy.look(best, base, n_accepted)
            continue
        choice.accept([best])
        base, n_accepted = loss, n_accepted + 1
        choice.grown.append((dict(choice.chosen), base))
        choice.trials.say(f"{len(choice.chosen)} replaced, loss {base:.4f}")


def _best(choice: Choice, lazy: _Lazy) -> Option:
    """The open option of the least loss per progress, as far as is known."""

    def score(option: Option) -> tuple[float, int, float]:
        progress = choice.budget.progress(option, choice.chosen)
        return lazy.added(option) / progress, option.sublayer.position, option.saved

    found = [option for option in choice.menu if _is_open(choice, option)]
    if not found:
        raise AdaskipError(
            "The acceleration and the kv_share cannot be reached together with the replacements "
            "under which predictions are numbers; give less, or allow gains."
        )
    return min(found, key=score)


def _is_open(choice: Choice, option: Option) -> bool:
    """Whether an option brings the plan nearer to its budget, and takes nothing back."""
    present = choice.chosen.get(option.sublayer)
    if present is not None and (
        option.saved < present.saved or (choice.budget.share and option.freed < present.freed)
    ):
        return False
    return choice.budget.progress(option, choice.chosen) > 0
