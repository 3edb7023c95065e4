"""Figures of other commands, made small enough to lie within one page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from adaskip.errors import RunError

FOLDERS = ("observations", "speed")
MAX_WIDTH = 1400
COLOURS = 64


@dataclass(frozen=True)
class Picture:
    """A PNG file and what to write beneath it."""

    path: Path
    caption: str

    def data_uri(self) -> str:
        """The picture itself as an address, at most `MAX_WIDTH` pixels wide, in few colours.

        Raises:
            RunError: the file is damaged.
        """
        from PIL import Image

        try:
            with Image.open(self.path) as image:
                small = image.convert("RGB")
                small.thumbnail((MAX_WIDTH, 10 * MAX_WIDTH))
        except OSError as error:
            raise RunError(f"The figure {self.path} cannot be read: {error}.") from error
        buffer = io.BytesIO()
        small.quantize(COLOURS).save(buffer, format="png", optimize=True)
        return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def found_pictures(results: Path, models: Sequence[str]) -> list[Picture]:
    """The observation and speed figures of these models below a results folder, in order of name.

    Args:
        results: the folder with `observations/` and `speed/`.
        models: short names; a figure belongs to those in its file name.
    """
    return [
        Picture(path, _caption(path))
        for folder in FOLDERS
        for path in sorted((results / folder).glob("*.png"))
        if any(model in path.stem for model in models)
    ]


def _caption(path: Path) -> str:
    """The heading of the text beside a figure, or else its name."""
    text = path.with_suffix(".md")
    if text.is_file():
        for line in text.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("#"):
                return line.lstrip("# ").strip()
    return path.stem.replace("-", " ").replace("_", " ")
