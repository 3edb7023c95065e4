"""The one store of what is made row by row: runs, observations, perplexities, speed tests.

A row is on the disk before the next one is begun, so that a killed command goes on where it was.
Several processes write shards, which are merged. Needs no pydantic: what a row must hold is the
business of its type, which may be a pydantic model (`adaskip.runs.rows.Stored`) or a dataclass.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Protocol, Self, TypeVar

from adaskip.errors import RunError
from adaskip.fingerprint import fingerprint_name, same_model
from adaskip.models.processes import team
from adaskip.runs.environment import environment, joined
from adaskip.runs.files import (
    SCHEMA,
    Record,
    differences,
    lock,
    read_json,
    write_bytes,
    write_json,
    writing,
)


class Storable(Protocol):
    """A row: what it holds is checked where it is read."""

    @property
    def id(self) -> str:
        """What tells it from the other rows of its file."""

    @classmethod
    def from_dict(cls, content: Any) -> Self:
        """Reads a row from JSON; raises a `ValueError` that names what is wrong with it."""

    def as_dict(self) -> dict[str, Any]:
        """The row, ready for JSON."""


R = TypeVar("R", bound=Storable)
T = TypeVar("T")


@dataclass(frozen=True)
class Store(Generic[R]):
    """Rows of one kind on the disk, with the settings they were made with.

    Reading and writing are done by the process that calls them; `make` is called by all processes
    of a command together. Hold the folder (`locked`) while writing.

    Attributes:
        path: `x.jsonl`: rows are appended line by line, and their record lies in `x.json`.
            `x.json`: one file holds the record and its rows, few ones, and is replaced whole.
        row_type: the type of its rows.
        settings: what the rows of one file must have in common; None to take them as they are, as
            where one record stands for several files, or where they are only read.
        about: what else a new record says.
        key: where an `x.json` holds its rows.
        hint: what to do where the settings differ.
        lately: settings that records of earlier versions lack; there they are not compared.
    """

    path: Path
    row_type: type[R]
    settings: Mapping[str, Any] | None = None
    about: Mapping[str, Any] | None = None
    key: str = "rows"
    hint: str = "choose another --results_dir, or move the file away"
    lately: Collection[str] = ()

    def record(self) -> Record:
        """What is known of the rows: that on the disk, or a new one.

        Raises:
            RunError: the rows there were made with other settings, or the record is damaged.
        """
        path = self._record_path
        # As JSON has them, to be compared with what is read.
        new = json.loads(json.dumps(self.settings))
        if not path.exists():
            return {"schema": SCHEMA, **(self.about or {}), "settings": new}
        record = read_json(path)
        if self.settings is None:
            return record
        if not isinstance(record.get("settings"), dict):
            raise RunError(f"{path} is damaged (it has no settings); move it away and run again.")
        old = record["settings"]
        told = {k: v for k, v in new.items() if k in old or k not in self.lately}
        if what := differences(old, told):
            raise RunError(f"{path} was made with other settings ({what}); {self.hint}.")
        return record

    def note(self, **facts: Any) -> None:
        """Adds facts to the record and writes it; without any, a new record is begun.

        Raises:
            RunError: as `record`, or it cannot be written.
        """
        write_json(self._record_path, self.record() | facts)

    def note_environment(self, device: str) -> None:
        """Adds where rows are made from now on to where those before were made.

        Args:
            device: what computes them.

        Raises:
            RunError: as `note`.
        """
        before, here = self.record().get("environment"), environment(device)
        self.note(environment=joined([before, here] if before else [here]))

    def hold(
        self, model: str, sources: Mapping[str, str], prompts: Mapping[str, str] | None = None
    ) -> None:
        """Refuses to go on with other weights, or other rows of the same ids, than before.

        Args:
            model: the fingerprint of the model that rows are made with now.
            sources: a digest of what each row is made from, by its name.
            prompts: a digest of the prompt that each becomes, where that can change by itself;
                records of earlier versions lack it.

        Raises:
            RunError: what is there was made with others; or as `note`.
        """
        record, prompts = self.record(), prompts or {}
        before, known = record.get("model_fingerprint", model), record.get("sources", {})
        asked = record.get("prompts", {})
        where = self._record_path
        if not same_model(before, model):
            raise RunError(
                f"{where} was made with model {fingerprint_name(before)}, it is now "
                f"{fingerprint_name(model)}; {self.hint}."
            )
        others = [name for name, digest in sources.items() if known.get(name, digest) != digest]
        if others:
            raise RunError(
                f"{where} was made with another row {others[0]} than the data has now; {self.hint}."
            )
        others = [name for name, digest in prompts.items() if asked.get(name, digest) != digest]
        if others:
            raise RunError(
                f"{where} was made with another prompt of row {others[0]} than it has now (its "
                f"template, the model's, or the longest prompt is another one); {self.hint}."
            )
        held = {"prompts": {**asked, **prompts}} if prompts else {}
        self.note(model_fingerprint=model, sources={**known, **sources}, **held)

    def rows(self) -> list[R]:
        """The complete rows, each once, without the torn last line of a killed process.

        Raises:
            RunError: another line is damaged, or as `record`; the message has its number.
        """
        # The last of an id, as `merge` keeps it.
        return [*{row.id: row for row, _ in self._read()}.values()]

    def unmerged(self) -> list[R]:
        """All rows as they are on the disk, those included that other processes left in shards."""
        return [row for store in (self, *self._shards()) for row, _ in store._read()]

    def missing(self, ids: Sequence[str]) -> list[str]:
        """Those of some ids that have no row yet."""
        done = {row.id for row in self.rows()}
        return [name for name in ids if name not in done]

    def append(self, rows: Sequence[R]) -> None:
        """Adds finished rows and sees them onto the disk; in `x.json`, over those of the same id.

        Raises:
            RunError: they cannot be written; a torn line is repaired when they are continued.
        """
        if self._in_record:
            kept = {row.id: content for row, content in self._read()}
            kept |= {row.id: row.as_dict() for row in rows}
            self._replace(list(kept.values()))
            return
        data = b"".join(_as_line(row.as_dict()) for row in rows)
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())

    def keep(self, ids: Collection[str]) -> None:
        """Leaves the rows of some ids and no others."""
        read = self._read()
        kept = [content for row, content in read if row.id in ids]
        if len(kept) < len(read):
            self._replace(kept)

    def merge(self, order: Sequence[str] = ()) -> list[R]:
        """Brings the rows into the state an uninterrupted single process would have left.

        Cuts off a torn last line, takes in the rows of all shards, and sorts. The file is replaced
        at once, before its shards are deleted: killed in between, the next call finds the rows
        twice and keeps them once.

        Args:
            order: ids of the rows as they should follow each other; others stay behind them.

        Returns:
            The rows now there.

        Raises:
            RunError: a line is damaged, or a file cannot be changed.
        """
        read = self._read(repair=True)
        found = {row.id: (row, content) for row, content in read}
        shards = self._shards()
        for shard in shards:
            for row, content in shard._read():
                found.setdefault(row.id, (row, content))
        place = {name: index for index, name in enumerate(order)}
        wanted = sorted(found, key=lambda name: place.get(name, len(place)))
        if wanted != [row.id for row, _ in read]:
            self._replace([found[name][1] for name in wanted])
        for shard in shards:
            with writing(shard.path):
                shard.path.unlink()
        return [found[name][0] for name in wanted]

    def shard(self, rank: int) -> Store[R]:
        """Where one of several processes writes its rows."""
        return replace(self, path=self.path.with_name(f"{self.path.name}.shard{rank}"))

    def make(
        self, order: Sequence[str], work: Callable[[Share[R]], None], *, same: bool = False
    ) -> list[R]:
        """Has the missing rows made by all processes of this command, each its share.

        Args:
            order: ids of the rows there shall be, in their order.
            work: makes the rows of a share and appends them to it.
            same: all processes make all rows together, and the main process writes them.

        Returns:
            The rows.

        Raises:
            RunError: there are other rows, a line is damaged, or they cannot be written.
            Exception: what `work` raised, on all processes; what was made until then is kept.
        """
        group = team()
        done = group.on_main(lambda: frozenset(row.id for row in self.merge(order)))
        if done - set(order) and set(order) - done:
            raise RunError(
                f"{self.path} holds rows that are not among those asked for now: give the --limit "
                "and the data it was made with, or another --results_dir."
            )
        if set(order) <= done:
            return group.on_main(self.rows)
        if same:
            share = Share(done, self, 0, 1, same=True)
        else:
            target = self if group.world == 1 else self.shard(group.rank)
            share = Share(done, target, group.rank, group.world)
        try:
            with group.together():
                work(share)
        except Exception:
            # What the other processes made until then counts.
            group.on_main(lambda: self.merge(order))
            raise
        made = group.on_main(lambda: self.merge(order))
        if lacking := set(order) - {row.id for row in made}:
            raise RunError(
                f"{self.path} lacks {len(lacking)} of {len(order)} rows that other processes made: "
                "--results_dir must be one folder that all machines share."
            )
        return made

    @property
    def _in_record(self) -> bool:
        return self.path.suffix == ".json"

    @property
    def _record_path(self) -> Path:
        return self.path.with_suffix(".json")

    def _shards(self) -> list[Store[R]]:
        # `.part`: what shards were called by earlier versions.
        names = [f"{self.path.name}.{kind}*" for kind in ("shard", "part")]
        found = sorted(path for name in names for path in self.path.parent.glob(name))
        return [replace(self, path=path) for path in found]

    def _replace(self, contents: Sequence[Record]) -> None:
        if self._in_record:
            write_json(self.path, self.record() | {self.key: contents})
        else:
            write_bytes(self.path, b"".join(map(_as_line, contents)))

    def _read(self, *, repair: bool = False) -> list[tuple[R, Record]]:
        """Each row, and its content as it is on the disk."""
        if self._in_record:
            return [self._checked(*item) for item in enumerate(self._in_file(), start=1)]
        if not self.path.exists():
            return []
        *lines, torn = self.path.read_bytes().split(b"\n")
        found = [self._checked(*item) for item in enumerate(lines, start=1)]
        if repair and torn:
            with writing(self.path):
                os.truncate(self.path, self.path.stat().st_size - len(torn))
        return found

    def _in_file(self) -> list[Any]:
        held = self.record().get(self.key, [])
        if isinstance(held, dict):  # by id, as earlier versions kept them
            return [{"id": name, **content} for name, content in held.items()]
        if not isinstance(held, list):
            raise RunError(f"{self.path} is damaged ({self.key!r} is no list); move it away.")
        return held

    def _checked(self, number: int, line: Any) -> tuple[R, Record]:
        try:
            content = json.loads(line) if isinstance(line, bytes) else line
            return self.row_type.from_dict(content), content
        except ValueError as error:
            what = "row" if self._in_record else "line"
            raise RunError(
                f"{self.path}, {what} {number} is damaged ({error}); delete it and run again."
            ) from error


@dataclass(frozen=True)
class Share(Generic[R]):
    """One process's share in making the rows of a store.

    Attributes:
        done: ids of the rows that are there.
        target: where rows are appended.
        rank: its number among those that make different rows.
        world: how many of them there are.
        same: all processes make the same rows together, and the main one writes them.
    """

    done: frozenset[str]
    target: Store[R]
    rank: int
    world: int
    same: bool = False

    def of(self, items: Sequence[T]) -> Sequence[T]:
        """This process's share of items that are the same on all processes."""
        return items[self.rank :: self.world]

    def append(self, rows: Sequence[R]) -> None:
        """Keeps finished rows; where all processes have the same ones, they call it together.

        Raises:
            RunError: they cannot be written, on the main process if all have the same ones.
        """
        if self.same:
            # Or the others would begin the next forward, and wait in it for a main one that failed.
            team().on_main(lambda: self.target.append(rows))
        else:
            self.target.append(rows)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a folder for the processes of this command.

    Raises:
        RunError: another command holds it, or it cannot be written.
    """
    with contextlib.ExitStack() as stack:
        team().on_main(lambda: stack.enter_context(lock(folder)))
        yield


def _as_line(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, ensure_ascii=False) + "\n").encode()
