"""What the paper's three observations show of recorded similarities: one `View` each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adaskip.configuration import read_config
from adaskip.observing.numbers import (
    Numbers,
    as_text,
    between_tasks,
    columns,
    kinds_summary,
    layers_summary,
    means,
    phases_summary,
)
from adaskip.observing.similarities import Moments, Similarities
from adaskip.plan import KINDS, Phase
from adaskip.recorders import Span
from adaskip.reports.observation_figures import Curve, Panel

NAMES: Mapping[Span, str] = {"attn": "attention", "ffn": "FFN", "layer": "layer"}


def stand_in(observation: str, task: str) -> str | None:
    """The LongBench task an offline task stands in for in an observation; None for a real one."""
    facts = read_config("observations.yaml")[observation]
    return dict(zip(facts["sample_tasks"], facts["tasks"], strict=True)).get(task)


def task_label(observation: str, task: str) -> str:
    """How figures call a task."""
    other = stand_in(observation, task)
    return task if other is None else f"{task} (stand-in for {other})"


@dataclass(frozen=True)
class View:
    """One observation: what it looks at, the numbers it states, the panels it draws.

    Attributes:
        name: "ob1" to "ob3".
        spans: the parts of a layer in its JSON.
        phases: likewise; None for all tokens together.
        summary: the numbers of one task.
        panels: the panels of one model, from the top.
    """

    name: str
    spans: tuple[Span, ...]
    phases: tuple[Phase | None, ...]
    summary: Callable[[Similarities], Numbers]
    panels: Callable[[str, Sequence[Similarities]], list[Panel]]

    def as_json(self, seen: Sequence[Similarities]) -> dict[str, Any]:
        """Per task mean, standard deviation and count per sublayer; the summaries."""
        return {
            "tasks": {
                each.task: {
                    "stands_in_for": stand_in(self.name, each.task),
                    "prompts": len(each.ids),
                    "summary": self.summary(each),
                    "similarity": {
                        phase or "all": {
                            span: columns(each.layers(span, phase)) for span in self.spans
                        }
                        for phase in self.phases
                    },
                }
                for each in seen
            },
            "between_tasks": between_tasks(seen, self.spans),
        }

    def text(self, seen: Sequence[Similarities]) -> str:
        """The summaries as tables."""
        summaries = {each.task: self.summary(each) for each in seen}
        return as_text(summaries, between_tasks(seen, self.spans))


def _curve(label: str, moments: Sequence[Moments], style: int, **look: Any) -> Curve:
    return Curve(label, range(len(moments)), means(moments), style, **look)


def _panel(title: str, curves: Iterator[Curve], what: str = "IO similarity (cosine)") -> Panel:
    return Panel(title, "layer index", what, tuple(curves))


def _layers_panels(model: str, seen: Sequence[Similarities]) -> list[Panel]:
    curves = (
        _curve(task_label("ob1", each.task), each.layers("layer"), style)
        for style, each in enumerate(seen)
    )
    return [_panel(f"{model}: whole layers", curves)]


def _kinds_panels(model: str, seen: Sequence[Similarities]) -> list[Panel]:
    curves = (
        _curve(
            f"{NAMES[kind]}, {task_label('ob2', each.task)}",
            each.layers(kind),
            2 * (index // 2) + style,
            dashed=index % 2 == 1,
        )
        for style, kind in enumerate(KINDS)
        for index, each in enumerate(seen)
    )
    return [_panel(f"{model}: attention and FFN sublayers", curves)]


def _phases_panels(model: str, seen: Sequence[Similarities]) -> list[Panel]:
    panels = []
    for kind in KINDS:
        for each in seen:
            curves = []
            for style, phase in enumerate(Phase):
                moments = each.layers(kind, phase)
                curves.append(
                    _curve(
                        f"{phase} (band: ± 1 standard deviation over tokens)",
                        moments,
                        style,
                        dashed=phase is Phase.DECODE,
                        low=[m.mean - m.deviation for m in moments],
                        high=[m.mean + m.deviation for m in moments],
                        band=True,
                    )
                )
            title = f"{model}: {NAMES[kind]}, {task_label('ob3', each.task)}"
            panels.append(_panel(title, iter(curves)))
    return panels


VIEWS: Mapping[str, View] = {
    "ob1": View("ob1", ("layer",), (None,), layers_summary, _layers_panels),
    "ob2": View("ob2", KINDS, (None,), kinds_summary, _kinds_panels),
    "ob3": View("ob3", KINDS, tuple(Phase), phases_summary, _phases_panels),
}
