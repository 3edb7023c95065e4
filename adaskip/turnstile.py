"""Lets one forward of a model through at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable

from adaskip.errors import UnsupportedCallError


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

    def enter(self, *, compiled: bool) -> None:
        """Waits until no other thread is in a forward.

        Args:
            compiled: whether the forward is a graph's, which does not leave if it fails.

        Raises:
            UnsupportedCallError: this thread is in a forward.
        """
        self._lock.acquire()
        if not self._running:
            self._owner = threading.get_ident()
            self._running = True
            self._left_behind = compiled
            return
        # The same thread: the lock is held twice now.
        self._lock.release()
        if not self._left_behind:
            raise UnsupportedCallError(
                "The model was called from within its own forward (by a hook?) inside skipping(); "
                "call it after that forward."
            )

    def free(self) -> None:
        """Leaves what a graph's forward of this thread has left behind; not within a forward."""
        if self._running and self._left_behind and self._owner == threading.get_ident():
            self._give_up()

    def leave(self) -> None:
        """Lets other threads in."""
        self._running = False
        self._lock.release()
