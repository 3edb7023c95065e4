"""The windows of attention in one session: where they are, and what each forward of them needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from adaskip import window_attention
from adaskip.blocks import BlockSpec
from adaskip.plan import SkipPlan
from adaskip.replacements import Window
from adaskip.requests import Request
from adaskip.sublayers import Switches
from adaskip.window_cache import TrackedWindow, WindowCacheLayer
from adaskip.window_heads import HeadSplit
from adaskip.window_track import WindowStep, WindowTrack


class Windows:
    """Gives attention its windows, and takes them back.

    Args:
        layers: of the model.
        block: their family's row.
        switches: of each layer.
        devices: of each layer.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        block: BlockSpec,
        switches: Sequence[Switches],
        devices: Sequence[torch.device],
    ) -> None:
        self._layers = layers
        self._body = block.attn.body
        self._switches = switches
        self._devices = devices
        self._windowed: dict[int, Window] = {}
        # Whose attention function is ours.
        self._switched: dict[int, nn.Module] = {}
        self._open: list[WindowCacheLayer] = []
        # What the tracks of the forward held before it.
        self._before: dict[WindowTrack, dict[str, object]] = {}

    def place(self, plan: SkipPlan) -> None:
        """Makes the layers of a plan that have a window compute one, and no other layer."""
        wanted = dict(plan.windows)
        for index in {*wanted, *self._windowed}:
            if wanted.get(index) != self._windowed.get(index):
                self._switch(index, wanted.get(index))
        self._windowed = wanted

    def _switch(self, index: int, window: Window | None) -> None:
        """Gives a layer's attention, whichever it is now, a window or its own function back."""
        attention: nn.Module = getattr(self._layers[index], self._body)
        before = self._switched.pop(index, attention)
        if before is not attention:
            window_attention.switch(before, None)
        window_attention.switch(attention, window)
        if window is not None:
            self._switched[index] = attention

    def take_back(self) -> None:
        """Gives every layer its own attention back."""
        self.place(SkipPlan())

    def tracked(
        self,
        request: Request,
        plan: SkipPlan,
        history: Tensor | None,
        past: int,
        capacity: int | None,
    ) -> dict[int, TrackedWindow]:
        """What the cache is told of each layer that has a window.

        Args:
            request: whose tracks they are.
            plan: of the coming forward.
            history: False at padding among the earlier tokens: [batch, past]; None if there is
                none.
            past: earlier tokens.
            capacity: tokens that the cache has places for; None if it grows.
        """
        known = dict(request.windows) if past else {}
        new: dict[WindowTrack, WindowStep | None] = {}
        found: dict[int, TrackedWindow] = {}
        for layer, window in plan.windows.items():
            # Which heads have it makes no difference to what it sees.
            key = (window.whole, self._devices[layer])
            if key not in known:
                known[key] = track = _track(*key, capacity)
                new[track] = track.advance(history, past) if past else None
            split = HeadSplit.of(window)
            found[layer] = TrackedWindow(known[key], new.get(known[key]), split)
        request.windows = known
        return found

    def begin(
        self,
        cache: Cache | None,
        request: Request,
        plan: SkipPlan,
        real: Tensor | None,
        tokens: int,
        *,
        decoding: bool,
        history: Tensor | None = None,
        retold: bool = False,
    ) -> None:
        """Takes the coming forward's tokens in, and tells the layers what to see.

        Args:
            cache: of the forward; None without one.
            request: whose tracks they are.
            plan: of the forward.
            real: False at padding: [batch, tokens]; None if there is none.
            tokens: new tokens per sequence.
            decoding: as `WindowTrack.advance` takes it.
            history: False at padding among the earlier tokens, as the call now has it: [batch,
                earlier tokens]; None if there is none.
            retold: whether that is to be believed over what was known of them.
        """
        steps: dict[WindowTrack, WindowStep] = {}
        for layer, window in plan.windows.items():
            if getattr(self._layers[layer], self._body) is not self._switched[layer]:
                self._switch(layer, window)
            track = request.windows[window.whole, self._devices[layer]]
            if track not in steps:
                self._before[track] = dict(vars(track))
                if retold:
                    track.believe(history)
                steps[track] = track.advance(real, tokens, decoding=decoding)
            self._switches[layer].window = steps[track]
            held = None if cache is None else cache.layers[layer]
            if isinstance(held, WindowCacheLayer):
                held.is_open = True
                self._open.append(held)

    def end(self, *, failed: bool = False) -> None:
        """Lets go of what a forward needed.

        Args:
            failed: whether the tracks are to forget its tokens; their tensors never change.
        """
        for track, held in self._before.items():
            if failed:
                vars(track).update(held)
        self._before.clear()
        while self._open:
            self._open.pop().is_open = False
        for layer in self._windowed:
            self._switches[layer].window = None


def _track(window: Window, device: torch.device, capacity: int | None) -> WindowTrack:
    """A track of a window: of a size that the cache may come to hold, if that cannot grow."""
    if capacity is None:
        return WindowTrack(window, device)
    return WindowTrack(replace(window, size=min(window.size, capacity)), device, static=True)
