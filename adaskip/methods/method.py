"""What a method is: plans that grow, and the registry of those that commands can name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import ParamSpec

from adaskip.errors import no_numbers
from adaskip.plan import Sublayer
from adaskip.search.cross_fitting import Learned
from adaskip.search.losses import Measure
from adaskip.search.menu import NOTHING, Option
from adaskip.search.trials import Trials

P = ParamSpec("P")
Growth = Iterator[Mapping[Sublayer, Learned]]


@dataclass(frozen=True)
class Method:
    """A method of the field.

    Attributes:
        name: what commands call it.
        grow: yields plans that replace more and more; of most, each extends the one before.
        measure: of its losses, "nll" or "kl".
        gain: whether its plans hold gains.
        linear: whether they hold full linear maps, whose time counts.
        lazy: whether it looks only at what comes to the top, unless told `exact=True`.
    """

    name: str
    grow: Callable[..., Growth]
    measure: Measure = "nll"
    gain: bool = False
    linear: bool = False
    lazy: bool = False


METHODS: dict[str, Method] = {}


def method(
    name: str, *, gain: bool = False, linear: bool = False, lazy: bool = False
) -> Callable[[Callable[P, Growth]], Callable[P, Growth]]:
    """Decorator: makes a function that grows plans on `Trials` known to commands under `name`.

    Args:
        name: in capitals, as policies have it.
        gain: whether its plans hold gains.
        linear: whether they hold full linear maps.
        lazy: whether it takes `exact`.

    Raises:
        TypeError: the name is taken.
    """

    def add(grow: Callable[P, Growth]) -> Callable[P, Growth]:
        if name in METHODS:
            raise TypeError(f"Method name {name!r} already belongs to {METHODS[name].grow!r}.")
        METHODS[name] = Method(name, grow, gain=gain, linear=linear, lazy=lazy)
        return grow

    return add


def least_lost(rows: Trials, parts: Sequence[tuple[Sublayer, ...]], *, exact: bool) -> Growth:
    """Takes away one part after the other, each time the one without which least is lost.

    Args:
        rows: calibration rows.
        parts: sublayers that are taken away together.
        exact: whether to look at all parts in every round; otherwise losses of earlier rounds are
            looked at anew only when their part comes to the top.

    Raises:
        AdaskipError: without any part that is left predictions are no numbers.
    """
    # What a part adds to the loss, and how many were gone when that was seen.
    seen: dict[tuple[Sublayer, ...], tuple[float, int]] = {}
    base, n_gone = rows.loss(), 0

    def look(part: tuple[Sublayer, ...]) -> None:
        lost = rows.loss(_without(part)) - base
        seen[part] = lost, n_gone
        if n_gone == 0 and isfinite(lost):
            name = NOTHING if len(part) == 1 else f"{NOTHING}, nor of its layer"
            rows.alone |= dict.fromkeys(part, (name, lost))

    for part in parts:
        look(part)
    while seen:
        stale = [part for part in seen if seen[part][1] < n_gone]
        for part in stale if exact else ():
            look(part)
        best = min(seen, key=lambda part: (seen[part][0], part[0].position))
        if best in stale and not exact:
            look(best)
            continue
        if not isfinite(seen[best][0]):
            raise no_numbers(rows.losses.sublayers.model.dtype)
        base, n_gone = base + seen.pop(best)[0], n_gone + 1
        rows.accept(_without(best))
        rows.say(f"{n_gone} gone, loss {base:.4f}")
        yield dict(rows.losses.plan)


def _without(part: tuple[Sublayer, ...]) -> list[Option]:
    return [Option(sublayer, NOTHING) for sublayer in part]
