"""Loads LongBench's rows: from the hub copy, from local jsonl files, or from the original zip."""

from __future__ import annotations

import json
import logging
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from adaskip.configuration import read_config
from adaskip.errors import AdaskipError, DataError
from adaskip.tasks.optional import optional_module
from adaskip.tasks.spec import Row, TaskSpec, task_spec

logger = logging.getLogger(__name__)

Source = Literal["auto", "hub", "local"]

# Folders of `data_dir` in which LongBench's files are looked for, the nearest first.
FOLDERS = (".", "data", "LongBench", "LongBench/data", "longbench", "longbench/data")
ARCHIVE = "data.zip"
# One alone cannot be written in UTF-8, and no tokenizer takes it.
_SURROGATE = re.compile("[\ud800-\udfff]")
HELP = "data/README.md says how to place LongBench"

# A raw row with the place it came from, for messages: "data/trec.jsonl line 3".
Raw = tuple[str, Mapping[str, Any]]


def _file_stems(spec: TaskSpec, long_bench_e: bool) -> tuple[str, ...]:
    """File stems that hold rows of a task, LongBench-E's before the plain one."""
    return (f"{spec.name}_e", spec.name) if long_bench_e and spec.long_bench_e else (spec.name,)


def _parse_lines(lines: Iterable[bytes], name: str) -> Iterator[Raw]:
    """The JSON objects of a jsonl file.

    Raises:
        DataError: a line is not a complete JSON object in UTF-8; says the file and the line.
    """
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{name} line {number}"
        try:
            raw = json.loads(line.decode("utf-8"))
        except (UnicodeDecodeError, ValueError, RecursionError) as error:
            raise DataError(
                f"{place} is not JSON ({error}); the file is damaged or cut off: get it again"
                f" ({HELP})."
            ) from error
        if not isinstance(raw, dict):
            raise DataError(f"{place} is a JSON {type(raw).__name__}, not an object ({HELP}).")
        yield place, raw


def _read_archive(path: Path, stem: str) -> list[Raw] | None:
    """The rows of `<stem>.jsonl` in a zip archive, wherever it lies inside; None if it has none."""
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if PurePosixPath(name).name == f"{stem}.jsonl":
                    with archive.open(name) as lines:
                        return list(_parse_lines(lines, f"{path}:{name}"))
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError) as error:
        raise DataError(f"{path} is not a readable zip file ({error}); get it again.") from error
    return None


def _read_local(stem: str, data_dir: Path) -> list[Raw] | None:
    """The rows of `<stem>.jsonl` beneath `data_dir`, or of its archive; None if there are none."""
    for path in _named(f"{stem}.jsonl", data_dir):
        try:
            with path.open("rb") as lines:
                return list(_parse_lines(lines, str(path)))
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error}.") from error
    for path in _named(ARCHIVE, data_dir):
        if (rows := _read_archive(path, stem)) is not None:
            return rows
    return None


def _named(name: str, data_dir: Path) -> Iterator[Path]:
    """The files of a name in the folders where they are looked for, the nearest first."""
    paths = (data_dir / folder / name for folder in FOLDERS)
    return (path for path in paths if path.is_file())


def has_files(task: str, data_dir: str | Path, *, long_bench_e: bool = True) -> bool:
    """Whether there are files in which rows of a task are looked for; none is read."""
    stems = _file_stems(task_spec(task), long_bench_e)
    names = [*(f"{stem}.jsonl" for stem in stems), ARCHIVE]
    return any(path for name in names for path in _named(name, Path(data_dir)))


def _load_local(spec: TaskSpec, data_dir: Path, long_bench_e: bool) -> list[Raw] | None:
    """Rows from `data_dir`, LongBench-E's if they are there; None if the task has no file there."""
    stems = _file_stems(spec, long_bench_e)
    for stem in stems:
        rows = _read_local(stem, data_dir)
        if rows is not None:
            if stem != stems[0]:
                logger.warning(
                    "%s has no %s.jsonl: using the rows of %s.jsonl, which are not LongBench-E's.",
                    data_dir,
                    stems[0],
                    stem,
                )
            return rows
    return None


def _load_hub(spec: TaskSpec, long_bench_e: bool) -> list[Raw]:
    """Rows of the hub copy, through `datasets`.

    Raises:
        DataError: `datasets` cannot load it, whatever the reason (mostly: no network).
    """
    name = str(read_config("tasks.yaml")["hub"])
    config = _file_stems(spec, long_bench_e)[0]
    datasets = optional_module("datasets", "datasets")
    try:
        rows = list(datasets.load_dataset(name, config, split="test"))
    except Exception as error:  # the library lets network, cache and parsing errors through
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{config!r} of {name} could not be loaded from the hub ({reason.rstrip('.')}); go"
            f" online, or place the files locally ({HELP})."
        ) from error
    return [(f"{name}/{config} row {number}", raw) for number, raw in enumerate(rows, start=1)]


