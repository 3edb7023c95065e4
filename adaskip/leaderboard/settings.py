"""What a leaderboard compares: its YAML file. Nothing here runs anything."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from adaskip.errors import AdaskipError, unknown_name
from adaskip.methods import method_names
from adaskip.models.spec import model_spec, refuse_namesakes
from adaskip.plan import Phase
from adaskip.search import MENU, SEARCH
from adaskip.tasks.spec import task_names, task_spec

# Of a search: "kv25" holds a quarter of the dense keys and values.
_KV = "kv"
# Of any method: with "fit32", its linear maps are fitted anew on 32 rows.
_FIT = "fit"
# And with "distill32", trained on them from there.
_DISTILL = "distill"
_AFTERWARDS = (_FIT, _DISTILL)

Acceleration = Annotated[float, Field(gt=1)]
Names = Annotated[list[str], Field(min_length=1)]


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True)
class Point:
    """A method asked for an acceleration.

    Attributes:
        method: as in the file; with a menu, "SEARCH gain window", "SEARCH linear64" for maps of
            that rank, or "SEARCH window kv25" to hold a quarter of the keys and values; "NBL fit32"
            for the plan of NBL with its linear maps fitted anew on 32 rows, "NBL distill32" for
            maps and gains that are trained on these, too.
        acceleration: that it is asked for, by predicted time.
        task: whose warm-up rows it is made from; None is the file's.
        seed: of the choice of those rows; None is that of all runs.
        tokens: of each of their contexts; None are the file's.
    """

    method: str
    acceleration: float
    task: str | None = None
    seed: int | None = None
    tokens: int | None = None

    @property
    def name(self) -> str:
        """What rows of the stores are called."""
        return f"{self.method} {self.acceleration:g}{self.variant and ' '}{self.variant}"

    @property
    def variant(self) -> str:
        """How its calibration differs from the others'; empty if it does not."""
        parts = [f"from {self.task}" if self.task else ""]
        parts += [f"seed {self.seed}" if self.seed is not None else ""]
        parts += [f"on {self.tokens} tokens" if self.tokens is not None else ""]
        return " ".join(filter(None, parts))

    @property
    def menu(self) -> list[Any]:
        """What a search may put in a sublayer's place, in the search's words; empty for all."""
        return [word for word in self._words if word not in (_KV, *_AFTERWARDS)]

    @property
    def rank(self) -> int | None:
        """Of a search's linear maps; None for full ones."""
        return self._words.get("linear")

    @property
    def kv_share(self) -> float | None:
        """The largest share of the dense keys and values that a search's plan may hold."""
        percent = self._words.get(_KV)
        return None if percent is None else percent / 100

    @property
    def fit_rows(self) -> int | None:
        """Rows that the linear maps of the same point without it are fitted on; None for none."""
        return self._words.get(_FIT) or self._words.get(_DISTILL)

    @property
    def is_distilled(self) -> bool:
        """Whether its gains and linear maps are trained on these rows, too."""
        return _DISTILL in self._words

    @property
    def unfitted(self) -> Point:
        """The point whose linear maps this one fits anew."""
        return replace(self, method=_as_chosen(self.method))

    @property
    def _words(self) -> dict[str, int | None]:
        """What follows a method's name, with its numbers."""
        return dict(map(_dish, self.method.split()[1:]))


@dataclass(frozen=True)
class Calibration:
    """The rows a plan is made from.

    Attributes:
        task: whose warm-up rows.
        rows: how many.
        tokens: of each of their contexts.
        seed: of their choice; None is that of all runs.
    """

    task: str
    rows: int
    tokens: int
    seed: int | None

    def __str__(self) -> str:
        seed = "" if self.seed is None else f", seed {self.seed}"
        return f"{self.rows} warm-up rows of {self.task}, {self.tokens} tokens{seed}"


class ContextSettings(_Settings):
    """What is compared at one context length.

    Attributes:
        accelerations: of the phase, each method is asked for, by predicted time.
        methods: to compare; None are the file's.
        models: that are compared there; None are the file's.
        rows: of the test split; None are the file's.
        rounds: in which times are taken; None are the file's.
        calibration_rows: None are the file's.
        calibration_tokens: None are the file's.
        headline: the acceleration at which README tells of it; None is the file's.
    """

    accelerations: Annotated[list[Acceleration], Field(min_length=1)]
    methods: Names | None = None
    models: Names | None = None
    rows: PositiveInt | None = None
    rounds: PositiveInt | None = None
    calibration_rows: PositiveInt | None = None
    calibration_tokens: PositiveInt | None = None
    headline: Acceleration | None = None


