"""What may take each sublayer's place, what that saves, and what a plan has to save."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from transformers import PreTrainedModel

from adaskip.budget import ROUNDING, dense_tokens
from adaskip.errors import AdaskipError, unknown_name
from adaskip.plan import Sublayer, all_sublayers
from adaskip.profiling.plan_times import linear_like, windowable
from adaskip.replacements import Linear, Replacement, Window
from adaskip.sublayer_times import GAIN, PlanTimes, replacement_name, timed_as
from adaskip.summary import key_value_heads

logger = logging.getLogger(__name__)

# "window" is one of a whole attention, "heads" one of some of its key-value heads.
Name = Literal["gain", "linear", "window", "heads"]
MENU: tuple[Name, ...] = get_args(Name)
# Some heads are looked at only where a window saves this share of an attention's time or more:
# elsewhere, in short prompts, they save next to nothing and would be tried one by one.
_WORTH = 0.25
WINDOWED: tuple[Name, ...] = ("window", "heads")
# Which key-value heads of an attention a window harms least: those first.
HeadsByHarm = Callable[[Sublayer, Window, int], Sequence[int]]
# An option of the methods that put nothing in a sublayer's place.
NOTHING = "nothing"


@dataclass(frozen=True)
class Option:
    """One sublayer, replaced in one way.

    Attributes:
        sublayer: it.
        name: of what takes its place, as times call it.
        window: which, if it is one; a gain or a linear map is learned when it is tried.
        saved: seconds of a forward.
        freed: share of the model's keys and values.
    """

    sublayer: Sublayer
    name: str
    window: Window | None = None
    saved: float = 0.0
    freed: float = 0.0

    def __str__(self) -> str:
        return f"{self.sublayer} {self.name}"

    @property
    def is_learned(self) -> bool:
        """Whether it is a gain or a linear map."""
        return self.window is None and self.name != NOTHING

    @property
    def sort(self) -> str:
        """What options of other sublayers are like it, whichever heads they are of."""
        return self.name if self.window is None else timed_as(self.window)

    def less_than(self, other: Option) -> bool:
        """Whether it replaces less of the same sublayer: it saves less, or as much and frees less.

        What a candidate leaves of its sublayer decides how little it loses.
        """
        return (self.saved, self.freed) < (other.saved, other.freed)


@dataclass(frozen=True)
class Dishes:
    """What a search may put in a sublayer's place.

    Attributes:
        names: "gain", "linear", "window", "heads".
        windows: sizes in tokens.
        rank: of linear maps; None for full ones.
    """

    names: Sequence[Name]
    windows: Sequence[int]
    rank: int | None

    def __str__(self) -> str:
        """As a plan tells them: `gain, linear 64, window 128 256`."""
        more: dict[str, Sequence[int]] = {
            "linear": [] if self.rank is None else [self.rank],
            "window": self.windows,
            "heads": [max(self.windows, default=0)],
        }
        return ", ".join(" ".join(map(str, [name, *more.get(name, [])])) for name in self.names)

    def check(self) -> None:
        """Raises an `AdaskipError` if there is nothing, or something unknown, to choose from."""
        for name in [self.names] if isinstance(self.names, str) else self.names:
            if name not in MENU:
                raise unknown_name("replacement", str(name), MENU)
        if isinstance(self.names, str) or not self.names:
            raise AdaskipError(
                f"replacements is {self.names!r}; give a sequence of {', '.join(MENU)}."
            )
        if isinstance(self.windows, int):
            raise AdaskipError(f"windows is {self.windows}; give sizes, e.g. ({self.windows},).")
        if self.has_windows and not self.windows:
            raise AdaskipError("No window to choose: give sizes in tokens, e.g. windows=(128,).")
        for size in self.windows:
            Window(size)

    @property
    def has_windows(self) -> bool:
        """Whether windows may be chosen."""
        return any(name in self.names for name in WINDOWED)

    def samples(self, model: PreTrainedModel) -> list[Replacement]:
        """One replacement of each sort, to be timed.

        Raises:
            AdaskipError: a window does not fit the model.
        """
        made: list[Replacement] = []
        if self.has_windows:
            made += [Window(size) for size in self.windows]
        if "linear" in self.names:
            made.append(linear_like(model, self.rank))
        for window in made:
            if isinstance(window, Window):
                windowable(model, window)
        return made

    def check_timed(self, model: PreTrainedModel, times: PlanTimes) -> None:
        """Raises an `AdaskipError` unless there are times of all that may be chosen."""
        for sample in self.samples(model):
            # Of some heads only the largest is.
            if "window" in self.names or isinstance(sample, Linear) or sample == self.largest:
                times.check_measured(timed_as(sample))

    @property
    def largest(self) -> Window:
        """The largest window, which some heads may have."""
        return Window(max(self.windows))

    def in_some_heads(
        self, model: PreTrainedModel, times: PlanTimes, *, frees: bool
    ) -> frozenset[Sublayer]:
        """The attentions in which a window of some heads is looked at.

        Args:
            model: whose masks say where a window may be.
            times: of `samples`.
            frees: as `Menu` takes it.
        """
        if "heads" not in self.names:
            return frozenset()
        return frozenset(
            s
            for s in (Sublayer(layer, "attn") for layer in windowable(model, self.largest))
            if frees or times.saved(s, self.largest) >= _WORTH * times.dense.seconds[s]
        )

    def samples_of_some_heads(
        self, model: PreTrainedModel, times: PlanTimes, *, frees: bool
    ) -> list[Window]:
        """One window of each number of heads, to be timed besides; as `in_some_heads` takes it."""
        if not self.in_some_heads(model, times, frees=frees):
            return []
        n_heads = key_value_heads(model.config.get_text_config(decoder=True))
        return [
            replace(self.largest, heads=_spread(n, n_heads), of_heads=n_heads)
            for n in _numbers_of_heads(n_heads)
        ]


class Menu:
    """Every option, by sublayer, those that replace least first.

    Args:
        model: whose masks say where a window may be.
        dishes: what may be chosen.
        times: of the sublayers and of what may be chosen.
        by_harm: tells the heads of an attention apart.
        frees: whether keys and values are to be freed, which windows of some heads do even where
            they save no time.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        dishes: Dishes,
        times: PlanTimes,
        by_harm: HeadsByHarm,
        *,
        frees: bool = False,
    ) -> None:
        n_layers, context = times.dense.n_layers, times.dense.context
        dense = dense_tokens(model.config, context)
        samples = dishes.samples(model)
        learned = [GAIN] if GAIN in dishes.names else []
        learned += [replacement_name(sample) for sample in samples if isinstance(sample, Linear)]
        windows = [sample for sample in samples if isinstance(sample, Window)]
        allowed = {window: set(windowable(model, window)) for window in windows}
        some = dishes.in_some_heads(model, times, frees=frees)
        n_heads = key_value_heads(model.config.get_text_config(decoder=True))
        found: dict[Sublayer, tuple[Option, ...]] = {}
        for sublayer in all_sublayers(n_layers):
            is_attention = sublayer.kind == "attn"
            freed = dense[sublayer.layer] / sum(dense) if is_attention else 0.0
            options = [
                Option(sublayer, name, None, times.saved_by(sublayer, name), freed)
                for name in learned
            ]
            own_windows = [w for w in windows if is_attention and sublayer.layer in allowed[w]]
            placed = own_windows if "window" in dishes.names else []
            if sublayer in some:
                placed = placed + _of_some_heads(sublayer, dishes.largest, n_heads, by_harm)
            for window in placed:
                saved, name = times.saved(sublayer, window), replacement_name(window)
                spared = (dense[sublayer.layer] - window.held(context)) / sum(dense)
                options.append(Option(sublayer, name, window, saved, spared))
            found[sublayer] = tuple(sorted(options, key=lambda o: (o.saved, o.freed)))
        self.options = found

    def __iter__(self) -> Iterator[Option]:
        return (option for options in self.options.values() for option in options)

    def leave_out(self, option: Option) -> None:
        """Takes an option off the menu, under which predictions are no numbers."""
        logger.warning("%s is left out: with it the predictions are no numbers", option)
        own = self.options[option.sublayer]
        self.options[option.sublayer] = tuple(other for other in own if other != option)

    def most(self, sublayer: Sublayer) -> float:
        """The most seconds that can be saved on a sublayer."""
        return max([0.0, *(option.saved for option in self.options[sublayer])])

    def freeable(self) -> float:
        """The largest share of the keys and values that can be freed."""
        return sum(max([0.0, *(o.freed for o in options)]) for options in self.options.values())


