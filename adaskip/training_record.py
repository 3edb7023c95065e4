"""The record of a training: where it stands, in a file from which the next call of it goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from adaskip.errors import RunError
from adaskip.fingerprint import first_difference
from adaskip.whole_files import write_whole

# Of what is kept, and of the training itself: half of one means nothing to another.
VERSION = 1
# Where the file's metadata has its JSON.
_KEY = "adaskip.training"


class TrainingRecord:
    """Tensors and numbers of a training, so that an interrupted one can go on.

    Args:
        path: a safetensors file; None keeps nothing.
        header: what it is a training of, ready for JSON: a record of another one is refused.
    """

    def __init__(self, path: str | os.PathLike[str] | None, header: Mapping[str, Any]) -> None:
        self._path = None if path is None else Path(path)
        self._header: dict[str, Any] = json.loads(json.dumps({"version": VERSION, **header}))

    def read(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The tensors and numbers that were written last; None if there are none.

        Raises:
            RunError: the file is of something else, damaged, or cannot be read.
        """
        if self._path is None or not self._path.exists():
            return None
        try:
            with safe_open(self._path, framework="pt") as file:
                told = json.loads((file.metadata() or {})[_KEY])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            found, numbers = dict(told["header"]), dict(told["numbers"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise RunError(
                f"{self._path} is no record of a training, or a damaged one ({error}); remove it, "
                "or give another file."
            ) from error
        key = first_difference(found, self._header)
        if key is not None:
            raise RunError(
                f"The record {self._path} is of another training ({key}: {found.get(key)!s:.60} "
                f"then, {self._header.get(key)!s:.60} now); remove it, or give another file."
            )
        return tensors, numbers

    def write(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Writes where the training stands in place of what was there.

        Args:
            tensors: by name, wherever they are.
            numbers: what else it takes to go on, ready for JSON.

        Raises:
            RunError: the file cannot be written.
        """
        if self._path is None:
            return
        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        told = json.dumps({"header": self._header, "numbers": dict(numbers)})
        try:
            write_whole(self._path, save(whole, metadata={_KEY: told}))
        except OSError as error:
            raise RunError(f"The record {self._path} cannot be written: {error}.") from error
