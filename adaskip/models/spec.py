"""What is known about a model before it is loaded: its row in `configs/`, where its files are."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from adaskip.configuration import read_config
from adaskip.errors import AdaskipError, unknown_name
from adaskip.models.packaged import Package, packaged_folder

# Positions that the longest prompt of a model of no row leaves for template and answer, at most.
_ANSWER_ROOM = 692
_WEIGHTS = (".safetensors", ".bin")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class ModelSpec:
    """What a run must know about a model besides its weights; a row of `configs/models.yaml`.

    Attributes:
        name: as given by the user.
        hub_id: where the weights come from; None for a model that comes from packages.
        prompt_limit: longest prompt in tokens; longer ones lose their middle.
        template: the chat prompt, `{prompt}` standing for the text; None if it is not wrapped.
        answer_end: text at which an answer is cut, None if nowhere.
        shape: the checkpoint's own configuration, empty if only the checkpoint knows.
        package: the packages that carry the weights, None for a model of a hub or folder.
    """

    name: str
    hub_id: str | None
    prompt_limit: int
    template: str | None = None
    answer_end: str | None = None
    shape: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    package: Package | None = field(default=None, repr=False, compare=False)

    def wrap(self, prompt: str) -> str:
        """The prompt within the chat template, or as it is."""
        return self.template.replace("{prompt}", prompt) if self.template else prompt


def model_names() -> tuple[str, ...]:
    """The short names, in the order of `configs/models.yaml`."""
    return tuple(read_config("models.yaml"))


def model_spec(name_or_path: str | Path) -> ModelSpec:
    """The row of a short name, or a row without template for a folder or hub id.

    Raises:
        AdaskipError: there is no such name, folder or hub model.
    """
    name = str(name_or_path)
    rows = read_config("models.yaml")
    if name in rows:
        return _known(name, rows[name])
    config = read_model_config(model_source(name))
    limit = config.get("max_position_embeddings")
    if not limit:
        raise AdaskipError(f"The configuration of {name!r} gives no max_position_embeddings.")
    limit = int(limit)
    room = min(limit // 8, _ANSWER_ROOM)
    return ModelSpec(name=name, hub_id=name, prompt_limit=limit - room)


def refuse_namesakes(models: Iterable[str]) -> None:
    """Refuses different models that end in the same name, by which files and figures call them.

    Raises:
        AdaskipError: the first two of them.
    """
    found: dict[str, str] = {}
    for model in models:
        before = found.setdefault(Path(model).name, model)
        if before != model:
            raise AdaskipError(
                f"The models {before!r} and {model!r} end in the same name, by which their files "
                "are called: give them to two commands with a --results_dir each, or rename one."
            )


def _known(name: str, row: Mapping[str, Any]) -> ModelSpec:
    package = Package(**row["package"]) if "package" in row else None
    return ModelSpec(name=name, **{**row, "package": package})


def model_source(name: str) -> str:
    """Where a model's files are: a folder or a hub id."""
    rows = read_config("models.yaml")
    if name in rows:
        spec = _known(name, rows[name])
        if spec.package is not None:
            return str(packaged_folder(name, spec.package, spec.shape))
        return str(spec.hub_id)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return str(folder)
    if folder.exists():
        raise AdaskipError(f"{name!r} is a file: give the folder that holds config.json.")
    if "/" not in name and "\\" not in name:
        raise unknown_name("model", name, rows)
    if not HUB_ID.fullmatch(name) or name.startswith((".", "~")):
        raise AdaskipError(
            f"There is no folder {name!r}: give an existing folder, a hub id (owner/name) or one "
            f"of: {', '.join(rows)}."
        )
    return name


def weights_stamp(name: str) -> str:
    """Tells, without reading them, whether the weights in a model's folder were written anew.

    A hash of the names, sizes and times of their files; empty of what is no folder of the user's.
    """
    folder = Path(name).expanduser()
    if name in model_names() or not folder.is_dir():
        return ""
    files = sorted(path for path in folder.iterdir() if path.suffix in _WEIGHTS)
    facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:12]


def read_model_config(source: str) -> dict[str, Any]:
    """What a model's `config.json` holds."""
    try:
        raw, _ = PretrainedConfig.get_config_dict(source)
    except (OSError, ValueError) as error:
        if Path(source).is_dir():
            raise AdaskipError(f"Cannot read {source}/config.json: {first_line(error)}") from error
        raise AdaskipError(
            f"There is no folder {source!r}, and the Hugging Face hub cannot be read: "
            f"{first_line(error)} Without the hub, download the model elsewhere and give its "
            "folder (--model_path FOLDER)."
        ) from error
    if "model_type" not in raw:
        raise AdaskipError(f"No model: {source} has no config.json that names a model_type.")
    return dict(raw)


def first_line(error: Exception) -> str:
    """The first line of a message, ended by a full stop."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(". ") + "."
