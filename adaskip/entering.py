"""`skipping()`: entering the block in which a model skips, and leaving it."""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from adaskip import calls, supported
from adaskip.blocks import execution_device
from adaskip.errors import AdaskipError, UnsupportedModelError, unknown_name
from adaskip.evaluating import evaluating
from adaskip.plan import EMPTY_PLAN, SCOPES, Scope, SkipPlan
from adaskip.policy import FixedSkipping, SkipPolicy
from adaskip.recorders import Recorder
from adaskip.session import Session
from adaskip.switchboard import Switchboard

logger = logging.getLogger(__name__)

# Policies bound to a session now, by id: most policies are dataclasses that cannot be hashed.
_BOUND: set[int] = set()
_BINDING = threading.Lock()


@contextmanager
def skipping(
    model: PreTrainedModel,
    policy: SkipPolicy | SkipPlan,
    *,
    scope: Scope = "e2e",
    recorders: Sequence[Recorder] = (),
    verify: bool = False,
) -> Iterator[Session]:
    """Lets `model` skip what `policy` says, until the block is left.

    Args:
        model: a causal language model of a supported family (`adaskip.blocks.BLOCKS`).
        policy: decides what is skipped; a plan skips the same at every step.
        scope: where its plan applies. "prefill": in prefill, and what prefill skipped stays
            skipped while that request decodes. "decode": in decode steps only. "e2e": in both.
        recorders: also given the statistics they watch.
        verify: compare a forward of a few tokens, nothing skipped, with the unpatched model's.

    Yields:
        The session, whose `step` and `plan` tell of the latest forward.

    Raises:
        UnsupportedModelError: the architecture is not supported, the model is wrapped, another
            tool has patched its layers, or with nothing skipped it computes something else.
        UnsupportedCallError: the model is inside a `skipping()` already; or, from a forward, it is
            called in a way in which skipping would be silently wrong; or, when the block is left,
            a `generate()` goes on in another thread.
        CacheHoleError: from a forward, if attention is to run that the request skipped before.
        AdaskipError: unknown scope, no policy, or a budget that does not fit the model.
    """
    if scope not in SCOPES:
        raise unknown_name("scope", str(scope), SCOPES)
    if not isinstance(recorders, Sequence):
        raise AdaskipError(
            f"recorders is a {type(recorders).__name__}; give a sequence, e.g. [recorder]."
        )
    block = supported.check_model(model)
    policy = as_policy(policy)
    decoder: Any = model.base_model
    with ExitStack() as undo:
        undo.enter_context(supported.alone(decoder))
        supported.check_layers(decoder.layers, model.config.model_type, block)
        policy.check_model(model)
        policy = undo.enter_context(_bound(policy, scope, len(decoder.layers)))
        calls.refuse_bare_model(model, policy, scope)
        board = Switchboard(decoder.layers, block, model.dtype)
        board.take_maps(policy.constant_plan or EMPTY_PLAN)
        session = Session(model, policy, scope, recorders, block, board)
        undo.callback(board.windows.take_back)
        expected = probe(model) if verify else None
        for patch in board.patches():
            undo.callback(patch.take_back)
        if expected is not None:
            refuse_difference(expected, probe(model))
        for patch in session.patched_model(model):
            undo.callback(patch.take_back)
        logger.info(
            "Inside skipping(): %s of %d layers, scope %s, %r",
            *(type(model).__name__, len(decoder.layers), scope, policy),
        )
        undo.callback(session.close)
        yield session
        session.refuse_unfinished()


@contextmanager
def _bound(policy: SkipPolicy, scope: Scope, n_layers: int) -> Iterator[SkipPolicy]:
    """The policy bound for one session: a copy, if it is in use in another one."""
    with _BINDING:
        if id(policy) in _BOUND:
            policy = copy.copy(policy)
        _BOUND.add(id(policy))
    try:
        policy.scope = scope
        policy.bind(n_layers)
        yield policy
    finally:
        _BOUND.discard(id(policy))


def as_policy(policy: object) -> SkipPolicy:
    """The policy; a plan stands for `FixedSkipping` of it.

    Raises:
        AdaskipError: it is neither.
    """
    if isinstance(policy, SkipPlan):
        return FixedSkipping(policy)
    if isinstance(policy, SkipPolicy):
        return policy
    if isinstance(policy, type):
        raise AdaskipError(
            f"The policy is the class {policy.__name__}; make one of it, e.g. EarlyExit(n_skip=4)."
        )
    raise AdaskipError(
        f"The policy is {policy!r:.60} of type {type(policy).__name__}; give a policy, e.g. "
        "EarlyExit(n_skip=4), or a plan, e.g. SkipPlan({Sublayer(3, 'ffn'): None})."
    )


def probe(model: PreTrainedModel) -> Tensor:
    """What the model makes of a few tokens, without a cache: last hidden states [1, 8, hidden]."""
    vocab_size = model.config.get_text_config(decoder=True).vocab_size
    device = execution_device(model.get_input_embeddings())
    ids = torch.arange(8, device=device)[None] * vocab_size // 8
    with torch.no_grad(), evaluating(model):
        output: Tensor = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return output


def refuse_difference(expected: Tensor, found: Tensor) -> None:
    """Refuses a patch that changes what the model computes although nothing is skipped.

    Raises:
        UnsupportedModelError: the two `probe`s are not bit-identical.
    """
    if not torch.equal(expected.nan_to_num(), found.nan_to_num()):
        raise UnsupportedModelError(
            "With nothing skipped, the model's hidden states differ by up to "
            f"{(expected - found).abs().max().item():.3g} from those outside of skipping(): a "
            "layer does not compute the formula of its row in adaskip.blocks.BLOCKS."
        )
