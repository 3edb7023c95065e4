"""How long the sublayers of a model take: the values, not how they are measured."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from adaskip.errors import AdaskipError, unknown_name
from adaskip.numbers import check_counts
from adaskip.plan import Phase, Sublayer, all_sublayers
from adaskip.replacements import Linear, Replacement, Window

VERSION = 1
GAIN = "gain"


@dataclass(frozen=True)
class SublayerTimes:
    """How long one forward of a dense model takes, and each of its sublayers within it.

    Attributes:
        total: seconds of a forward (prefill: the whole prompt; decode: one step).
        seconds: of every sublayer, in depth order.
        phase: prefill or decode.
        context: prompt tokens.
        batch: sequences.
    """

    total: float
    seconds: Mapping[Sublayer, float] = field(repr=False)
    phase: Phase
    context: int
    batch: int = 1

    @property
    def n_layers(self) -> int:
        """Decoder layers of the model."""
        return len(self.seconds) // 2

    def of_kind(self, kind: str) -> float:
        """Seconds of all sublayers of a kind together."""
        return sum(t for sublayer, t in self.seconds.items() if sublayer.kind == kind)

    def saved(self, skipped: Collection[Sublayer]) -> float:
        """Seconds that skipping saves at best: those sublayers cost nothing (Amdahl)."""
        return sum(self.seconds[sublayer] for sublayer in skipped)

    def speedup(self, skipped: Collection[Sublayer]) -> float:
        """`T / (T - sum of skipped sublayers' times)`: METHOD, "Budget by acceleration ratio"."""
        return self.total / (self.total - self.saved(skipped))

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "version": VERSION,
            "total": self.total,
            "phase": str(self.phase),
            "context": self.context,
            "batch": self.batch,
            "attn": [t for s, t in self.seconds.items() if s.kind == "attn"],
            "ffn": [t for s, t in self.seconds.items() if s.kind == "ffn"],
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> SublayerTimes:
        """The inverse of `as_dict`.

        Raises:
            AdaskipError: it is not such a record.
        """
        try:
            if content["version"] != VERSION or len(content["attn"]) != len(content["ffn"]):
                raise AdaskipError("Measured times are of another version; measure them anew.")
            seconds = {
                s: float(content[s.kind][s.layer]) for s in all_sublayers(len(content["attn"]))
            }
            return cls(
                float(content["total"]),
                seconds,
                Phase(content["phase"]),
                int(content["context"]),
                int(content["batch"]),
            )
        except AdaskipError:
            raise
        except (KeyError, TypeError, IndexError, ValueError, OverflowError) as error:
            raise _damaged(error) from error


def _damaged(error: Exception) -> AdaskipError:
    return AdaskipError(
        f"Measured times are damaged ({type(error).__name__} {error}); measure them anew."
    )


@dataclass(frozen=True)
class PlanTimes:
    """What the sublayers of a model take, and what takes their place.

    Attributes:
        dense: the sublayers, within a forward of the dense model.
        replaced: seconds of a replacement, as `timed_as` calls it; gains take none.
    """

    dense: SublayerTimes
    replaced: Mapping[str, float] = field(default_factory=dict)

    def saved(self, sublayer: Sublayer, replacement: Replacement) -> float:
        """Seconds that one replacement saves, less than 0 if it takes more than the sublayer.

        A window of some heads, if none of so many was measured, is taken to save their share of
        what one of all heads does.

        Raises:
            AdaskipError: it was not measured.
        """
        name = timed_as(replacement)
        if isinstance(replacement, Window) and replacement.heads and name not in self.replaced:
            return replacement.share * self.saved(sublayer, replacement.whole)
        return self.saved_by(sublayer, name)

    def saved_by(self, sublayer: Sublayer, name: str) -> float:
        """`saved`, of what was measured under a name.

        Raises:
            AdaskipError: it was not.
        """
        self.check_measured(name)
        return self.dense.seconds[sublayer] - (0.0 if name == GAIN else self.replaced[name])

    def check_measured(self, name: str) -> None:
        """Raises an `AdaskipError` unless there is a time of a replacement of this name."""
        if name != GAIN and name not in self.replaced:
            raise AdaskipError(
                f"No time of {name!r} was measured; there is one of "
                f"{', '.join([GAIN, *self.replaced])}."
            )

    def speedup(self, plan: Mapping[Sublayer, Replacement]) -> float:
        """The predicted ratio of dense time to that of a plan."""
        saved = sum(self.saved(s, r) for s, r in plan.items())
        return self.dense.total / (self.dense.total - saved)

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {"dense": self.dense.as_dict(), "replaced": dict(self.replaced)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> PlanTimes:
        """The inverse of `as_dict`.

        Raises:
            AdaskipError: it is not such a record.
        """
        try:
            replaced = {str(name): float(t) for name, t in content["replaced"].items()}
            return cls(SublayerTimes.from_dict(content["dense"]), replaced)
        except AdaskipError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
            raise _damaged(error) from error


def replacement_name(replacement: Replacement) -> str:
    """What takes a sublayer's place, in words: "gain", "linear", "linear 64", "window 128".

    A window of some heads says which, and one of other sinks than usual how many: "window 128 of
    heads 0 2", "window 128 and 0 sinks".
    """
    if isinstance(replacement, Linear):
        return "linear" if replacement.rank is None else f"linear {replacement.rank}"
    if isinstance(replacement, Window):
        heads = (
            ""
            if replacement.heads is None
            else f" of heads {' '.join(map(str, replacement.heads))}"
        )
        usual = replacement.sinks == Window.sinks
        sinks = "" if usual else f" and {replacement.sinks} sinks"
        return f"window {replacement.size}{sinks}{heads}"
    return GAIN


def timed_as(replacement: Replacement) -> str:
    """How times call what takes a sublayer's place: by its name, whichever heads a window is of.

    A window of some heads says of how many: "window 128 in 2 of 3 heads".
    """
    if isinstance(replacement, Window) and replacement.heads is not None:
        n_heads = f"{len(replacement.heads)} of {replacement.of_heads}"
        return f"{replacement_name(replacement.whole)} in {n_heads} heads"
    return replacement_name(replacement)


def combined(
    totals: Sequence[float],
    forwards: Sequence[Mapping[Sublayer, float]],
    clocked: Sequence[float],
    *,
    phase: Phase,
    context: int,
    batch: int,
    types: Mapping[Sublayer, str] | None = None,
) -> SublayerTimes:
    """Times of sublayers from interleaved plain and clocked forwards.

    Sublayers of one type do the same work, so all of them are given their mean. The timestamps' own
    cost is taken out: sublayers keep their share of the clocked time.

    Args:
        totals: seconds of forwards without timestamps.
        forwards: of every sublayer, in each forward with timestamps.
        clocked: seconds of the same forwards.
        phase: of all those forwards.
        context: prompt tokens.
        batch: sequences.
        types: of each sublayer, e.g. "sliding_attention"; None if those of a kind are of one type.
    """
    total = statistics.median(totals)
    scale = total / statistics.median(clocked)
    medians = {s: statistics.median(f[s] for f in forwards) for s in forwards[0]}
    group_of = {s: (s.kind, "" if types is None else types[s]) for s in medians}
    groups: dict[tuple[str, str], list[float]] = {}
    for sublayer, value in medians.items():
        groups.setdefault(group_of[sublayer], []).append(value)
    seconds = {s: scale * statistics.mean(groups[group_of[s]]) for s in medians}
    return SublayerTimes(total, seconds, phase, context, batch)


def check_place(phase: object, context: object, batch: object) -> None:
    """Raises an `AdaskipError` unless times may be of this phase, context and batch.

    Args:
        phase: one of `Phase`.
        context: prompt tokens; None for some that are not known yet.
        batch: sequences.
    """
    if phase not in list(Phase):
        raise unknown_name("phase", str(phase), list(Phase))
    check_counts({"batch": batch} | ({} if context is None else {"context": context}))


def times_given(
    times: PlanTimes | SublayerTimes,
    n_layers: int,
    *,
    phase: str,
    context: int | None,
    batch: int,
) -> PlanTimes:
    """Times that somebody gives in place of measured ones, if they are of what is asked for.

    Args:
        times: of sublayers, perhaps of replacements.
        n_layers: decoder layers of the model.
        phase: that is asked for.
        context: likewise; None for that of the times.
        batch: likewise.

    Raises:
        AdaskipError: they are of another model, phase, context or batch, or no times.
    """
    given = PlanTimes(times) if isinstance(times, SublayerTimes) else times
    if not isinstance(given, PlanTimes):
        raise AdaskipError(
            f"The times are a {type(times).__name__}; give those of measured_times or "
            "measured_plan_times."
        )
    dense = given.dense
    if dense.n_layers != n_layers:
        raise AdaskipError(
            f"The times are of {dense.n_layers} layers, this model has {n_layers}; measure its own."
        )
    asked = str(phase), dense.context if context is None else context, batch
    own = str(dense.phase), dense.context, dense.batch
    if asked != own:
        raise AdaskipError(
            "The times are of {} at {} tokens, batch {}; ".format(*own)
            + "asked for is {} at {} tokens, batch {}. Give times of that.".format(*asked)
        )
    return given
