"""Replaces a method of one module instance, so that nothing of it can stay behind."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn


class Patch:
    """Puts `replacement` in the place of the method `name` of one module.

    What is put there is a method of the module, which does what the module's class says as soon as
    it finds itself on a copy of the module, and, for whoever kept it, after it is taken back. A
    pickle of the module holds the method of its class.

    Attributes:
        original: the method as it was.
        in_place: whether a call of the method goes to the replacement; else to the original.
    """

    def __init__(self, module: nn.Module, name: str, replacement: Callable[..., Any]) -> None:
        original: Callable[..., Any] = getattr(module, name)
        self.original = original
        self._module = module
        self._name = name
        self._own = vars(module).get(name)
        self.in_place = True

        @functools.wraps(original)
        def method(owner: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if owner is not module:
                return getattr(type(owner), original.__name__)(owner, *args, **kwargs)
            return (replacement if self.in_place else original)(*args, **kwargs)

        self._method = MethodType(method, module)
        setattr(module, name, self._method)

    def take_back(self) -> None:
        """Puts the method back wherever this patch is found on the module."""
        self.in_place = False
        found = [name for name, value in vars(self._module).items() if value is self._method]
        for name in found:
            if self._own is None and name == self._name:
                delattr(self._module, name)
            else:
                # Whoever moved it, as accelerate's hooks do, calls what is there.
                setattr(self._module, name, self.original if self._own is None else self._own)
        if not found:
            warnings.warn(
                f"{type(self._module).__name__}.{self._name} was replaced inside skipping() and is "
                "left as it is. Nothing is skipped any more, but undo that replacement before "
                "the model is used in skipping() again.",
                stacklevel=5,
            )


def patch_forward(module: nn.Module, forward: Callable[..., Any]) -> Patch:
    """Replaces a module's forward beneath the hook of accelerate, if it has one."""
    # accelerate keeps the module's own forward under this name and calls it from its hook.
    hooked = hasattr(module, "_hf_hook") and "_old_forward" in vars(module)
    return Patch(module, "_old_forward" if hooked else "forward", forward)
