"""Continuous batching, whose forwards hold prompts and decode steps of many requests: what may be.

Its refusals come before it begins: what fails in its thread, transformers only logs, and the
answers are empty.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from transformers import PreTrainedModel

from adaskip.cache_name import CACHE
from adaskip.errors import UnsupportedCallError
from adaskip.patching import Patch

# The model's methods that begin it; the first one ends it, too.
BEGINNINGS = ("generate_batch", "init_continuous_batching")
_MODULE = "transformers.generation.continuous_batching."
_KEPT_MANAGER = "_cached_continuous_batching_manager"


def is_batched(call: Mapping[str, Any]) -> bool:
    """Whether a forward is one of continuous batching, by its cache."""
    caches = call.get(CACHE), call.get("cache")
    return any(type(each).__module__.startswith(_MODULE) for each in caches)


class Batching:
    """The batches that are computed in a block.

    Args:
        check: refuses what the block's plan does not allow.
        is_watched: whether anybody wants statistics of its forwards.
    """

    def __init__(self, check: Callable[[], None], is_watched: Callable[[], bool]) -> None:
        self._check = check
        self._is_watched = is_watched
        # The threads in which a generate_batch() goes on.
        self._threads: list[int] = []

    @property
    def n_open(self) -> int:
        """Calls that go on."""
        return len(self._threads)

    def patches(self, model: PreTrainedModel) -> Iterator[Patch]:
        """Lets the model refuse, patch by patch.

        Raises:
            UnsupportedCallError: it keeps pages of keys and values from before the block, which
                would be reused under the plan.
        """
        if getattr(model, _KEPT_MANAGER, None) is not None:
            raise UnsupportedCallError(
                "The model keeps a manager of continuous batching, whose keys and values were "
                "computed without this plan; call "
                "model.destroy_cached_continuous_batching_manager() before."
            )
        for name in BEGINNINGS:
            if hasattr(model, name):
                yield self._patch(model, name)

    def _patch(self, model: PreTrainedModel, name: str) -> Patch:
        def begin(*args: Any, **kwargs: Any) -> Any:
            self._check()
            thread = threading.get_ident()
            # generate_batch() begins a manager of its own, which ends with it.
            if thread not in self._threads:
                given = inspect.signature(patch.original).bind(*args, **kwargs).arguments
                _refuse_lasting(name, given)
                if self._is_watched():
                    _refuse_replays(model, given)
            self._threads.append(thread)
            try:
                return patch.original(*args, **kwargs)
            finally:
                self._threads.remove(thread)

        patch = Patch(model, name, begin)
        return patch


def refuse_plan(*, differs: bool, windows: object) -> None:
    """Refuses a plan that the forwards of many requests cannot have.

    Args:
        differs: whether the plan of a decode step may be another one than that of the prompt.
        windows: those of the plan.

    Raises:
        UnsupportedCallError: they cannot.
    """
    if differs:
        raise UnsupportedCallError(
            "generate_batch() computes prompts and decode steps in one forward, so a plan that "
            "differs between them cannot apply. Use generate(), or scope 'e2e' with a fixed plan "
            "(AdaSkip: online=False)."
        )
    if windows:
        raise UnsupportedCallError(
            "generate_batch() puts several requests into one row, which attention with a window "
            "would mix up; use generate(), or a plan without windows."
        )


def _refuse_replays(model: PreTrainedModel, given: Mapping[str, Any]) -> None:
    """Refuses statistics where transformers may record a forward as a CUDA graph and replay it.

    Nobody sees a replay: what was kept of the recorded forward is written over.
    """
    generation = given.get("generation_config") or model.generation_config
    own = getattr(generation, "continuous_batching_config", None)
    config = given.get("continuous_batching_config") or own
    # For the path of prompts and that of decode steps; some releases have one for both.
    graphs = getattr(config, "use_cuda_graph", None)
    if model.device.type != "cpu" and graphs not in (False, (False, False)):
        raise UnsupportedCallError(
            f"generate_batch() with use_cuda_graph={graphs} may replay forwards as CUDA graphs, of "
            "which recorders and policies that observe learn nothing; give it "
            "continuous_batching_config=ContinuousBatchingConfig(use_cuda_graph=False)."
        )


def _refuse_lasting(name: str, given: Mapping[str, Any]) -> None:
    """Refuses a manager that would outlast the block: one begun by hand, or that is to be kept."""
    if name != BEGINNINGS[0] or given.get("persistent_manager"):
        raise UnsupportedCallError(
            "A manager of continuous batching may outlast the block, and its keys and values with "
            "it; inside skipping() use generate_batch() with persistent_manager=False."
        )
