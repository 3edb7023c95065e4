"""A plan that was made once and kept in a file, as a policy that scripts can name."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from typing_extensions import override

from adaskip.errors import AdaskipError, PlanError
from adaskip.plan import SkipPlan, Step
from adaskip.policy import SkipPolicy, register
from adaskip.shipped import plan_label


@dataclass(frozen=True)
class PlanFile:
    """A plan and where it was read.

    Attributes:
        path: the file, or the name of a shipped plan.
        name: tells plans apart, also those of one name: the file's, and a hash of what it computes.
        plan: what is in it.
    """

    path: str = field(repr=False)  # of one machine: records tell the name
    name: str
    plan: SkipPlan = field(repr=False)

    @classmethod
    def read(cls, path: str) -> PlanFile:
        """Reads a plan's file.

        Raises:
            PlanError: it is missing, damaged, or of another version.
        """
        plan = SkipPlan.load(path)
        return cls(path, f"{plan_label(path)}-{plan.digest[:8]}", plan)


def read_plans(paths: Iterable[str], taken: Collection[str] = ()) -> dict[str, PlanFile]:
    """Reads the files of plans, by what tables call them.

    Args:
        paths: the files, or names of shipped plans.
        taken: what a table calls something else.

    Raises:
        PlanError: one cannot be read, two have the same name, or one has a name that is taken.
    """
    found: dict[str, PlanFile] = {}
    for path in paths:
        label = plan_label(path)
        if label in taken:
            raise PlanError(
                f"{path} would be {label!r} in the table, which is something else there; rename it."
            )
        if label in found:
            raise PlanError(
                f"{found[label].path} and {path} have the same name, which is all that tells plans "
                "apart; rename one."
            )
        found[label] = PlanFile.read(path)
    return found


@register("PLAN")
@dataclass
class MadePlan(SkipPolicy):
    """Applies the plan of a file at every step: one that a search or a method made.

    Attributes:
        plan_file: the file.
        n_skip: sublayers that the plan replaces, windows included.

    Source: METHOD, "Search" and "Methods of the field".
    """

    budget: ClassVar[Literal["layers", "sublayers"]] = "sublayers"

    plan_file: PlanFile
    n_skip: int

    @override
    def bind(self, n_layers: int) -> None:
        plan = self.plan_file.plan
        plan.check(n_layers)
        if self.n_skip != len(plan):
            raise AdaskipError(
                f"The plan {self.plan_file.path} replaces {len(plan)} sublayers, not "
                f"{self.n_skip}; leave the number out."
            )
        super().bind(n_layers)

    @property
    @override
    def constant_plan(self) -> SkipPlan:
        return self.plan_file.plan

    @override
    def plan(self, step: Step) -> SkipPlan:
        return self.plan_file.plan
