"""The tables of a leaderboard as text."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from adaskip.leaderboard.axes import Axis, same_axes
from adaskip.leaderboard.comparing import at_speed
from adaskip.leaderboard.draws import Draws
from adaskip.leaderboard.values import (
    BASE,
    MIN_ROUNDS,
    Beside,
    Interval,
    Report,
    Score,
    Table,
    TaskFacts,
    is_rival,
)
from adaskip.tables import MISSING, markdown_table, number

# The header of a table, and its rows.
Shown = tuple[list[str], list[list[str]]]
# What methods are called where there is room.
NAMES = {BASE: "AdaSkip"}


def introduction(report: Report) -> str:
    """What the numbers are."""
    return (
        f"Gap: what a plan loses to the dense model, in nats per token of the references of "
        f"{report.task} (the first {report.reference_tokens} tokens of each). Intervals are those "
        "of 95 %: a paired bootstrap over test rows for gaps and scores, the median's over rounds "
        "for times (of fewer than 6 rounds the lowest and the highest), in each of which dense and "
        "the plans of a sitting take turns; at equal time a bootstrap over rows and rounds "
        "together. Better and worse are said only where the interval of a difference excludes "
        f"zero, and not of plans with fewer than {MIN_ROUNDS} rounds of times. Collapsed: rows "
        "that lose more than one nat per token. Calibration rows come from other documents than "
        "test rows."
    )


def as_text(report: Report) -> str:
    """The whole report as markdown, the figures excepted."""
    parts = ["# Leaderboard", introduction(report)]
    for table in report.tables:
        parts += [f"## {table.model}, {table.context:,} tokens", dense_sentence(table)]
        parts += [markdown_table(*_main(table)), equal_time_title(table)]
        parts += [markdown_table(*equal_time(table)), *filter(None, [search_sentence(table)])]
        if table.tasks:
            parts += [task_sentence(table), markdown_table(*_scores(table))]
        if table.calibrations:
            parts += [CALIBRATIONS, markdown_table(*calibrations(table))]
        if table.missing:
            parts.append("\n".join(f"- {name}: {why}" for name, why in table.missing.items()))
    for context, own in same_axes(report).items():
        parts += [
            f"## Models on the same axes, {context:,} tokens",
            AXES,
            markdown_table(*axes(own)),
        ]
    return "\n\n".join(parts)


CALIBRATIONS = "The same point from other calibration rows:"
AXES = (
    "Absolute values: seconds to the first token, of each model in a sitting of its own, though a "
    "machine's speed differs from day to day; nats per character of the references that all models "
    "have, because two models do not have the same tokens. A context, and what counts of a "
    "reference, is so many tokens of the model's own: the texts are of different lengths."
)


def dense_sentence(table: Table) -> str:
    """What the dense model does, where, and what plans were made from."""
    text = f"Dense perplexity {table.perplexity:.2f} over {len(table.references)} rows"
    if table.seconds is None or table.per_token is None:
        text += ". Times: predicted ones, none were measured yet."
    else:
        text += f"; {table.seconds:.3f} s to the first token, {1e3 * table.per_token:.1f} ms per "
        ends = sorted({min(table.rounds), max(table.rounds)})
        text += f"token ({table.hardware}; {' to '.join(map(str, ends))} rounds"
        if len(table.rounds) > 1:
            text += f" in each of {len(table.rounds)} sittings, these times in that of most plans"
        text += ")."
    used = dict.fromkeys(entry.calibration for entry in table.entries)
    return f"{text} Calibration: {'; '.join(used)}." if used else text


def equal_time_title(table: Table) -> str:
    """What stands above the gaps at equal time."""
    return f"At equal {kind_of(table)} time: gap, its share of {NAMES[BASE]}'s, and what that shows"


def kind_of(table: Table) -> str:
    """Of times: predicted ones until some were measured."""
    return "measured" if table.rounds else "predicted"


def _speed_header(table: Table) -> str:
    return "x TTFT" if table.rounds else "predicted x TTFT"


def search_sentence(table: Table) -> str:
    """Whether another method is better than the searched plan; empty without one."""
    search = table.search
    others = [e for e in table.entries if is_rival(e.method)]
    # Those beyond its fastest plan are beside nothing.
    rivals = [e for e in others if search in e.beside]
    if search is None or not rivals:
        return ""
    better = [f"{e.method} {e.asked:g}" for e in rivals if e.beside[search].verdict == "better"]
    worse = sum(e.beside[search].verdict == "worse" for e in rivals)
    told = ", ".join(better) or "none"
    return (
        f"Of {len(others)} plans of other methods {len(rivals)} are no faster than the fastest of "
        f"{search}. At their {kind_of(table)} times it loses less than {worse} of these, beyond "
        f"the interval of rows and rounds, and more than: {told}."
    )


def task_sentence(table: Table) -> str:
    """What the dense model scores, and which tasks therefore say nothing."""
    return "Tasks: " + "; ".join(f"{name}: {told(facts)}" for name, facts in table.tasks.items())


def told(facts: TaskFacts) -> str:
    """What is said of a task."""
    text = f"dense {facts.dense.score:.1f} {bracketed(facts.dense.interval, 1)} over {facts.n_rows}"
    text += " rows" if facts.chance is None else f" rows, chance {facts.chance:g}"
    return text + (" (at chance: its scores say nothing)" if facts.at_chance else "")


def bracketed(interval: Interval | None, digits: int = 3) -> str:
    """An interval: `[0.123, 0.456]`."""
    if interval is None:
        return f"[{MISSING}]"
    return "[" + ", ".join(f"{value:.{digits}f}" for value in interval) + "]"


def percent_of(share: float | None, interval: Interval | None) -> str:
    """A share with its interval: `29% [19%–40%]`."""
    if share is None:
        return MISSING
    return f"{share:.0%}" + ("" if interval is None else " [{:.0%}–{:.0%}]".format(*interval))


def compared(found: Beside) -> str:
    """What is said of a plan beside another method at the same measured time."""
    return "too few rounds of times" if found.few else found.verdict or "no difference shown"


def difference(score: Score, facts: TaskFacts) -> str:
    """How a score differs from the dense model's, and what that shows."""
    return f"{_delta(score)} {'at chance' if facts.at_chance else score.verdict}".rstrip()


