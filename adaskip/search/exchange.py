"""Exchanges what a plan replaces for something else, as long as that loses less."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite

from adaskip.plan import Sublayer
from adaskip.search.greedy import Choice
from adaskip.search.menu import Option


@dataclass(frozen=True)
class _Move:
    """One sublayer is replaced less, or runs again; another one is replaced, or replaced more.

    Attributes:
        sublayer: the first.
        less: what is left in its place; None if it runs again.
        more: the other one's; None if the budget holds without.
    """

    sublayer: Sublayer
    less: Option | None
    more: Option | None

    @property
    def options(self) -> list[Option]:
        """What is in the plan afterwards."""
        return [option for option in (self.less, self.more) if option is not None]

    @property
    def dropped(self) -> Sublayer | None:
        """What runs again."""
        return self.sublayer if self.less is None else None


def exchange(choice: Choice, tries: int) -> None:
    """Makes the moves that lower the loss and keep the budget, the most promising first.

    How much a move promises follows from what options were last seen to lose; each one that is
    tried, on few rows first, corrects that, and so does one that all rows refuse then.

    Args:
        choice: the plan, whose budget is met.
        tries: moves tried at most.
    """
    trials, improved = choice.trials, True
    base, base_few = trials.loss(), trials.loss(few=True)
    while improved and tries > 0:
        # Looking at all that is chosen costs as much as ten moves, so it is done only when the
        # losses last seen promise nothing more.
        _refresh(choice, base_few)
        improved, failed = False, set[_Move]()
        while tries > 0 and (move := _best(choice, failed)) is not None:
            tries -= 1
            failed.add(move)
            few = trials.loss(move.options, dropped=move.dropped, few=True)
            _correct(choice, move, few - base_few)
            if few >= base_few:
                continue
            loss = trials.loss(move.options, dropped=move.dropped)
            if loss >= base:
                # Or it would promise the same again as soon as another move has helped.
                _correct(choice, move, loss - base)
                continue
            choice.accept(move.options, dropped=move.dropped)
            base, base_few, improved = loss, few, True
            failed.clear()
            trials.say(f"exchanging, loss {base:.4f}")


def _refresh(choice: Choice, base: float) -> None:
    """Looks on few rows at what each chosen option loses now, and lets the others grow with it."""
    before = sum(max(choice.lost[option], 0.0) for option in choice.chosen.values())
    for sublayer, option in choice.chosen.items():
        without = choice.trials.loss(dropped=sublayer, few=True)
        if isfinite(without):
            choice.lost[option] = base - without
    after = sum(max(choice.lost[option], 0.0) for option in choice.chosen.values())
    chosen = set(choice.chosen.values())
    for option in choice.lost:
        if option not in chosen and before > 0 and after > 0:
            choice.lost[option] *= after / before


def _correct(choice: Choice, move: _Move, added: float) -> None:
    """Notes what a move was seen to add to the loss: on what it replaces more, else less."""
    if not isfinite(added):
        if move.options:
            choice.menu.leave_out(move.options[-1])
        return
    relief = choice.seen_now(move.sublayer)
    relief -= 0.0 if move.less is None else choice.seen(move.less)
    if move.more is not None:
        choice.lost[move.more] = added + relief + choice.seen_now(move.more.sublayer)
    elif move.less is not None:
        choice.lost[move.less] = added + choice.seen_now(move.sublayer)


def _best(choice: Choice, failed: set[_Move]) -> _Move | None:
    """The move that promises most; None if no one promises anything."""

    def promise(move: _Move) -> float:
        found = choice.seen_now(move.sublayer)
        if move.less is not None:
            found -= choice.seen(move.less)
        if move.more is not None:
            found -= choice.seen(move.more) - choice.seen_now(move.more.sublayer)
        return found

    moves = [(promise(move), move) for move in _moves(choice) if move not in failed]
    best, found = max(moves, key=lambda pair: pair[0], default=(0.0, None))
    return found if best > 0 else None


def _moves(choice: Choice) -> Iterator[_Move]:
    """All moves that keep the budget."""
    every = list(choice.menu)
    for sublayer, present in choice.chosen.items():
        options = choice.menu.options[sublayer]
        for less in (None, *(o for o in options if o.less_than(present))):
            left = {s: o for s, o in choice.chosen.items() if s != sublayer}
            if less is not None:
                left[sublayer] = less
            lacks_time = choice.budget.lacks_time(left.values())
            lacks_share = choice.budget.lacks_share(left.values())
            if lacks_time <= 0 and lacks_share <= 0:
                yield _Move(sublayer, less, None)
            for more in every:
                if more.sublayer == sublayer:
                    continue
                own = choice.chosen.get(more.sublayer)
                if own is not None and not own.less_than(more):
                    continue
                saved = more.saved - (own.saved if own else 0.0)
                freed = more.freed - (own.freed if own else 0.0)
                if saved >= lacks_time and freed >= lacks_share:
                    yield _Move(sublayer, less, more)
