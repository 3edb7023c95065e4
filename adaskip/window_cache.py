"""The cache layer of a windowed attention: the sinks and a ring of the last tokens."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adaskip.errors import UnsupportedCallError
from adaskip.skipped_cache import SkippedCacheLayer
from adaskip.window_heads import HeadSplit
from adaskip.window_track import BlockStep, DecodeStep, WindowStep, WindowTrack, moved


class TrackedWindow(NamedTuple):
    """What a layer's window is to hold.

    Attributes:
        track: says which places hold what.
        history: the step in which a new track took in an earlier context; None without one.
        split: the heads that have the window; None for all of them.
    """

    track: WindowTrack
    history: WindowStep | None
    split: HeadSplit | None


class WindowCacheLayer(SkippedCacheLayer):  # type: ignore[no-untyped-call]
    """Keys and values of `size + sinks` tokens at most, whatever the context.

    After a reset it does what the layer does that it replaces, as every placeholder.

    Attributes:
        track: says which places hold what; shared by the layers with the same window.
        split: the heads that have the window; None for all of them.
        rest: a layer like the replaced one that has the other heads, with all tokens; or None.
        leads: whether it is the one that moves the track along when rows are moved.
        is_open: whether a forward is under way in which its attention sees a window.
        is_touched: whether it was given tokens of a forward that has not ended.
    """

    # transformers would cut it back, and what has fallen out of the window cannot come back.
    is_croppable = False

    def __init__(
        self,
        replaced: Any,
        index: int,
        length: int,
        device: torch.device,
        track: WindowTrack,
        split: HeadSplit | None = None,
        former: SkippedCacheLayer | None = None,
    ) -> None:
        super().__init__(replaced, index, length, device, former)
        self.kept = 0
        self.track = track
        self.split = split
        self.rest: Any = None if split is None else _emptied(replaced)
        self.leads = False
        self.is_open = False
        self.is_touched = False
        # [batch, heads, sinks + ring, width] each; None before the first token.
        self._held: tuple[Tensor, Tensor] | None = None
        # Those of the cache's last request, used again if they fit.
        self._spare: tuple[Tensor, Tensor] | None = None
        # What the heads without a window are to see in the forward that is under way.
        self._rest_states: tuple[Tensor, Tensor] | None = None
        if isinstance(former, WindowCacheLayer):
            if former.split == split:
                self._spare = former._held or former._spare
                if split is not None and self.is_compileable and length == 0:
                    # Its tensors stay where compiled graphs read them.
                    self.rest = former.rest
                    self.rest.reset()
            track.take_over(former.track)

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """Of the sinks and the ring: [batch, heads, sinks + ring, width]; None before a token."""
        return self.replaced.keys if self._held is None else self._held[0]

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """Likewise."""
        return self.replaced.values if self._held is None else self._held[1]

    @property
    def max_batch_size(self) -> int:
        """Batch size of what holds all tokens, which transformers before 5.17 compares."""
        return (
            super().max_batch_size if self.rest is None else getattr(self.rest, "max_batch_size", 0)
        )

    def update(self, *states: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The new keys and values as they are: the attention function puts them away.

        Those of heads that have no window are put away here, as the replaced layer would.

        Raises:
            CacheHoleError: an attention that sees more than the window asks for them.
        """
        if not self.is_open:
            return super().update(*states, **kwargs)
        if not torch.compiler.is_compiling():
            self.is_touched = True
        if self.split is not None:
            others = [self.split.rest(states[0]), self.split.rest(states[1])]
            self._rest_states = self.rest.update(*others, *states[2:], **kwargs)
        return states[0], states[1]

    def take_rest(self) -> tuple[Tensor, Tensor] | None:
        """Keys and values of all tokens, of the heads without a window; once in a forward."""
        taken, self._rest_states = self._rest_states, None
        return taken

    def earlier(self, step: BlockStep) -> tuple[Tensor, Tensor] | None:
        """Keys and values of the earlier tokens that are seen, in order; None before the first."""
        if self._held is None:
            return None
        return self._held[0].index_select(2, step.order), self._held[1].index_select(2, step.order)

    def put(self, key: Tensor, value: Tensor, step: WindowStep) -> tuple[Tensor, Tensor]:
        """Keeps what a window needs of the new tokens, and returns all that is held then."""
        old = self._held or self._emptied(key, value, step.room)
        if isinstance(step, DecodeStep):
            self._held = self._with_one(old[0], key, step), self._with_one(old[1], value, step)
        else:
            keys = self._with_several(old[0], key, step)
            self._held = keys, self._with_several(old[1], value, step)
        return self._held

    def reset(self) -> None:
        """Empties it; the next request brings a layer of its own."""
        super().reset()
        self.is_touched = False
        if self.rest is not None:
            self.rest.reset()
        self._spare = self._held or self._spare
        self._held = None
        for buffer in self._spare or ():
            self._pin(buffer)

    def crop(self, tokens_to_remove: int) -> None:
        """Refuses to forget tokens.

        Raises:
            UnsupportedCallError: tokens are to be removed.
        """
        if not self.lacks_tokens:
            super().crop(tokens_to_remove)
        elif tokens_to_remove < 0 or 0 < tokens_to_remove < self.length:
            raise UnsupportedCallError(
                "A cache with windowed attention cannot be cut back: what has left a window is "
                "gone. Begin with an empty cache."
            )

    def prefetch(self) -> None:
        """Fetches what heads without a window hold: a window is never moved off the device."""
        if self.rest is not None:
            self.rest.prefetch()

    def offload(self) -> None:
        """Moves what heads without a window hold off the device."""
        if self.rest is not None:
            self.rest.offload()

    def _move(self, name: str, argument: Any) -> None:
        if self._held is None:
            super()._move(name, argument)
        else:
            # They are written in place, in or out of inference mode.
            with torch.inference_mode(False), torch.set_grad_enabled(self._held[0].requires_grad):
                self._held = moved(self._held[0], argument), moved(self._held[1], argument)
            if self.rest is not None:
                getattr(self.rest, name)(argument)
            if self.leads:
                self.track.move(argument)

    def _emptied(
        self, key: Tensor, value: Tensor, room: int
    ) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """The buffers of the cache's last request, if a compiled one may go on with them."""
        spare, self._spare = self._spare, None
        if not self.is_compileable or spare is None or any(old.requires_grad for old in spare):
            return None, None
        for old, new in zip(spare, (key, value), strict=True):
            alike = (old.dtype, old.device) == (new.dtype, new.device)
            if not alike or old.shape != (*new.shape[:2], room, new.shape[3]):
                return None, None
        return spare[0].zero_(), spare[1].zero_()

    def _with_several(self, buffer: Tensor | None, new: Tensor, step: BlockStep) -> Tensor:
        buffer = self._sized(buffer, new, step.room)
        n_sinks = self.track.window.sinks
        sinks = torch.where(step.fill, sinks_among(new, step), buffer[:, :, :n_sinks])
        last = new[:, :, new.shape[2] - step.stored :]
        if torch.is_grad_enabled():
            buffer = buffer.index_copy(2, step.places, last)
            return torch.cat([sinks, buffer[:, :, n_sinks:]], dim=2)
        buffer.index_copy_(2, step.places, last)
        buffer[:, :, :n_sinks] = sinks
        return buffer

    def _with_one(self, buffer: Tensor | None, new: Tensor, step: DecodeStep) -> Tensor:
        buffer = self._sized(buffer, new, step.room)
        n_sinks = self.track.window.sinks
        if torch.is_grad_enabled():
            buffer = buffer.index_copy(2, step.place, new)
        else:
            buffer.index_copy_(2, step.place, new)
        if step.fill is None:
            return buffer
        sinks = torch.where(step.fill, new, buffer[:, :, :n_sinks])
        if torch.is_grad_enabled():
            return torch.cat([sinks, buffer[:, :, n_sinks:]], dim=2)
        buffer[:, :, :n_sinks] = sinks
        return buffer

    def _sized(self, buffer: Tensor | None, new: Tensor, room: int) -> Tensor:
        """A buffer of `room` places that holds what the present one holds."""
        if buffer is not None and buffer.shape[2] == room:
            return buffer
        shape = (*new.shape[:2], room, new.shape[3])
        with torch.inference_mode(False):
            grown = torch.zeros(shape, dtype=new.dtype, device=new.device)
        self._pin(grown)
        if buffer is not None:
            grown[:, :, : buffer.shape[2]] = buffer
        return grown

    def _pin(self, buffer: Tensor) -> None:
        """Tells compiled graphs that a buffer stays where it is; not from within one."""
        if self.is_compileable and not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(buffer)


def _emptied(layer: Any) -> Any:
    """A cache layer of the same sort that has no tensors yet, nor shares any."""
    made = copy.copy(layer)
    made.is_initialized = False
    for name, value in vars(layer).items():
        if isinstance(value, Tensor):
            setattr(made, name, None if name in ("keys", "values") else torch.zeros_like(value))
    return made


def sinks_among(new: Tensor, step: BlockStep) -> Tensor:
    """Of new keys or values those of the sinks: [batch, heads, sinks, width]; else anything."""
    batch, heads, _, width = new.shape
    return new.gather(2, step.sink_at[:, None, :, None].expand(batch, heads, -1, width))
