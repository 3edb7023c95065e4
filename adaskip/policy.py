"""What a policy is, and the registry of those that scripts can name."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import lru_cache
from typing import Any, ClassVar, Literal, TypeVar

from transformers import PreTrainedModel
from typing_extensions import override

from adaskip.errors import AdaskipError, unknown_name
from adaskip.numbers import is_whole
from adaskip.plan import EMPTY_PLAN, Scope, SkipPlan, Step, whole_layers
from adaskip.recorders import Span, StepStats

P = TypeVar("P", bound="type[SkipPolicy]")

POLICIES: dict[str, type[SkipPolicy]] = {}


def register(name: str) -> Callable[[P], P]:
    """Class decorator: makes a policy known to scripts under `name`.

    Raises:
        TypeError: not a `SkipPolicy`, not a dataclass with a field `n_skip` (which scripts give
            every policy its budget by), or the name is taken.
    """

    def add(policy: P) -> P:
        if not issubclass(policy, SkipPolicy):
            raise TypeError(f"{policy!r} is not a SkipPolicy.")
        try:
            policy.hyperparameters()
        except AdaskipError as error:
            raise TypeError(f"{error} Write @dataclass below @register({name!r}).") from None
        if POLICIES.setdefault(name, policy) is not policy:
            raise TypeError(f"Policy name {name!r} already belongs to {POLICIES[name].__name__}.")
        return policy

    return add


def policy_class(name: str) -> type[SkipPolicy]:
    """The policy registered under `name`.

    Raises:
        AdaskipError: no such policy; the message suggests the nearest one.
    """
    if name not in POLICIES:
        raise unknown_name("policy", name, [*POLICIES, "dense"])
    return POLICIES[name]


class SkipPolicy(ABC):
    """Decides, forward by forward, what is skipped. Subclass it, and `register` it for scripts.

    A policy is bound to one model at a time; used in a second block at once, a copy of it is bound
    there. `Step.request` tells requests apart, any number of which may take turns. Its dataclass
    fields are its hyper-parameters, its repr the record of an experiment.

    Attributes:
        budget: what `n_skip` counts: full layers, or sublayers.
        may_rest: whether whole requests or phases may go without a skip; in runs of other policies
            that is taken for a fault, and the row is refused.
        scope: where the plan applies; set by the session before `bind`.
        n_layers: decoder layers of the model; set by `bind`.
    """

    budget: ClassVar[Literal["layers", "sublayers"]] = "layers"
    may_rest: ClassVar[bool] = False
    scope: Scope = "e2e"
    n_layers: int = 0

    @classmethod
    def hyperparameters(cls) -> dict[str, Any]:
        """The fields a policy is made with, and their defaults; `MISSING` where there is none.

        Raises:
            AdaskipError: the class is no dataclass, or has no budget.
        """
        if not dataclasses.is_dataclass(cls):
            raise AdaskipError(f"{cls.__name__} has no fields to be set: make it a dataclass.")
        items = [item for item in dataclasses.fields(cls) if item.init]
        if all(item.name != "n_skip" for item in items):
            raise AdaskipError(f"{cls.__name__} has no budget: give it a field n_skip.")
        return {
            item.name: item.default
            if item.default_factory is dataclasses.MISSING
            else item.default_factory()
            for item in items
        }

    @classmethod
    def most(cls, n_layers: int) -> int:
        """The largest budget that a model of `n_layers` layers allows."""
        return n_layers * (2 if cls.budget == "sublayers" else 1)

    @classmethod
    def check_budget(cls, n_skip: object, n_layers: int | None = None) -> None:
        """Refuses a budget that is none, or too large for a model; None: whatever the model.

        Raises:
            AdaskipError: it is no whole number from 0 up to `most`.
        """
        most = None if n_layers is None else cls.most(n_layers)
        if not is_whole(n_skip) or n_skip < 0 or (most is not None and n_skip > most):
            unit = "full layers" if cls.budget == "layers" else "sublayers"
            allowed = "up" if most is None else f"to {most} with this model's {n_layers} layers"
            raise AdaskipError(
                f"{cls.__name__} cannot skip {n_skip!r} {unit}; it takes a whole number from 0 "
                f"{allowed}."
            )

    def bind(self, n_layers: int) -> None:
        """Prepares for a model of `n_layers` layers, forgetting all earlier requests.

        What is remembered of requests is made anew here, not emptied: a copy may share it.

        Raises:
            AdaskipError: the budget does not fit the model.
        """
        n_skip = getattr(self, "n_skip", None)
        if n_skip is not None:
            self.check_budget(n_skip, n_layers)
        self.n_layers = n_layers

    def check_model(self, model: PreTrainedModel) -> None:
        """Raises an `AdaskipError` if what the policy has learned is not about this model."""
        (self.constant_plan or EMPTY_PLAN).check_model(model)

    @property
    def stepwise(self) -> bool:
        """Whether the plan of a decode step depends on the steps before it."""
        return False

    @property
    def constant_plan(self) -> SkipPlan | None:
        """The plan of every step, where all have the same and it is known; else None."""
        return None

    @abstractmethod
    def plan(self, step: Step) -> SkipPlan:
        """What this forward skips. A plan equal to the last one costs nothing."""

    def memory(self, request: int) -> object:
        """What a copy of the request's cache is to take along: nothing that later steps change."""
        return None

    def resume(self, request: int, memory: Any) -> None:  # noqa: B027 - most remember nothing
        """A copied or stored cache was met: the new `request` goes on from such a `memory`."""

    def forget(self, request: int) -> None:  # noqa: B027 - most remember nothing
        """The cache of `request` is gone, so no further step of it comes."""

    def watch(self, step: Step) -> frozenset[Span]:
        """The parts `observe` wants statistics of in this step: all, if there is an `observe`."""
        observes = type(self).observe is not SkipPolicy.observe
        return frozenset({"attn", "ffn"}) if observes else frozenset()

    def observe(self, step: Step, stats: StepStats) -> None:  # noqa: B027 - most watch nothing
        """Takes the statistics asked for by `watch`, after a forward within the scope."""


class FixedSkipping(SkipPolicy):
    """Applies one given plan at every step.

    Args:
        plan: the plan; `SkipPlan()` skips nothing.
    """

    def __init__(self, plan: SkipPlan) -> None:
        if not isinstance(plan, SkipPlan):
            raise AdaskipError(
                f"FixedSkipping applies a SkipPlan, not a {type(plan).__name__}; write "
                "FixedSkipping(SkipPlan({Sublayer(3, 'ffn'): None}))."
            )
        self._plan = plan

    def __repr__(self) -> str:
        return f"FixedSkipping({', '.join(map(str, self._plan)) or 'nothing'})"

    @override
    def bind(self, n_layers: int) -> None:
        self._plan.check(n_layers)
        super().bind(n_layers)

    @property
    @override
    def constant_plan(self) -> SkipPlan:
        return self._plan

    @override
    def plan(self, step: Step) -> SkipPlan:
        return self._plan


@lru_cache(maxsize=256)
def layer_plan(layers: tuple[int, ...]) -> SkipPlan:
    """`whole_layers`, built once per set of layers so that repeated plans are the same object."""
    return whole_layers(layers)
