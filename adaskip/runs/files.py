"""Files that survive a kill or a full disk, and the lock of a folder.

Needs neither models nor pydantic, so that a speed test may import it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import re
from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

from adaskip.errors import RunError
from adaskip.whole_files import write_whole

logger = logging.getLogger(__name__)

SCHEMA = 1
_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,120}")
Record = dict[str, Any]


def check_file_name(what: str, name: str) -> str:
    """Returns `name` if it can only be a file directly in its folder.

    Raises:
        RunError: it has a path separator, begins with a dot, or holds other odd characters.
    """
    if not _SAFE_NAME.fullmatch(name):
        raise RunError(
            f"The {what} {name!r} cannot name a file: use letters, digits, '-', '_', '+' and '.', "
            "beginning with a letter or digit."
        )
    return name


@contextlib.contextmanager
def writing(what: Path) -> Iterator[None]:
    """Turns the file system's refusals into one sentence.

    Raises:
        RunError: the disk is full, the folder is read-only, or the path is no folder.
    """
    hints = {
        errno.ENOSPC: "the disk is full; free some space",
        errno.EDQUOT: "the disk quota is used up; free some space",
        errno.EFBIG: "the file may not grow further; raise the file size limit",
        errno.EROFS: "the file system is read-only; choose another place",
        errno.EACCES: "permission denied; choose another place",
        errno.EPERM: "permission denied; choose another place",
    }
    try:
        yield
    except OSError as error:
        hint = hints.get(error.errno or 0, f"{error.strerror or error}; choose another place")
        raise RunError(
            f"Cannot write {what}: {hint} and run the command again. What is finished is kept."
        ) from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file at once or not at all.

    Raises:
        RunError: it cannot be written.
    """
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a text file at once or not at all.

    Raises:
        RunError: it cannot be written.
    """
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file at once or not at all.

    Raises:
        RunError: it cannot be written.
    """
    with writing(path):
        write_whole(path, data)


def put_aside(path: Path) -> None:
    """Moves a record out of the way of one that is measured anew, over no other one.

    Raises:
        RunError: it cannot be moved.
    """
    names = (f".{number}.old.json" if number else ".old.json" for number in count())
    aside = next(other for other in map(path.with_suffix, names) if not other.exists())
    with writing(aside):
        path.replace(aside)
    logger.info("Measuring anew; the record that was there is now %s", aside)


def read_json(path: Path) -> Record:
    """Reads a record this package wrote.

    Raises:
        RunError: it is damaged, or of another schema.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({error}); move its folder away.") from error
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != SCHEMA:
        raise RunError(
            f"{path} has record schema {schema!r}; this version reads {SCHEMA}. Use the adaskip "
            "version that wrote it, or move it away."
        )
    return dict(content)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """What differs between two mappings of settings, as a part of a sentence; empty if nothing."""
    changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return ", ".join(f"{key}: {old.get(key)!r} then, {new.get(key)!r} now" for key in changed)


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Holds a run's folder for this process; the lock of a killed process is free again.

    Raises:
        RunError: another process holds it, or the folder cannot be written.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RunError(
                f"Another process is working on {folder}; wait for it, or choose another "
                "--results_dir."
            ) from error
        yield
