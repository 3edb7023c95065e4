"""What a call of `generate()` knows of its forwards: the phase, the padding, which rows have ended.

Each thread, and each task of an event loop, has its own calls: a stack, because an assistant or
token healing generates within.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.stopping_criteria import StoppingCriteriaList

from adaskip.errors import UnsupportedCallError, UnsupportedModelError
from adaskip.patching import Patch
from adaskip.plan import Phase

# Private names of transformers on which the phase and the refusals rest.
_NEEDED = ("generate", "_prefill", "_get_stopping_criteria", "_get_candidate_generator")


@dataclass(slots=True)
class Turn:
    """One call of `generate()`, or one stretch of a hand-written loop that says its phase.

    Attributes:
        phase: of the coming forwards; None where it has to be guessed.
        mask: which tokens of the prompt are not padding: [batch, past + tokens]; None if all are.
        ended: the rows whose answer has ended: bool [batch]; None if none has.
        assisted: whether tokens are drafted and verified several at a time.
        drafts: whether it drafts them, for another model to verify.
        tells_padding: whether `mask` and `ended` are to be believed over the forward's own mask.
    """

    phase: Phase | None = None
    mask: Tensor | None = None
    ended: Tensor | None = None
    assisted: bool = False
    drafts: bool = False
    tells_padding: bool = False

    @property
    def takes_one_by_one(self) -> bool:
        """Whether the coming forwards of `generate()` have a token per row each."""
        drafted = self.assisted or self.drafts
        return self.tells_padding and not drafted and self.phase is Phase.DECODE

    def end_rows(self, done: Tensor) -> None:
        """Notes the rows that have ended at this step, on the device."""
        self.ended = done if self.ended is None else self.ended | done

    def real_tokens(self, phase: Phase, past: int, tokens: int) -> Tensor | None:
        """Which tokens of a forward count: bool [batch, tokens], or None if all do."""
        if phase is Phase.PREFILL:
            return None if self.mask is None else self.mask[:, past : past + tokens].bool()
        return None if self.ended is None else ~self.ended[:, None].expand(-1, tokens)


class OpenCalls:
    """Counts the calls of `generate()` that all threads are in."""

    def __init__(self) -> None:
        self.n_open = 0
        self._lock = threading.Lock()

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Counts one until it ends."""
        with self._lock:
            self.n_open += 1
        try:
            yield
        finally:
            with self._lock:
                self.n_open -= 1


class Turns:
    """The calls of `generate()` this thread or task is in, the innermost last.

    Args:
        calls: counts those of all threads.
        ended: called when one of them ends, in its thread.
    """

    def __init__(self, calls: OpenCalls, ended: Callable[[], None]) -> None:
        self._ended = ended
        self.calls = calls

    @property
    def current(self) -> Turn | None:
        """The innermost call; None in a hand-written loop that says nothing."""
        return next((turn for turns, turn in reversed(_STACK.get()) if turns is self), None)

    def of(self, tokens: int, *, cached: bool) -> Turn | None:
        """The call that a forward is a part of; None where it speaks for itself.

        Something within a `generate()` that this knows nothing of, such as a logits processor, may
        call the model, too.

        Args:
            tokens: of the forward, per sequence.
            cached: whether it has a cache; without, all tokens so far come anew in each step.
        """
        turn = self.current
        foreign = turn is not None and cached and tokens > 1 and turn.takes_one_by_one
        return None if foreign else turn

    @contextmanager
    def within(self, turn: Turn) -> Iterator[None]:
        """Makes `turn` the innermost one.

        Raises:
            UnsupportedCallError: another one has begun since and has not ended, so that forwards
                within either were taken for the other's: generators that take turns, say.
        """
        own = (self, turn)
        _STACK.set((*_STACK.get(), own))
        try:
            yield
            if self.current is not turn:
                raise UnsupportedCallError(
                    "prefill() or decode() of a session ended while one that had begun within it "
                    "had not, as where generators take turns: its forwards were counted to the "
                    "other's phase. Begin and end them around each forward."
                )
        finally:
            _STACK.set(tuple(each for each in _STACK.get() if each is not own))
            self._ended()


# The turns of all sessions: one variable, because a context keeps every variable for ever.
_STACK: ContextVar[tuple[tuple[Turns, Turn], ...]] = ContextVar("turns", default=())


class _NotedCriteria(StoppingCriteriaList):
    """Stopping criteria that tell a turn which rows they have ended."""

    turn: Turn

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        done: Tensor = super().__call__(input_ids, scores, **kwargs)
        self.turn.end_rows(done)
        return done


def listen(
    model: PreTrainedModel, turns: Turns, check_assisted: Callable[[Any], None]
) -> list[Patch]:
    """Lets the model's `generate()` tell `turns` what it does.

    Args:
        model: a model that generates.
        turns: where it is told.
        check_assisted: called with the generation config before any token is drafted; may refuse.

    Raises:
        UnsupportedModelError: this transformers lacks a method that has to be listened to.
    """
    missing = [name for name in _NEEDED if not callable(getattr(model, name, None))]
    if missing:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no {' and no '.join(missing)}, which skipping() needs to "
            "tell prefill from decode steps; install a transformers of which pyproject.toml allows."
        )

    def generate(*args: Any, **kwargs: Any) -> Any:
        with turns.calls.counted(), turns.within(Turn()):
            return whole.original(*args, **kwargs)

    def prefill(input_ids: Any, generation_config: Any, model_kwargs: Any, **kwargs: Any) -> Any:
        turn = turns.current or Turn()
        # An assistant is called anew for every draft, and then goes on decoding.
        drafts = kwargs.get("is_first_iteration") is False
        turn.phase, turn.tells_padding = Phase.DECODE if drafts else Phase.PREFILL, True
        turn.drafts = drafts
        turn.mask, turn.ended = model_kwargs.get("attention_mask"), None
        output = filling.original(input_ids, generation_config, model_kwargs, **kwargs)
        turn.phase = Phase.DECODE
        return output

    def stopping_criteria(generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        made = stopping.original(generation_config, *args, **kwargs)
        # Beams that have ended are put aside by beam search itself.
        if turns.current is None or (generation_config.num_beams or 1) > 1:
            return made
        noted = _NotedCriteria(made)
        noted.turn = turns.current
        return noted

    def candidate_generator(*args: Any, **kwargs: Any) -> Any:
        check_assisted(kwargs["generation_config"])
        made = drafting.original(*args, **kwargs)
        if turns.current is not None:
            # Prompt and first draft are one forward, which is the prefill.
            turns.current.phase, turns.current.assisted = Phase.PREFILL, True
        return made

    whole = Patch(model, "generate", generate)
    filling = Patch(model, "_prefill", prefill)
    stopping = Patch(model, "_get_stopping_criteria", stopping_criteria)
    drafting = Patch(model, "_get_candidate_generator", candidate_generator)
    return [whole, filling, stopping, drafting]
