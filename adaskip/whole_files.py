"""Files that are written whole or not at all, and may be read by whom new ones may."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file: a neighbour that is on the disk, whole, takes the old one's place.

    Raises:
        OSError: it cannot be written; what was there is as it was.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        # What went wrong is told, not that this could not be removed.
        with suppress(OSError):
            temporary.unlink()


def give_usual_mode(path: Path) -> None:
    """Gives a file or folder the mode of a new one; safetensors and tempfile keep out all others.

    Raises:
        OSError: it cannot be changed.
    """
    # It is told only by setting it.
    umask = os.umask(0o077)
    os.umask(umask)
    usual = (0o777 if path.is_dir() else 0o666) & ~umask
    # A folder may pass on its group.
    path.chmod(path.stat().st_mode & 0o7000 | usual)
