"""The processes one command was started as, by torchrun or `accelerate launch`; usually one.

They share a results folder. Rows are divided between them; what must happen once happens on the
main process. They tell each other by gloo, which needs no device.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime as dt
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

from adaskip.errors import AdaskipError, RunError

A = TypeVar("A")
T = TypeVar("T")
# Processes wait for the slowest one, which may have hours of work left.
PATIENCE = dt.timedelta(days=7)


@dataclass(frozen=True)
class Team:
    """This process among those of the same command.

    Attributes:
        rank: its number, from 0.
        world: how many there are.
    """

    rank: int = 0
    world: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes records and talks to the user."""
        return self.rank == 0

    def on_main(self, action: Callable[[], T]) -> T:
        """Runs an action on the main process; all get its result, or its error.

        Raises:
            RunError: the action raised an `AdaskipError` on the main process.
            RuntimeError: it raised anything else there.
        """
        if self.world == 1:
            return action()
        told: list[Any] = [None, None, False]
        error: Exception | None = None
        if self.is_main:
            try:
                told[0] = action()
            except Exception as caught:
                error = caught
                told[1:] = [_sentence(caught), isinstance(caught, AdaskipError)]
        _distributed().broadcast_object_list(told, src=0, group=_messages())
        if error is not None:
            raise error
        if told[1] is not None:
            raise _error(f"The main process failed: {told[1]}", told[2])
        result: T = told[0]
        return result

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A part that fails on all processes if it fails on one, so that none waits for ever.

        Raises:
            RunError: an `AdaskipError` was raised on another process.
            RuntimeError: anything else was.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            if self.world == 1:
                raise
            error = caught
        own = None if error is None else (_sentence(error), isinstance(error, AdaskipError))
        told = self.gather(own)
        if error is not None:
            raise error
        for rank, failure in enumerate(told):
            if failure is not None:
                raise _error(f"Process {rank} of {self.world} failed: {failure[0]}", failure[1])

    def gather(self, value: T) -> list[T]:
        """What each process gives, by rank; every process gets all of it."""
        if self.world == 1:
            return [value]
        told: list[Any] = [None] * self.world
        _distributed().all_gather_object(told, value, group=_messages())
        return told

    def spread(self, items: Sequence[A], work: Callable[[Sequence[A]], Sequence[T]]) -> list[T]:
        """Works on items, each process on its share; all get the results, in the items' order.

        Args:
            items: the same on every process.
            work: makes one result per item; not called with none.

        Raises:
            RunError, RuntimeError: as `together`.
        """
        own = items[self.rank :: self.world]
        with self.together():
            made = work(own) if own else []
        parts = self.gather(made)
        return [parts[i % self.world][i // self.world] for i in range(len(items))]

    @contextlib.contextmanager
    def main_ahead(self, wanted: bool = True) -> Iterator[None]:
        """A part the main process goes through before the others: what it leaves, they find.

        As accelerate's `main_process_first`, which leaves the others waiting if the main one fails.
        """
        wanted = wanted and self.world > 1
        if wanted and not self.is_main:
            self.gather(None)
        try:
            yield
        finally:
            if wanted and self.is_main:
                self.gather(None)


def refuse_several(why: str, instead: str) -> None:
    """Refuses what one process does alone; `why` is a sentence, `instead` what to do.

    Raises:
        AdaskipError: this command was started as several processes.
    """
    if team().world > 1:
        raise AdaskipError(f"{why}: {instead}.")


@cache
def team() -> Team:
    """The processes of this command; the first call connects them.

    Raises:
        RunError: the launcher's environment is incomplete, or the processes cannot be connected.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return Team()
    import torch

    on_cuda = torch.cuda.is_available()
    try:
        if on_cuda:
            local_rank = int(os.environ.get("LOCAL_RANK", "0"))
            torch.cuda.set_device(local_rank % torch.cuda.device_count())
        # The parts of one model need NCCL on GPUs.
        backend = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
        torch.distributed.init_process_group(backend, timeout=PATIENCE)
        _messages()
    except (RuntimeError, ValueError) as error:
        raise RunError(
            f"The processes cannot be connected ({_sentence(error)}): start them with torchrun or "
            "accelerate launch."
        ) from error
    atexit.register(_leave)
    return Team(torch.distributed.get_rank(), torch.distributed.get_world_size())


@cache
def _messages() -> Any:
    """The group that messages go through, which nothing but this module holds.

    A model split over the processes holds the group of all until the interpreter is gone, and a
    thread of gloo that lets go of its last message meanwhile aborts the process. A group that
    nothing holds waits for its threads.
    """
    return _distributed().new_group(backend="gloo", timeout=PATIENCE)


def _leave() -> None:
    """Ends the groups, and first the threads that messages went through."""
    distributed = _distributed()
    distributed.destroy_process_group(_messages())
    _messages.cache_clear()
    distributed.destroy_process_group()


def _distributed() -> Any:
    """torch.distributed, loaded where there are several processes only."""
    import torch

    return torch.distributed


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _error(message: str, is_ours: bool) -> Exception:
    return RunError(message) if is_ours else RuntimeError(message)
