"""Lets one forward of a model through at a time."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import FrameType

import torch

from adaskip.errors import UnsupportedCallError

# How often one that waits looks whether the forward it waits for is still there, in seconds.
_LOOK_EVERY = 1.0


class Turnstile:
    """Forwards from several threads are computed one after the other, and none within another.

    Args:
        give_up: leaves a forward that failed.
    """

    def __init__(self, give_up: Callable[[], None]) -> None:
        self._give_up = give_up
        self._owner: int | None = None
        self._lock = threading.RLock()
        self._running = False
        self._left_behind = False
        # That of a graph's forward; one that has failed is no longer computed.
        self._frame: FrameType | None = None
        self._replacing = threading.Lock()

    def enter(self, *, compiled: bool) -> None:
        """Waits until no other thread is in a forward.

        Args:
            compiled: whether the forward is a graph's, which does not leave if it fails.

        Raises:
            UnsupportedCallError: this thread is in a forward.
        """
        while not self._lock.acquire(timeout=_LOOK_EVERY):
            self._replace_if_left_behind()
        if self._running:
            # The same thread: the lock is held twice now.
            self._lock.release()
            if not self._is_left_behind():
                raise UnsupportedCallError(
                    "The model was called from within its own forward (by a hook?) inside "
                    "skipping(); call it after that forward."
                )
        self._owner = threading.get_ident()
        self._running = True
        self._left_behind = compiled
        self._frame = _computed_frame() if compiled else None

    def free(self) -> None:
        """Leaves what a graph's forward of this thread has left behind; not within a forward."""
        with self._replacing:
            if self._running and self._left_behind and self._owner == threading.get_ident():
                self._give_up()

    def leave(self) -> None:
        """Lets other threads in."""
        self._running = False
        self._frame = None
        self._lock.release()

    def _replace_if_left_behind(self) -> None:
        """Leaves what a graph's forward of another thread has left behind, which holds the lock."""
        with self._replacing:
            if self._is_left_behind():
                self._lock = threading.RLock()
                self._lock.acquire()
                self._give_up()

    def _is_left_behind(self) -> bool:
        """Whether a graph's forward is over, and nobody has left it."""
        if not (self._running and self._left_behind and self._owner is not None):
            return False
        now = sys._current_frames().get(self._owner)
        if now is None:
            return True  # the thread has ended
        if self._frame is None:
            return self._owner == threading.get_ident()
        while now is not None and now is not self._frame:
            now = now.f_back
        return now is None


@cache
def _dynamo() -> str:
    """The folder of what traces graphs."""
    return str(Path(torch.__file__).parent / "_dynamo")


def _computed_frame() -> FrameType | None:
    """That of a graph's forward: what has called what torch leaves alone in it."""
    frame: FrameType | None = sys._getframe(3)
    while frame is not None and frame.f_code.co_filename.startswith(_dynamo()):
        frame = frame.f_back
    return frame