def _of_some_heads(
    sublayer: Sublayer, window: Window, n_heads: int, by_harm: HeadsByHarm
) -> list[Window]:
    """A window in all heads but the one, two, four, ... that it harms most."""
    if n_heads < 2:
        return []
    order = by_harm(sublayer, window, n_heads)
    return [
        replace(window, heads=tuple(order[:n]), of_heads=n_heads)
        for n in _numbers_of_heads(n_heads)
    ]


def _spread(n: int, n_heads: int) -> tuple[int, ...]:
    """So many of an attention's heads, apart from each other, as most choices of heads are."""
    return tuple(int((i + 0.5) * n_heads / n) for i in range(n))


def _numbers_of_heads(n_heads: int) -> list[int]:
    """All but one, two, four, ... of an attention's."""
    return [n_heads - 2**power for power in range(n_heads.bit_length()) if 2**power < n_heads]


@dataclass(frozen=True)
class Budget:
    """What a plan has to save.

    Attributes:
        seconds: of a forward.
        share: of the keys and values.
    """

    seconds: float
    share: float = 0.0

    def met(self, chosen: Collection[Option]) -> bool:
        """Whether a choice meets it."""
        return self.lacks_time(chosen) <= 0 and self.lacks_share(chosen) <= 0

    def lacks_time(self, chosen: Collection[Option]) -> float:
        """Seconds that are still to be saved, 0 or less if the time is met."""
        return self.seconds * (1 - ROUNDING) - sum(option.saved for option in chosen)

    def lacks_share(self, chosen: Collection[Option]) -> float:
        """The share that is still to be freed, 0 or less if there is nothing to do."""
        return self.share - ROUNDING - sum(option.freed for option in chosen)

    def progress(self, option: Option, chosen: Mapping[Sublayer, Option]) -> float:
        """How much nearer an option in its sublayer's place brings a choice to the budget.

        Saved time and freed memory count as shares of what is asked of each, and only while it is
        not met.
        """
        present = chosen.get(option.sublayer)
        saved, freed = option.saved, option.freed
        if present is not None:
            saved, freed = saved - present.saved, freed - present.freed
        found = 0.0
        if self.lacks_time(chosen.values()) > 0:
            found += saved / (self.seconds or 1.0)
        if self.lacks_share(chosen.values()) > 0:
            found += freed / self.share
        return found


def check_reach(
    menu: Menu, budget: Budget, times: PlanTimes, asked: Mapping[str, float | None]
) -> None:
    """Refuses a budget that no choice meets, and names the best.

    Args:
        menu: all options.
        budget: what is to be saved.
        times: of the dense model.
        asked: the acceleration, and the share of keys and values that may be held.

    Raises:
        AdaskipError: it cannot be met.
    """
    dense = times.dense
    most = sum(map(menu.most, menu.options))
    if most < budget.seconds * (1 - ROUNDING):
        raise AdaskipError(
            f"An acceleration of {asked['acceleration']} cannot be reached in {dense.phase} at "
            f"{dense.context} tokens; with these replacements the best is "
            f"{dense.total / (dense.total - most):.2f}. Give less."
        )
    if menu.freeable() < budget.share - ROUNDING:
        raise AdaskipError(
            f"A kv_share of {asked['kv_share']} cannot be reached; with these replacements the "
            f"least is {1 - menu.freeable():.2f}. Give more, or allow gains."
        )
