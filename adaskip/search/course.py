"""The course of a plan: what was known of each sublayer, and every smaller plan on the way to it.

It is kept in the plan's file, so that one can look at what another budget would have chosen.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from adaskip.errors import PlanError
from adaskip.numbers import is_finite
from adaskip.plan import COURSE, KINDS, SkipPlan, Sublayer, all_sublayers
from adaskip.replacements import Replacement
from adaskip.search.losses import Losses, stream_similarity
from adaskip.search.menu import NOTHING
from adaskip.sublayer_times import PlanTimes, replacement_name

# In the place of a sublayer that a smaller plan replaced and this one computes.
RUNS = "runs"
# More digits than anybody can measure would only fill the file.
_DIGITS = 5


class Stop(NamedTuple):
    """A plan on the way.

    Attributes:
        changes: what takes the place of the sublayers that differ from the stop before; `RUNS`
            where one is computed again.
        speedup: predicted, over dense.
        kv_share: of the dense keys and values.
        loss: nats per answer token; None if nobody looked.
    """

    changes: Mapping[Sublayer, str]
    speedup: float
    kv_share: float
    loss: float | None


@dataclass
class Course:
    """How a plan came to be.

    Attributes:
        total: seconds of a dense forward.
        seconds: of each sublayer within it.
        similarity: IO similarity of each sublayer on the calibration rows.
        alone: what was in a sublayer's place while all others ran, and what that lost; of those
            that the method looked at so.
        stops: from the smallest plan to the one that was asked for.
    """

    total: float
    seconds: Mapping[Sublayer, float]
    similarity: Mapping[Sublayer, float]
    alone: Mapping[Sublayer, tuple[str, float]] = field(default_factory=dict)
    stops: list[Stop] = field(default_factory=list)

    @classmethod
    def begun(cls, losses: Losses, times: PlanTimes) -> Course:
        """The course of a plan that replaces nothing yet.

        Args:
            losses: under which nothing has been accepted.
            times: of the sublayers.
        """
        similarity = {
            s: stream_similarity(losses.before(s), losses.behind(s)) for s in losses.order
        }
        return cls(times.dense.total, times.dense.seconds, similarity)

    def add(
        self, plan: Mapping[Sublayer, str], speedup: float, kv_share: float, loss: float | None
    ) -> None:
        """Adds a larger plan; one that replaces the same as the last stop takes its place.

        Args:
            plan: what takes the place of each sublayer that it replaces.
            speedup: predicted.
            kv_share: of the dense keys and values.
            loss: nats per answer token.
        """
        before = self.replaced()
        changes = {s: name for s, name in plan.items() if before.get(s) != name}
        changes |= {s: RUNS for s in before if s not in plan}
        if not changes and self.stops:
            changes = dict(self.stops.pop().changes)
        if changes:
            self.stops.append(Stop(changes, speedup, kv_share, loss))

    def replaced(self) -> dict[Sublayer, str]:
        """What takes the place of sublayers at the last stop."""
        found: dict[Sublayer, str] = {}
        for stop in self.stops:
            found |= stop.changes
        return {s: name for s, name in found.items() if name != RUNS}

    def as_text(self) -> str:
        """As a plan keeps it: JSON without spaces, of a few kilobytes."""
        content: dict[str, Any] = {"total": _short(self.total)}
        for name in ("seconds", "similarity"):
            content[name] = _by_kind({s: _short(v) for s, v in getattr(self, name).items()})
        told = {s: [name, _short(loss)] for s, (name, loss) in self.alone.items()}
        content["alone"] = _by_kind({s: told.get(s) for s in self.seconds})
        content["stops"] = [
            [
                {str(s): name for s, name in stop.changes.items()},
                *(_short(value) for value in stop[1:]),
            ]
            for stop in self.stops
        ]
        return json.dumps(content, separators=(",", ":"))

    @classmethod
    def of(cls, plan: SkipPlan) -> Course | None:
        """The course that a plan keeps; None if it keeps none.

        Raises:
            PlanError: it is damaged.
        """
        text = plan.about.get(COURSE)
        if text is None:
            return None
        try:
            content = json.loads(str(text))
            alone = _of_kinds(content["alone"])
            stops = [
                Stop(
                    {_sublayer(key): str(name) for key, name in changes.items()},
                    _number(speedup),
                    _number(kv_share),
                    None if loss is None else _number(loss),
                )
                for changes, speedup, kv_share, loss in content["stops"]
            ]
            return cls(
                _number(content["total"]),
                {s: _number(v) for s, v in _of_kinds(content["seconds"]).items()},
                {s: _number(v) for s, v in _of_kinds(content["similarity"]).items()},
                {s: (str(v[0]), _number(v[1])) for s, v in alone.items() if v is not None},
                stops,
            )
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise PlanError(
                f"The course of the plan is damaged ({type(error).__name__} {error}); make the "
                "plan anew."
            ) from error


def named(plan: Mapping[Sublayer, Replacement]) -> dict[Sublayer, str]:
    """What takes each sublayer's place, in a word or two."""
    return {s: NOTHING if r is None else replacement_name(r) for s, r in plan.items()}


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.{_DIGITS}g}")


def _number(value: Any) -> float:
    if not is_finite(value):
        raise ValueError(f"{value!r} is no number")
    return float(value)


def _by_kind(values: Mapping[Sublayer, Any]) -> dict[str, list[Any]]:
    """The values of all sublayers, in two lists by layer."""
    return {kind: [v for s, v in values.items() if s.kind == kind] for kind in KINDS}


def _of_kinds(content: Mapping[str, Any]) -> dict[Sublayer, Any]:
    """The inverse."""
    return {s: content[s.kind][s.layer] for s in all_sublayers(len(content["attn"]))}


def _sublayer(text: str) -> Sublayer:
    """The inverse of a sublayer's `str`."""
    kind = next(kind for kind in KINDS if text.startswith(kind))
    return Sublayer(int(text.removeprefix(kind)), kind)
