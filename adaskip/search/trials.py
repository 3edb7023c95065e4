"""Candidates tried on a plan: learned, their loss measured, or looked up in the search's record."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from tqdm import tqdm

from adaskip.plan import Sublayer
from adaskip.search.cross_fitting import Learned
from adaskip.search.journal import Journal
from adaskip.search.losses import Losses
from adaskip.search.menu import Option
from adaskip.sublayer_times import GAIN


class Trials:
    """What a search asks of its calibration rows.

    Args:
        losses: of the plan so far.
        rank: of linear maps; None for full ones.
        journal: what earlier calls computed, and where the rest is kept.
        progress: whether to show a progress bar, in forwards of a row.

    Attributes:
        saved_forwards: forwards that an earlier call computed.
    """

    def __init__(
        self, losses: Losses, rank: int | None, journal: Journal, *, progress: bool = False
    ) -> None:
        self.losses = losses
        self.saved_forwards = 0.0
        # The latest change that all rows were looked at, and what was learned for it, if anything
        # was: an earlier call may have done that.
        self._latest: tuple[str, Mapping[Sublayer, Learned] | None] = ("", None)
        self._rank = rank
        self._journal = journal
        self._bar = tqdm(desc="searching", unit=" forwards", disable=not progress)

    @property
    def forwards(self) -> float:
        """What the search has taken, in forwards of a row, earlier calls included."""
        return self.losses.forwards + self.saved_forwards

    def loss(
        self, options: Iterable[Option] = (), *, dropped: Sublayer | None = None, few: bool = False
    ) -> float:
        """Nats per answer token of the plan with a change; few: of every fourth row.

        Args:
            options: what is replaced in addition, or otherwise.
            dropped: a sublayer of the plan that runs again.
            few: whether to look at every fourth row only.
        """
        options = list(options)
        return self.look(
            _named(options, dropped),
            lambda: {option.sublayer: self.learn(option) for option in options},
            dropped=dropped,
            few=few,
        )

    def look(
        self,
        step: str,
        change: Callable[[], Mapping[Sublayer, Learned]],
        *,
        dropped: Sublayer | None = None,
        few: bool = False,
    ) -> float:
        """The loss of the plan with a change, which is made unless the record has it.

        Args:
            step: what the record calls the change.
            change: makes what is replaced in addition, or otherwise.
            dropped: a sublayer of the plan that runs again.
            few: whether to look at every fourth row only.
        """
        name = f"{step}{' few' if few else ''}"
        known, changed = self._journal.loss(name), None
        if known is not None:
            loss, forwards = known
            self.saved_forwards += forwards
        else:
            before, changed = self.losses.forwards, change()
            loss = self.losses.loss(changed, dropped=dropped, few=few)
            self._journal.add(name, loss=loss, forwards=self.losses.forwards - before)
        if not few:
            self._latest = step, changed
        self._show()
        return loss

    def accept(self, options: Iterable[Option], *, dropped: Sublayer | None = None) -> None:
        """Makes a change part of the plan; one that was just looked at takes no forwards more."""
        options, before = list(options), self.losses.forwards
        step, changed = self._latest
        looked = step == _named(options, dropped)
        if changed is None or not looked:
            changed = {option.sublayer: self.learn(option) for option in options}
        self.losses.accept(changed, dropped=dropped)
        if looked:
            # Also where an earlier call looked, and this one has to catch up.
            self.losses.forwards = before
        self._latest = ("", None)
        self._show()

    def relearn(self, chosen: Iterable[Option]) -> None:
        """Learns gains and linear maps anew on the streams of the whole plan, if that helps."""
        by_sublayer = {option.sublayer: option for option in chosen}
        self.losses.relearn(lambda sublayer: self.learn(by_sublayer[sublayer]))
        self._show()

    def learn(self, option: Option) -> Learned:
        """What takes the sublayer's place, learned on the present streams."""
        if option.window is not None:
            return option.window
        if option.name == GAIN:
            return self.losses.gain(option.sublayer)
        return self.losses.linear(option.sublayer, self._rank)

    def say(self, text: str) -> None:
        """Shows how far the search is beside the progress bar."""
        self._bar.set_postfix_str(text, refresh=False)

    def close(self) -> None:
        """Ends the progress bar."""
        self._bar.close()

    def _show(self) -> None:
        self._bar.update(self.forwards - self._bar.n)


def _named(options: Iterable[Option], dropped: Sublayer | None) -> str:
    """What a record calls a change; `plan` is none."""
    return " ".join([*map(str, options), *([f"without {dropped}"] if dropped else [])]) or "plan"
