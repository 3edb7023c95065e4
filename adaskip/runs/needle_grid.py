"""The grid behind a needle's heat map: an ordinary run for each policy, context and depth."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from typing_extensions import override

from adaskip.errors import AdaskipError, refuse_below_one, unknown_name
from adaskip.runs.runconfig import DENSE, RunConfig
from adaskip.runs.sweepfile import Cell
from adaskip.tasks.retrieval import check_depth
from adaskip.tasks.spec import task_names, task_spec


@dataclass(frozen=True)
class PlacedCell(Cell):
    """The run of one place of a map."""

    @property
    @override
    def label(self) -> str:
        """The name of the cell in messages, with its place."""
        config = self.config
        return f"{super().label}, {config.sample_tokens} tokens, {config.needle_depth} %"


@dataclass(frozen=True)
class NeedleGrid:
    """What is compared where.

    Attributes:
        task: whose needle is moved.
        contexts: in tokens, in the order of the map.
        depths: in percent of the context, from its beginning.
        policies: a configuration of each, dense first; their results lie below one folder.
    """

    task: str
    contexts: tuple[int, ...]
    depths: tuple[int, ...]
    policies: tuple[RunConfig, ...]

    @classmethod
    def of(
        cls,
        task: str,
        contexts: Sequence[int],
        depths: Sequence[int],
        policies: Sequence[RunConfig],
        limit: int,
    ) -> NeedleGrid:
        """A grid whose axes are sorted and hold nothing twice.

        Args:
            task: whose needle is moved.
            contexts: in tokens.
            depths: in percent.
            policies: a configuration of each, dense first.
            limit: the longest prompt of the model, in tokens.

        Raises:
            AdaskipError: the task takes no depth, a depth is none, or a context is too long.
        """
        takers = [name for name in task_names() if task_spec(name).takes_depth]
        if task not in takers:
            raise unknown_name("task with a needle", task, takers)
        for depth in depths:
            check_depth(depth, [task])
        for tokens in contexts:
            refuse_below_one({"contexts": tokens})
            if tokens >= limit:
                raise AdaskipError(
                    f"A context of {tokens} tokens leaves no room for a question within the "
                    f"prompt limit of {limit}; choose shorter --contexts, or a larger "
                    "--max_length if the model has the positions."
                )
        columns, rows = (tuple(sorted(set(axis))) for axis in (contexts, depths))
        return cls(task, columns, rows, tuple(policies))

    @property
    def model(self) -> str:
        """What files and figures call the model."""
        return PurePath(self.policies[0].model_name).name

    @property
    def folder(self) -> Path:
        """Where the map goes; the runs lie in `runs/` below it."""
        return Path(self.policies[0].results_dir)

    def config(self, policy: RunConfig, tokens: int, depth: int) -> RunConfig:
        """The run of one square of a policy's map."""
        # A dense run is the same in every experiment.
        kind = f"{self.model}-{DENSE}" if policy.policy == DENSE else policy.run_name
        return dataclasses.replace(
            policy,
            name=f"{kind}-{tokens}-tokens-{depth}-percent",
            tasks=(self.task,),
            sample_tokens=tokens,
            needle_depth=depth,
            results_dir=str(self.folder / "runs"),
        )

    def cell(self, policy: RunConfig, tokens: int, depth: int) -> Cell:
        """The same as a cell that can be run and reported."""
        return PlacedCell((policy.experiment,), self.config(policy, tokens, depth))

    def squares(self) -> Iterator[tuple[int, int]]:
        """Context and depth of every square, short contexts first."""
        return ((tokens, depth) for tokens in self.contexts for depth in self.depths)

    def cells(self) -> list[Cell]:
        """All runs in the order they are made: all policies of a square, then the next square."""
        cells: list[Cell] = []
        for square in self.squares():
            for policy in self.policies:
                cell = self.cell(policy, *square)
                cell.config.check()
                cells.append(cell)
        return cells