class ScoreSettings(_Settings):
    """A task whose answers are generated and scored.

    Attributes:
        rows: of the test split.
        new_tokens: of an answer; None is the task's own length.
        methods: whose plans are scored; None is all.
    """

    rows: PositiveInt
    new_tokens: PositiveInt | None = None
    methods: Names | None = None


class OtherCalibrations(_Settings):
    """One point that is also made from other rows than all others.

    Attributes:
        model: whose.
        context: prompt tokens.
        method: as in the file.
        acceleration: that is asked for.
        tasks: of another domain, to calibrate on in place of the file's.
        seeds: other choices of the file's rows.
        tokens: other lengths of their contexts.
    """

    model: str
    context: PositiveInt
    method: str
    acceleration: Acceleration
    tasks: list[str] = []
    seeds: list[int] = []
    tokens: list[PositiveInt] = []

    def points(self) -> Iterator[Point]:
        """Those with another."""
        yield from (Point(self.method, self.acceleration, task=task) for task in self.tasks)
        yield from (Point(self.method, self.acceleration, seed=seed) for seed in self.seeds)
        yield from (Point(self.method, self.acceleration, tokens=tokens) for tokens in self.tokens)


class Shipped(_Settings):
    """A plan that comes with the package."""

    model: str
    context: PositiveInt
    method: str
    acceleration: Acceleration

    @property
    def point(self) -> Point:
        """What it is on the leaderboard."""
        return Point(self.method, self.acceleration)

    @property
    def name(self) -> str:
        """What `SkipPlan.load` knows it by: "smollm2/1.2@1000", or "smollm2/1.2-kv25@4000"."""
        kv_share = self.point.kv_share
        kv = "" if kv_share is None else f"-{_KV}{100 * kv_share:g}"
        return f"{self.model}/{self.acceleration:g}{kv}@{self.context}"


