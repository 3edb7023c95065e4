"""Which tokens a window of attention sees, and where their keys and values are kept.

The keys and values of a windowed attention lie in one buffer: the sinks, then a ring in which token
t has place `t modulo size`. Attention does not care for the order of keys, so nothing is ever moved
there. A `WindowTrack` knows, for all layers that share a window, which places hold a token that may
be seen, and says so to each forward in a `WindowStep`; nothing of it reads the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from adaskip.replacements import Window

# Queries are computed in blocks of so many: each sees its block and the window before it. Measured
# on a CPU at windows of 64 to 256 tokens, 64 is as fast as any other size or faster.
BLOCK = 64
# The ring of a cache that grows is allocated in steps of so many tokens.
ROOM = 64


@dataclass(frozen=True, eq=False)
class DecodeStep:
    """What one forward of one token needs; tensors on the device.

    With a cache that is compiled they are the same tensors in every step.

    Attributes:
        mask: whether a place of the buffer is seen: bool [rows, 1, 1, sinks + ring]; None where it
            is known that all are.
        place: of the token in the buffer: [1].
        fill: whether the token is a sink, by sink: bool [rows, 1, sinks, 1]; None if all sinks are
            there.
        room: length of the buffer.
    """

    mask: Tensor | None
    place: Tensor
    fill: Tensor | None
    room: int


@dataclass(frozen=True, eq=False)
class BlockStep:
    """What one forward of several tokens needs; tensors on the device.

    Attributes:
        window: its shape.
        past: tokens before these in every row, where no row has padding; else None.
        block: queries in a block.
        before: keys before a block that it may see.
        order: places of the earlier tokens that are seen, in order: [held tokens].
        sink_at: the new token that is each sink: [rows, sinks].
        fill: whether there is one: bool [rows, 1, sinks, 1].
        stored: new tokens that stay: the last so many.
        places: of those in the buffer: [stored].
        room: length of the buffer.
        make_mask: makes `mask`, which a kernel that knows windows has no need of.
    """

    window: Window
    past: int | None
    block: int
    before: int
    order: Tensor
    sink_at: Tensor
    fill: Tensor
    stored: int
    places: Tensor
    room: int
    make_mask: Callable[[], Tensor] = field(repr=False)

    @cached_property
    def mask(self) -> Tensor:
        """Whether a query sees a key: bool [rows, blocks, block, sinks + before + block]."""
        return self.make_mask()


WindowStep = DecodeStep | BlockStep


class WindowTrack:
    """What a request's windows of one shape hold.

    Args:
        window: their shape.
        device: of the layers that have them.
        static: whether the cache is one that is compiled: everything keeps its shape.
    """

    def __init__(self, window: Window, device: torch.device, *, static: bool = False) -> None:
        self.window = window
        self._device = device
        self._static = static
        self._length = 0
        # Steps since the last prompt.
        self._decoded = 0
        self._padded = False
        self._filling = True
        # What compiled graphs read stays where it is, from request to request: a CUDA graph is
        # recorded anew when it moves. It is right for the next token after so many.
        self._fixed: DecodeStep | None = None
        self._fixed_for: int | None = None
        # Whether nothing else has been told of the last tokens.
        self._is_behind = False
        # One row as long as all rows of the batch are alike.
        self._n_real = torch.zeros(1, 1, dtype=torch.long, device=device)
        self._sinks = torch.zeros(1, window.sinks, dtype=torch.bool, device=device)
        self._ring = torch.zeros(1, 0, dtype=torch.bool, device=device)

    def advance(self, real: Tensor | None, tokens: int, *, decoding: bool = False) -> WindowStep:
        """Takes in the tokens of the coming forward.

        Args:
            real: False at padding: [batch, tokens]; None if there is none.
            tokens: new tokens per sequence.
            decoding: whether it is known that every row has its prompt, and that the token counts.
        """
        known = self._fixed_for == self._length and not torch.is_grad_enabled()
        if tokens == 1 and known and real is None and not self._padded:
            self._note(decoding=decoding)
            return self._next_fixed()
        if tokens == 1 and real is None and self._is_full:
            self._note(decoding=decoding)
            return self._next_of_full()
        if self._is_behind:
            self._catch_up()
        # Every row has a real token before its first decode step, so after as many steps as there
        # are sinks it has them all; where the device alone knows, they are always looked for.
        self._padded |= real is not None
        passed = self._decoded if self._padded else self._length
        self._filling = self._static or passed < self.window.sinks
        self._note(decoding=decoding)
        if real is None:
            real = torch.ones(1, tokens, dtype=torch.bool, device=self._device)
        real = real.to(self._device)
        rank = self._n_real + real.cumsum(-1) - 1
        self._n_real = rank[:, -1:] + 1
        is_sink = real & (rank < self.window.sinks)
        rows = len(is_sink)
        self._sinks = self._sinks.expand(rows, -1)
        room = self._room(tokens)
        self._ring = pad(self._ring.expand(rows, -1), (0, room - self._ring.shape[1]))
        numbers = torch.arange(self.window.sinks, device=self._device)
        of_sink = is_sink[:, None] & (rank[:, None] == numbers[:, None])
        step = (self._one if tokens == 1 else self._several)(real & ~is_sink, is_sink, of_sink)
        self._length += tokens
        # With gradients, a backward pass still to come needs the tensors of its own forward.
        if self._static and isinstance(step, DecodeStep) and not torch.is_grad_enabled():
            step = self._fix(step)
        return step

    def believe(self, history: Tensor | None) -> None:
        """Takes the word of a later turn for which of the earlier tokens are padding.

        Args:
            history: False at padding: [batch, earlier tokens]; None if there is none.
        """
        if history is None and not self._padded:
            return
        if self._is_behind:
            self._catch_up()
        self._padded, sinks = True, self.window.sinks
        if history is None:
            history = torch.ones(1, self._length, dtype=torch.bool, device=self._device)
        rows = max(len(history), len(self._ring))
        seen = history.to(self._device).expand(rows, -1)
        rank = seen.cumsum(-1) - 1
        self._n_real = rank[:, -1:] + 1
        if sinks:
            # A sink that does not count any more gives its place to the next token that does; one
            # that counts only now is not kept as a sink, and stays in the ring.
            numbers = torch.arange(sinks, device=self._device)
            self._sinks = self._sinks.expand(rows, -1) & (numbers < self._n_real)
            kept = self._sinks.gather(1, rank.clamp(0, sinks - 1))
            seen = seen & ~(kept & (rank < sinks))
        first = max(0, self._length - self.window.size)
        held = torch.arange(first, self._length, device=self._device)
        ring = self._ring.expand(rows, -1)
        self._ring = ring.index_copy(1, held % self.window.size, seen[:, held])

    def _note(self, *, decoding: bool) -> None:
        """Counts the decode steps since the last prompt."""
        self._decoded = self._decoded + 1 if decoding else 0

    def take_over(self, former: WindowTrack) -> None:
        """Goes on with the tensors that compiled graphs read in the cache's last request."""
        if self._fixed is None and (former.window, former._device) == (self.window, self._device):
            self._fixed, former._fixed, former._fixed_for = former._fixed, None, None

    def move(self, argument: Tensor | int) -> None:
        """Selects rows, or repeats each, as `moved`."""
        for name in ("_n_real", "_sinks", "_ring"):
            rows: Tensor = getattr(self, name)
            # A single row stands for all of them.
            if len(rows) > 1:
                setattr(self, name, moved(rows, argument))

    def _fix(self, step: DecodeStep) -> DecodeStep:
        """A decode step with the same numbers in tensors that stay where they are."""
        fixed = self._fixed
        assert step.mask is not None  # noqa: S101 - a static track's step always has one
        if fixed is None or fixed.mask is None or fixed.mask.shape != step.mask.shape:
            fill = None if step.fill is None else _staying(step.fill)
            fixed = DecodeStep(_staying(step.mask), _staying(step.place), fill, step.room)
            self._fixed = fixed
        else:
            fixed.mask.copy_(step.mask)
            fixed.place.copy_(step.place)
            if fixed.fill is not None and step.fill is not None:
                fixed.fill.copy_(step.fill)
        self._fixed_for = self._length
        return fixed

    def _next_fixed(self) -> DecodeStep:
        """The next token of rows that are all alike: the device is told what is new of it."""
        fixed, number, sinks = self._fixed, self._length, self.window.sinks
        assert fixed is not None  # noqa: S101 - there is one where it was brought to a token
        assert fixed.mask is not None  # noqa: S101 - and it has a mask
        place = sinks + number % self.window.size
        fixed.mask[..., number if number < sinks else place] = True
        fixed.place.fill_(place)
        if fixed.fill is not None and number <= sinks:
            fixed.fill.zero_()
            fixed.fill[:, :, number : number + 1] = number < sinks
        self._is_behind = True
        self._length += 1
        self._fixed_for = self._length
        return fixed

    def _catch_up(self) -> None:
        """Takes in the tokens of which only the tensors that stay have been told."""
        length, sinks, size = self._length, self.window.sinks, self.window.size
        self._n_real = torch.full((1, 1), length, device=self._device)
        self._sinks = (torch.arange(sinks, device=self._device) < length)[None]
        first = min(max(sinks, length - size), length)
        held = torch.arange(first, length, device=self._device) % size
        ring = torch.zeros(1, size, dtype=torch.bool, device=self._device)
        self._ring = ring.index_fill(1, held, value=True)
        self._is_behind = False

    @property
    def _is_full(self) -> bool:
        """Whether it is known that every place holds a token; what is compiled keeps its mask."""
        full = self.window.sinks + self.window.size
        return not (self._static or self._padded) and self._length >= full

    def _next_of_full(self) -> DecodeStep:
        """The next token, in the place of the oldest: all places are seen."""
        sinks, size = self.window.sinks, self.window.size
        place = torch.full((1,), sinks + self._length % size, device=self._device)
        self._n_real = self._n_real + 1
        self._length += 1
        return DecodeStep(None, place, None, sinks + size)

    def _room(self, tokens: int) -> int:
        """Places of the ring."""
        size = self.window.size
        needed = -(-(self._length + tokens) // ROOM) * ROOM
        return size if self._static else min(size, needed)

    def _one(self, seen: Tensor, is_sink: Tensor, of_sink: Tensor) -> DecodeStep:
        """A forward of one token."""
        sinks, size = self.window.sinks, self.window.size
        at = self._length % size
        place = torch.full((1,), sinks + at, device=self._device)
        self._sinks = self._sinks | of_sink[..., 0]
        self._ring = self._ring.index_copy(1, place - sinks, seen)
        # Padding sees itself: a query that sees nothing would be NaN.
        visible = self._ring.index_copy(1, place - sinks, ~is_sink)
        mask = torch.cat([self._sinks, visible], dim=1)[:, None, None]
        fill = of_sink[:, None] if self._filling and sinks else None
        return DecodeStep(mask, place, fill, mask.shape[-1])

    def _several(self, seen: Tensor, is_sink: Tensor, of_sink: Tensor) -> BlockStep:
        """A forward of several tokens."""
        (rows, tokens), device = seen.shape, self._device
        sinks, size = self.window.sinks, self.window.size
        n_held = min(size - 1, self._length)
        before = min(size - 1, self._length + tokens - 1)
        block = min(BLOCK, tokens)
        n_blocks = -(-tokens // block)
        tail = n_blocks * block - tokens
        order = (torch.arange(n_held, device=device) + self._length - n_held) % size
        keys = torch.cat([self._ring[:, order], seen], dim=1)
        keys = pad(keys, (before - n_held, tail)).unfold(1, before + block, block)
        own = pad(~is_sink, (0, tail), value=True).view(rows, n_blocks, block, 1)
        found, sink_at = of_sink.any(-1), of_sink.int().argmax(-1)
        never = tokens + block
        since = sink_at.masked_fill(~found, never).masked_fill(self._sinks, -1)
        make_mask = partial(_blocks_mask, keys, own, since, before, size)
        past = None if self._padded else self._length
        stored = min(tokens, size)
        places = torch.arange(self._length + tokens - stored, self._length + tokens, device=device)
        places = places % size
        self._sinks = self._sinks | found
        self._ring = self._ring.index_copy(1, places, seen[:, tokens - stored :])
        room = sinks + self._ring.shape[1]
        fill = found[:, None, :, None]
        put = (order + sinks, sink_at, fill, stored, places + sinks, room)
        return BlockStep(self.window, past, block, before, *put, make_mask)


def _blocks_mask(keys: Tensor, own: Tensor, since: Tensor, before: int, size: int) -> Tensor:
    """Whether a query sees a key, block by block.

    Args:
        keys: whether a key may be seen: bool [rows, blocks, before + block].
        own: whether a query sees itself in any case: bool [rows, blocks, block, 1].
        since: number of the new token from which on each sink is seen: [rows, sinks].
        before: keys before a block.
        size: of the window.
    """
    _, n_blocks, block, _ = own.shape
    query = torch.arange(block, device=keys.device)[:, None] + before
    key = torch.arange(before + block, device=keys.device)
    band = (key <= query) & (key > query - size)
    # Padding sees itself: a query that sees nothing would be NaN.
    mask = (keys[:, :, None] & band) | (own & (key == query))
    time = torch.arange(n_blocks * block, device=keys.device).view(n_blocks, block, 1)
    return torch.cat([since[:, None, None] <= time, mask], dim=-1)


def _staying(tensor: Tensor) -> Tensor:
    """A copy that compiled graphs may take to stay where it is, inference mode or not."""
    with torch.inference_mode(False):
        copy = tensor.clone()
    torch._dynamo.mark_static_address(copy)
    return copy


def moved(rows: Tensor, argument: Tensor | int) -> Tensor:
    """The rows with these indices, or each row so many times."""
    if isinstance(argument, int):
        return rows.repeat_interleave(argument, dim=0)
    return rows[argument.to(rows.device)]
