"""Candidates tried on a plan: learned, their loss measured, or looked up in the record."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from math import isfinite

from tqdm import tqdm

from adaskip.plan import Sublayer
from adaskip.search.cross_fitting import Learned
from adaskip.search.journal import Journal, short_hash
from adaskip.search.losses import Losses
from adaskip.search.menu import NOTHING, Option
from adaskip.sublayer_times import GAIN

logger = logging.getLogger(__name__)


class Trials:
    """What a search asks of its calibration rows.

    What is asked, and so the plan that is found, does not depend on what the record has.

    Args:
        losses: of the plan so far.
        rank: of linear maps; None for full ones.
        journal: what was measured before, and where the rest is kept.
        progress: whether to show a progress bar, in forwards of a row.

    Attributes:
        alone: what was tried first in each sublayer's place while all others ran, and what it lost.
    """

    def __init__(
        self, losses: Losses, rank: int | None, journal: Journal, *, progress: bool = False
    ) -> None:
        self.losses = losses
        self.alone: dict[Sublayer, tuple[str, float]] = {}
        # What the plan has in each place, told by all that determines it.
        self._plan: dict[Sublayer, str] = {}
        self._asked: set[str] = set()
        # Sublayers of a row that the record saved, less those that it did not but were counted.
        self._saved = 0
        # The latest changes whose loss on all rows, and on few, was asked for, and what was learned
        # for them unless the record had that loss.
        self._latest: tuple[str, dict[Sublayer, Learned] | None] = ("", None)
        self._few: tuple[str, dict[Sublayer, Learned] | None] = ("", None)
        self._rank = rank
        self._journal = journal
        self._bar = tqdm(desc="searching", unit=" forwards", disable=not progress)

    @property
    def forwards(self) -> float:
        """What the search takes, in forwards of a row, that which the record saved included."""
        return (self.losses.n_run + self._saved) / len(self.losses.order)

    def loss(
        self, options: Iterable[Option] = (), *, dropped: Sublayer | None = None, few: bool = False
    ) -> float:
        """Nats per answer token of the plan with a change, infinite where it overflows.

        Args:
            options: what is replaced in addition, or otherwise.
            dropped: a sublayer of the plan that runs again.
            few: whether to look at every fourth row only.
        """
        options = list(options)
        asked = self._told_with(options, dropped)
        of = f"{self.losses.measure} of {'few' if few else 'all'} rows: {asked}"
        loss, changed, before = self._journal.known("loss", of), None, self.losses.n_run
        looked, learned = self._few
        seen = not few and looked == asked
        if loss is None:
            changed = learned if seen and learned is not None else self._learned(options)
            loss = self.losses.loss(changed, dropped=dropped, few=few)
            self._journal.add("loss", of, loss)
        counts = of not in self._asked
        self._asked.add(of)
        price = self._price(options, dropped, few=few, seen=seen) if counts else 0
        self._count(before, price)
        if few:
            self._few = asked, changed
        else:
            self._latest = (asked, changed) if counts else ("", None)
            self._few = ("", None)
        if not self._plan and len(options) == 1 and isfinite(loss):
            [option] = options
            first, _ = self.alone.get(option.sublayer, (option.sort, loss))
            if first == option.sort:
                # Of all rows, if it comes to that: they are looked at after the few.
                self.alone[option.sublayer] = first, float(loss)
        return float(loss)

    def accept(self, options: Iterable[Option], *, dropped: Sublayer | None = None) -> None:
        """Makes a change part of the plan; one that was just looked at takes no forwards more."""
        options = list(options)
        looked, changed = self._latest
        is_paid = looked == self._told_with(options, dropped)
        before = self.losses.n_run
        if changed is None or not is_paid:
            changed = self._learned(options)
        self.losses.accept(changed, dropped=dropped)
        self._count(before, 0 if is_paid else self._price(options, dropped))
        told = {option.sublayer: self._told(option) for option in options}
        self._plan = {s: t for s, t in (self._plan | told).items() if s != dropped}
        self._latest = self._few = ("", None)

    def relearn(self, chosen: Iterable[Option]) -> None:
        """Learns gains and linear maps anew on the streams of the whole plan, if that helps."""
        by_sublayer = {option.sublayer: option for option in chosen}
        if self.losses.relearn(lambda sublayer: self._learn(by_sublayer[sublayer])):
            for sublayer in sorted(by_sublayer):
                self._plan[sublayer] = self._told(by_sublayer[sublayer])
        self._show()

    def say(self, text: str) -> None:
        """Shows how far the search is beside the progress bar."""
        self._bar.set_postfix_str(text, refresh=False)

    def close(self) -> None:
        """Ends the progress bar."""
        self._bar.close()
        if self._saved > 0:
            logger.info(
                "Of %.0f forwards of a row, the record saved %.0f",
                *(self.forwards, self._saved / len(self.losses.order)),
            )

    def _learned(self, options: Sequence[Option]) -> dict[Sublayer, Learned]:
        return {option.sublayer: self._learn(option) for option in options}

    def _learn(self, option: Option) -> Learned:
        """What takes the sublayer's place, learned on the present streams."""
        if option.name == NOTHING:
            return None
        if option.window is not None:
            return option.window
        if option.name == GAIN:
            return self.losses.gain(option.sublayer)
        return self.losses.linear(option.sublayer, self._rank)

    def _told(self, option: Option) -> str:
        """What takes the sublayer's place, told by all that determines it.

        Gains and linear maps are learned on the streams that the plan in front of them makes, from
        all rows.
        """
        if option.window is not None:
            return f"{option} {option.window.sinks}"
        front = [self._plan[s] for s in sorted(self._plan) if s < option.sublayer]
        return (
            f"{option} behind {short_hash(front)}" if option.is_learned and front else str(option)
        )

    def _told_with(self, options: Sequence[Option], dropped: Sublayer | None) -> str:
        """The plan after a change, told by all that determines it."""
        told = self._plan | {option.sublayer: self._told(option) for option in options}
        return ", ".join(told[s] for s in sorted(told) if s != dropped) or "dense"

    def _price(
        self,
        options: Sequence[Option],
        dropped: Sublayer | None,
        *,
        few: bool = False,
        seen: bool = False,
    ) -> int:
        """What a change takes that nobody looked at, in sublayers of a row.

        What a sublayer that runs adds to the stream is there to learn from.
        """
        touched = [*(o.sublayer for o in options), *([] if dropped is None else [dropped])]
        again = 0 if seen else sum(o.is_learned and o.sublayer in self._plan for o in options)
        return self.losses.price(touched, again, few=few, seen=seen)

    def _count(self, before: int, price: int) -> None:
        """Counts what something takes, whether it was computed now or not."""
        self._saved += price - (self.losses.n_run - before)
        self._show()

    def _show(self) -> None:
        self._bar.update(self.losses.forwards - self._bar.n)