def _field(raw: Mapping[str, Any], names: tuple[str, ...], kind: type, place: str) -> Any:
    """The first of `names` that the row has; it must be of type `kind`."""
    name = next((name for name in names if name in raw), None)
    if name is None:
        raise DataError(f"{place} has no field {' or '.join(map(repr, names))} ({HELP}).")
    value = raw[name]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise DataError(
            f"{place}: field {name!r} is a {type(value).__name__}, expected {kind.__name__}."
        )
    for text in value if isinstance(value, list) else [value]:
        if isinstance(text, str) and _SURROGATE.search(text):
            raise DataError(
                f"{place}: field {name!r} has half of a character pair, which is no text; get the "
                f"file again ({HELP})."
            )
    return value


def _texts(raw: Mapping[str, Any], name: str, place: str) -> tuple[str, ...]:
    """A field that is a list of at least one text."""
    values = _field(raw, (name,), list, place)
    if not values or not all(isinstance(value, str) for value in values):
        raise DataError(f"{place}: field {name!r} must be a list of at least one text.")
    return tuple(values)


def _to_rows(raws: Iterable[Raw], spec: TaskSpec) -> Iterator[Row]:
    """Rows in the common format; the hub copy calls the original's `input` `question`.

    Ids are unique, so that runs can be resumed: a repeated one gets `#2`, `#3`, ...
    """
    seen: Counter[str] = Counter()
    for number, (place, raw) in enumerate(raws):
        name = str(raw.get("_id") or f"{spec.name}-{number}")
        seen[name] += 1
        has_classes = spec.metric == "classification" or bool(raw.get("all_classes"))
        yield Row(
            id=name if seen[name] == 1 else f"{name}#{seen[name]}",
            task=spec.name,
            input=_field(raw, ("input", "question"), str, place),
            context=_field(raw, ("context",), str, place),
            answers=_texts(raw, "answers", place),
            length=_field(raw, ("length",), int, place),
            language=str(raw.get("language") or spec.language),
            all_classes=_texts(raw, "all_classes", place) if has_classes else None,
        )


def _find_rows(spec: TaskSpec, data_dir: Path, source: Source, long_bench_e: bool) -> list[Raw]:
    """Raw rows of a task from where `source` says; `"auto"` is local files, else the hub copy."""
    rows = None if source == "hub" else _load_local(spec, data_dir, long_bench_e)
    if rows is not None:
        return rows
    stems = " or ".join(f"{stem}.jsonl" for stem in _file_stems(spec, long_bench_e))
    missing = (
        f"No {stems} in {data_dir}, its folders {', '.join(FOLDERS[1:])}, or a {ARCHIVE} there"
    )
    if source == "local":
        raise DataError(f"{missing}; {HELP}.")
    try:
        return _load_hub(spec, long_bench_e)
    except DataError as error:
        raise error if source == "hub" else DataError(f"{missing}; and {error}") from error


def load_rows(
    task: str,
    *,
    data_dir: str | Path = "data",
    min_length: int = 4000,
    limit: int | None = None,
    source: Source = "auto",
    long_bench_e: bool = True,
) -> list[Row]:
    """The rows of a LongBench task that are longer than `min_length`, in their original order.

    Args:
        task: a LongBench task, e.g. `"gov_report"`.
        data_dir: where local files are looked for (`data/README.md`).
        min_length: only rows with `length > min_length` words (METHOD: 4000); -1 keeps all.
        limit: at most this many rows, counted after the filter; None for all.
        source: `"local"` files, the `"hub"` copy, or `"auto"`: local if there, else the hub.
        long_bench_e: prefer LongBench-E's rows where the task has them.

    Raises:
        AdaskipError: unknown or offline task, unknown source, `limit` below 1.
        DataError: no file, a damaged one (with its line), or no rows left after the filter.
    """
    spec = task_spec(task)
    if spec.offline:
        raise AdaskipError(f"{task} is not a LongBench task; build it with adaskip.sample_rows.")
    if source not in ("auto", "hub", "local"):
        raise AdaskipError(f"Unknown source {source!r}; choose auto, hub or local.")
    if limit is not None and limit < 1:
        raise AdaskipError(f"The limit must be at least 1 row, not {limit}.")
    raws = _find_rows(spec, Path(data_dir), source, long_bench_e)
    kept = list(islice((r for r in _to_rows(raws, spec) if r.length > min_length), limit))
    if not kept:
        raise DataError(
            f"{task} has {len(raws)} rows, and none longer than {min_length} words; use other data"
            " or a smaller min_length."
        )
    return kept