class LeaderboardFile(_Settings):
    """What a leaderboard's file says.

    Attributes:
        models: as in `configs/models.yaml`.
        task: whose references are scored; its rows are made offline.
        rows: of the test split.
        reference_tokens: of each reference, from the first.
        calibration_rows: of the warm-up split.
        calibration_tokens: of each of their contexts.
        phase: whose time counts.
        rounds: in which times are taken, every plan and the dense model in each; more of them go on
            from those that were taken. Fewer than 5 show how plans are timed, and compare none.
        methods: names of `adaskip.methods`; SEARCH may be followed by its menu, in which "linear64"
            are linear maps of rank 64, and by "kv25", to hold 25 % of the keys and values; whatever
            comes before it, too, may be followed by "fit32" or "distill32".
        headline: the acceleration at which README tells of methods.
        contexts: by prompt tokens.
        scores: by task.
        other_calibrations: of single points, to be shown once.
        shipped: plans that come with the package.
    """

    models: Names
    task: str
    rows: PositiveInt
    reference_tokens: PositiveInt
    calibration_rows: PositiveInt
    calibration_tokens: PositiveInt
    phase: Phase
    rounds: PositiveInt
    methods: Names
    headline: Acceleration = 1.3
    contexts: Annotated[dict[PositiveInt, ContextSettings], Field(min_length=1)]
    scores: dict[str, ScoreSettings] = {}
    other_calibrations: list[OtherCalibrations] = []
    shipped: list[Shipped] = []

    def check(self) -> None:
        """Refuses names that nothing has, and what is there twice.

        Raises:
            AdaskipError: the first of them, with what there is.
        """
        if self.phase is not Phase.PREFILL:
            raise AdaskipError(
                f"The file's phase is {self.phase}, but plans are compared by the time to the "
                "first token: give phase: prefill."
            )
        # Not after the hours that the first of two would take.
        refuse_namesakes(self.models)
        parts = [*self.contexts.values()]
        others = self.other_calibrations
        for model in (*self.models, *(m for part in parts for m in part.models or ())):
            model_spec(model)
        own = [part.methods or [] for part in parts]
        scored = [task.methods or [] for task in self.scores.values()]
        for method in chain(self.methods, *own, *scored):
            _check_method(method)
        for methods in filter(None, (self.methods, *own)):
            for number, method in enumerate(methods):
                chosen = _as_chosen(method)
                if chosen != method and chosen not in methods[:number]:
                    raise AdaskipError(
                        f"The method {method!r} fits the linear maps of {chosen!r} anew, which "
                        "does not stand before it; name it there."
                    )
        for task in (self.task, *self.scores, *(task for other in others for task in other.tasks)):
            if not task_spec(task).offline:
                raise AdaskipError(
                    f"The task {task!r} has no rows apart from those of its test, so plans would "
                    "be calibrated on what they are tested on, and no contexts of a length; name "
                    f"one of {', '.join(t for t in task_names() if task_spec(t).offline)}."
                )
        self._check_compared("model", self.models, (m for part in parts for m in part.models or ()))
        compared = [m for part in parts for m in part.methods or self.methods]
        self._check_compared("method", compared, chain(*scored))
        self._check_once()
        for one in others:
            self._check_point(one)
        for plan in self.shipped:
            self._check_point(plan)

    def _check_compared(self, what: str, compared: Sequence[str], named: Iterable[str]) -> None:
        """Refuses models of contexts, or methods of scores, that are compared nowhere."""
        for name in named:
            if name not in compared:
                raise AdaskipError(
                    f"The file names the {what} {name!r}, which it compares nowhere; it compares "
                    f"{', '.join(dict.fromkeys(compared))}."
                )

    def _check_once(self) -> None:
        """Refuses a point that is there twice: it would be compared and counted twice."""
        points = Counter(
            (point.name, model, context)
            for model, context in self.boards()
            for point in (*self.main(context), *self.others(model, context))
        )
        for (name, model, context), times in points.items():
            if times > 1:
                raise AdaskipError(
                    f"The file has {name!r} of {model} at {context} tokens {times} times; name "
                    "each model, method, acceleration and calibration once."
                )

    def _check_point(self, one: OtherCalibrations | Shipped) -> None:
        """Refuses a point that is named but is not compared."""
        point = Point(one.method, one.acceleration)
        if (one.model, one.context) not in self.boards() or point not in [*self.main(one.context)]:
            raise AdaskipError(
                f"The file names {point.name!r} of {one.model} at {one.context} tokens, which is "
                "none of the points it compares; add it to them, or leave it out."
            )

    def boards(self) -> list[tuple[str, int]]:
        """Every model and context length that is compared, model by model."""
        return [
            (model, context)
            for model in self.models
            for context, own in self.contexts.items()
            if model in (own.models or self.models)
        ]

    def main(self, context: int) -> Iterator[Point]:
        """What is compared at a context length, in the file's order."""
        own = self.contexts[context]
        for method in own.methods or self.methods:
            for acceleration in own.accelerations:
                yield Point(method, acceleration)

    def others(self, model: str, context: int) -> Iterator[Point]:
        """The points of a model and context length that are made from other rows."""
        for other in self.other_calibrations:
            if (other.model, other.context) == (model, context):
                yield from other.points()

    def calibration(self, context: int, point: Point) -> Calibration:
        """The rows that a point is made from."""
        own = self.contexts[context]
        return Calibration(
            point.task or self.task,
            own.calibration_rows or self.calibration_rows,
            point.tokens or own.calibration_tokens or self.calibration_tokens,
            point.seed,
        )


def _check_method(method: str) -> None:
    """Refuses a method, or a search's menu, that there is not."""
    name, *menu = method.split()
    if name not in method_names():
        raise unknown_name("method", name, method_names())
    if name != SEARCH and any(_dish(word)[0] not in _AFTERWARDS for word in menu):
        raise AdaskipError(f"The method {method!r} has a menu, which {SEARCH} alone takes.")
    for word in menu:
        dish, number = _dish(word)
        above_0 = range(1, sys.maxsize)
        numbered = {"linear": above_0, _KV: range(1, 101)} | dict.fromkeys(_AFTERWARDS, above_0)
        is_right = number in numbered.get(dish, ()) if number is not None else dish in MENU
        if not is_right:
            raise unknown_name(
                "replacement", word, [*MENU, f"{_KV}25", *(f"{name}32" for name in _AFTERWARDS)]
            )
    if len({_dish(word)[0] for word in menu}) < len(menu):
        raise AdaskipError(f"The method {method!r} names a replacement twice; name each once.")
    if {*_AFTERWARDS} <= {_dish(word)[0] for word in menu}:
        raise AdaskipError(
            f"The method {method!r} is fitted and distilled on rows of its own each; {_DISTILL}32 "
            "fits on 32 rows before it trains on them."
        )


def _as_chosen(method: str) -> str:
    """A method as it is before its linear maps are fitted anew."""
    return " ".join(word for word in method.split() if _dish(word)[0] not in _AFTERWARDS)


def _dish(word: str) -> tuple[str, int | None]:
    """A word of a menu without its number, and that number."""
    name = word.rstrip("0123456789")
    number = word.removeprefix(name)
    return name, int(number) if number else None
