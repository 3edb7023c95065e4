"""A needle's heat map: depth against context length, one map per policy, as figure and table."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from adaskip.reports import sweep_tables
from adaskip.reports.comparison import left_out
from adaskip.reports.figures import as_png, canvas
from adaskip.reports.sweep_tables import as_markdown
from adaskip.runs.files import SCHEMA, Record, write_bytes, write_json, write_text
from adaskip.runs.ledger import RUN_FILE, read_record, run_folder
from adaskip.runs.needle_grid import NeedleGrid
from adaskip.runs.runconfig import DENSE, RunConfig
from adaskip.runs.scoring import score_run
from adaskip.tables import MISSING, markdown_table, number

CAPTION = (
    "Scores (share of the answers found × 100) by depth of the needle and tokens of the context; "
    "the same keys and numbers at every place. In parentheses, and grey in the figure: where the "
    "dense model is no better than guessing; that compares nothing, and no mean counts it."
)
_COLOURS, _GREY = "viridis", "#d9d9d9"
# Below this score a square is so dark that its number is white.
_DARK = 60
# Characters of a line of a map's title.
_TITLE = 22


@dataclass(frozen=True)
class Square:
    """One place of a map.

    Attributes:
        tokens: of the context.
        depth: of the needle, in percent.
        score: x100, None before there are rows of what is asked for.
        rows: how many were scored.
    """

    tokens: int
    depth: int
    score: float | None
    rows: int


@dataclass(frozen=True)
class HeatMap:
    """The map of one policy."""

    policy: str
    squares: tuple[Square, ...]

    def at(self, tokens: int, depth: int) -> Square:
        """The square of a place."""
        return next(s for s in self.squares if (s.tokens, s.depth) == (tokens, depth))


@dataclass(frozen=True)
class NeedleReport:
    """All that is shown.

    Attributes:
        model: its name.
        task: whose needle is moved.
        command: makes it again.
        contexts: in tokens.
        depths: in percent.
        maps: of every policy, dense first.
        chance: places, context and depth, where dense is no better than guessing.
        notes: which rows are left out, and why.
        failures: what stopped the runs that failed, by label.
        recipe: how the rows were made: of each run folder its record.
    """

    model: str
    task: str
    command: str
    contexts: tuple[int, ...]
    depths: tuple[int, ...]
    maps: tuple[HeatMap, ...]
    chance: tuple[tuple[int, int], ...]
    notes: tuple[str, ...]
    failures: dict[str, str]
    recipe: dict[str, Record]

    def mean(self, shown: HeatMap) -> float | None:
        """The mean of a map's scores where dense is better than guessing.

        None without such a place, and while one has no score: means of other places do not compare.
        """
        places = [s for s in shown.squares if (s.tokens, s.depth) not in self.chance]
        known = [square.score for square in places if square.score is not None]
        return statistics.fmean(known) if known and len(known) == len(places) else None


def write_report(grid: NeedleGrid, command: str, failures: Mapping[str, str]) -> str:
    """Scores what is there and writes `<model>-<task>.json`, `.md` and `.png`; returns the text.

    Args:
        grid: what is compared where.
        command: makes it again.
        failures: what stopped the runs that failed, by label.

    Raises:
        RunError: a file is damaged or cannot be written.
    """
    report = collect(grid, command, failures)
    path = grid.folder / f"{report.model}-{report.task}"
    text = text_of(report)
    write_json(path.with_name(f"{path.name}.json"), {"schema": SCHEMA, **asdict(report)})
    write_text(path.with_name(f"{path.name}.md"), f"{text}\n\n![{CAPTION}]({path.name}.png)\n")
    write_bytes(path.with_name(f"{path.name}.png"), draw(report))
    return f"{text}\n\nWritten: {path}.md, .json and .png."


def collect(grid: NeedleGrid, command: str, failures: Mapping[str, str]) -> NeedleReport:
    """Scores every run of a grid that has rows, made as the grid asks.

    Raises:
        RunError: a file is damaged or cannot be written.
    """
    recipe: dict[str, Record] = {}
    chance: list[tuple[int, int]] = []
    notes: list[str] = []
    maps = []
    for policy in grid.policies:
        squares = []
        for place in grid.squares():
            cell = grid.cell(policy, *place)
            folder = run_folder(cell.config)
            limits = {grid.task: cell.config.limit}
            run = score_run(folder, limits=limits) if (folder / RUN_FILE).is_file() else None
            # Tasks share the folder.
            score = None if run is None else run.tasks.get(grid.task)
            note = left_out(cell) if score is not None else ""
            if run is None or score is None or note:
                notes += filter(None, [note])
                squares.append(Square(*place, None, 0))
                continue
            run.save()
            record = read_record(folder).as_dict()
            recipe[folder.name] = {k: v for k, v in record.items() if k != "schema"}
            squares.append(Square(*place, score.score if score.n_rows else None, score.n_rows))
            if policy.policy == DENSE and score.at_chance:
                chance.append(place)
        maps.append(HeatMap(_label(policy), tuple(squares)))
    return NeedleReport(
        grid.model,
        grid.task,
        command,
        grid.contexts,
        grid.depths,
        tuple(maps),
        tuple(chance),
        tuple(notes),
        dict(failures),
        recipe,
    )


def text_of(report: NeedleReport) -> str:
    """The maps as one table, and the recipe."""
    header = ["policy", "depth %", *(f"{tokens} tokens" for tokens in report.contexts)]
    lines = []
    for shown in report.maps:
        for depth in report.depths:
            scores = [_cell(report, shown, tokens, depth) for tokens in report.contexts]
            lines.append([shown.policy, str(depth), *scores])
    means = [[shown.policy, number(report.mean(shown))] for shown in report.maps]
    rows = sorted({s.rows for shown in report.maps for s in shown.squares})
    parts = [
        f"# {report.task}: {report.model}",
        CAPTION,
        markdown_table(header, lines),
        markdown_table(["policy", "mean"], means),
        f"Rows per place: {', '.join(map(str, rows))}. Made by `{report.command}`.",
    ]
    if report.notes:
        parts.append("\n".join(f"- {note}" for note in report.notes))
    if report.failures:
        failed = report.failures.items()
        parts.append("\n".join(f"- FAILED: {label}: {error}" for label, error in failed))
    parts += [as_markdown(sweep_tables.settings(report.recipe))]
    parts += [as_markdown(sweep_tables.machines(report.recipe))]
    return "\n\n".join(parts)


def draw(report: NeedleReport) -> bytes:
    """The maps side by side, as PNG."""
    n_maps, n_contexts = len(report.maps), len(report.contexts)
    width = 1.9 + n_maps * max(1.9, 0.62 * n_contexts + 0.3)
    lines = max(len(textwrap.wrap(shown.policy, _TITLE)) for shown in report.maps)
    height = 1.7 + 0.42 * len(report.depths) + 0.2 * lines
    figure, panels = canvas(1, n_maps, width=width, height=height, sharey=True)
    image = None
    for shown, panel in zip(report.maps, panels[0], strict=True):
        image = _draw_map(panel, report, shown)
    panels[0][0].set_ylabel("depth of the needle (%)")
    figure.colorbar(image, ax=list(panels[0]), label="answers found (%)", pad=0.02)
    figure.suptitle(f"{report.task}, {report.model}", fontsize=11)
    if report.chance:
        figure.supxlabel("grey: dense is no better than guessing", fontsize=8, color="#555555")
    return as_png(figure)


def _draw_map(panel: Any, report: NeedleReport, shown: HeatMap) -> Any:
    found = [[shown.at(t, d).score for t in report.contexts] for d in report.depths]
    values = [[float("nan") if score is None else score for score in row] for row in found]
    image = panel.imshow(values, cmap=_COLOURS, vmin=0, vmax=100, aspect="auto")
    for row, depth in enumerate(report.depths):
        for column, tokens in enumerate(report.contexts):
            score = found[row][column]
            grey = (tokens, depth) in report.chance
            if grey:
                panel.axhspan(
                    row - 0.5,
                    row + 0.5,
                    column / len(report.contexts),
                    (column + 1) / len(report.contexts),
                    color=_GREY,
                )
            colour = "#555555" if grey or score is None else _ink(score)
            text = MISSING if score is None else f"{score:.0f}"
            panel.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)
    panel.set_xticks(range(len(report.contexts)), [f"{t:,}" for t in report.contexts], fontsize=8)
    panel.set_yticks(range(len(report.depths)), map(str, report.depths))
    panel.set_xticks([place - 0.5 for place in range(1, len(report.contexts))], minor=True)
    panel.set_yticks([place - 0.5 for place in range(1, len(report.depths))], minor=True)
    panel.grid(which="minor", color="white", linewidth=1.2)
    panel.tick_params(which="minor", length=0)
    panel.set_xlabel("tokens of the context", fontsize=8)
    mean = report.mean(shown)
    title = textwrap.wrap(shown.policy, _TITLE) + ([] if mean is None else [f"mean {mean:.0f}"])
    panel.set_title("\n".join(title), fontsize=10)
    return image


def _ink(score: float) -> str:
    return "white" if score < _DARK else "black"


def _cell(report: NeedleReport, shown: HeatMap, tokens: int, depth: int) -> str:
    text = number(shown.at(tokens, depth).score)
    return f"({text})" if (tokens, depth) in report.chance else text


def _label(policy: RunConfig) -> str:
    return policy.label if policy.budget == 0 else f"{policy.label} ({policy.budget})"
