"""Finds and reads a YAML file that a user writes, checked by a pydantic model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from adaskip.configuration import config_names, config_path, read_config
from adaskip.errors import AdaskipError, first_problem, unknown_name

M = TypeVar("M", bound=BaseModel)


def shipped_or_given(given: str, what: str, key: str) -> Path:
    """The path of a user's file, or of one that is shipped and known by its name.

    Args:
        given: a path, or a name with or without `.yaml`.
        what: it is, in an error.
        key: that shipped files of its kind have, and no others.

    Raises:
        AdaskipError: it is a name, and of none.
    """
    path = Path(given)
    if path.exists() or str(path.parent) not in (".", "configs"):
        return path
    # Also configs/demo.yaml, where there is no such folder.
    shipped = [name for name in config_names() if key in read_config(f"{name}.yaml")]
    if path.stem not in shipped:
        raise unknown_name(what, given, shipped)
    return config_path(f"{path.stem}.yaml")


def read_yaml(path: Path, kind: type[M]) -> M:
    """What the file says.

    Raises:
        AdaskipError: it is missing, no YAML, or says something else than it may.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses a key that is there twice, of which YAML would take the last."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            pairs = node.value if isinstance(node, yaml.MappingNode) else []
            # What is merged in (`<<`) may be there already: it gives way.
            own = [key for key, _ in pairs if key.tag != "tag:yaml.org,2002:merge"]
            names = [self.construct_object(key, deep=True) for key in own]
            for name in names:
                if names.count(name) > 1:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {name!r} is there twice", node.start_mark
                    )
            return dict(super().construct_mapping(node, deep))

    keys = [*kind.model_fields]
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader)  # noqa: S506 - a safe one
    except (OSError, UnicodeDecodeError) as error:
        raise AdaskipError(f"The file {path} cannot be read: {error}.") from error
    except yaml.YAMLError as error:
        raise AdaskipError(f"{path} is not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict):
        raise AdaskipError(f"{path} must be a mapping with the keys {', '.join(keys)}.")
    for key in content:
        if key not in keys:
            raise AdaskipError(f"{path}: {unknown_name('key', str(key), keys)}")
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise AdaskipError(f"{path}: {first_problem(error)}.") from error