def _main(table: Table) -> Shown:
    header = ["method", "asked", "predicted", "x TTFT", "x per token", "KV", "gap", "interval"]
    rows = [
        [
            entry.method,
            number(entry.asked),
            number(entry.predicted, 3),
            MISSING if entry.ttft is None else entry.ttft.text(3),
            MISSING if entry.per_token is None else entry.per_token.text(3),
            number(entry.kv_share),
            number(entry.gap, 3, signed=True),
            bracketed(entry.interval),
            f"{entry.collapsed}/{len(entry.by_row)}",
            "yes" if entry.front else "",
        ]
        for entry in table.entries
    ]
    return [*header, "collapsed", "front"], rows


def equal_time(table: Table) -> Shown:
    """Each method at the accelerations asked for and README's, as measured, beside AdaSkip."""
    speeds = sorted({table.headline, *(entry.asked for entry in table.entries)})
    draws = Draws(table.entries)
    rows = [[m, *(_at(draws, m, speed) for speed in speeds)] for m in table.methods]
    return ["method", *(f"x {speed:g}" for speed in speeds)], rows


def _at(draws: Draws, method: str, speed: float) -> str:
    own = at_speed(draws.plans, method, speed)
    if own is None:
        return MISSING
    found = None if method == BASE else draws.at_equal_speed(method, BASE, speed)
    parts = [f"{fmean(own.values()):.3f}"]
    if found is not None:
        parts += [percent_of(found.share, found.share_interval), found.verdict]
    return ", ".join(filter(None, parts))


def _scores(table: Table) -> Shown:
    rows = [
        [entry.method, number(entry.asked), number(entry.speed, 3)]
        + [_score(entry.scores.get(task), facts) for task, facts in table.tasks.items()]
        for entry in table.entries
        if entry.scores
    ]
    return ["method", "asked", _speed_header(table), *table.tasks], rows


def _score(score: Score | None, facts: TaskFacts) -> str:
    if score is None:
        return MISSING
    text = f"{score.score:.1f}, {_delta(score)}"
    return f"({text})" if facts.at_chance else " ".join(filter(None, [text, score.verdict]))


def _delta(score: Score) -> str:
    return f"{number(score.delta, 1, signed=True)} {bracketed(score.interval, 1)}"


def calibrations(table: Table) -> Shown:
    """One point beside the same from other calibration rows."""
    rows = [
        [
            e.calibration,
            f"{e.method} {e.asked:g}",
            number(e.speed, 3),
            number(e.gap, 3, signed=True),
            bracketed(e.interval),
            percent_of(e.beside[BASE].share, e.beside[BASE].share_interval)
            if BASE in e.beside
            else MISSING,
        ]
        for e in table.calibrations
    ]
    header = ["calibration", "plan", _speed_header(table), "gap", "interval"]
    return [*header, f"of {NAMES[BASE]}'s gap"], rows


def axes(of: Sequence[Axis]) -> Shown:
    """Models on the same axes."""
    header = ["model", "plan", "s to first token", "nats per character", "prompt characters"]
    rows = [
        [a.model, a.plan, number(a.seconds, 3), number(a.nats, 4), number(a.prompt, 0)] for a in of
    ]
    return header, rows
