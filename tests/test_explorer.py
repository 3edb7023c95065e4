"""The plan explorer in a real browser: the slider moved, clicked and typed into."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chromium import Window as Browser, browser, opened

from adaskip import Linear, PlanError, SkipPlan, Sublayer, Window
from adaskip.plan import COURSE, all_sublayers
from adaskip.reports.explorer import page, write_explorer
from adaskip.search.course import RUNS, Course

N_LAYERS = 6
EVERY = all_sublayers(N_LAYERS)
A1, A4, F2 = Sublayer(1, "attn"), Sublayer(4, "attn"), Sublayer(2, "ffn")


def course() -> Course:
    """Three steps: a window, a gain, and the window given up for another gain."""
    made = Course(
        total=2.0,
        seconds={s: 0.2 if s.kind == "attn" else 0.1 for s in EVERY},
        similarity={s: 0.9 + s.position / 1000 for s in EVERY},
        alone={s: ("gain", 0.01 * (1 + s.position)) for s in EVERY if s != F2},
    )
    made.add({A1: "window 64"}, 1.05, 0.9, 0.01)
    made.add({A1: "window 64", F2: "gain"}, 1.1, 0.9, 0.03)
    made.add({A4: "gain", F2: "gain"}, 1.2, 5 / 6, 0.02)
    return made


def plan(name: str = "SEARCH") -> SkipPlan:
    about: dict[str, Any] = {"method": name, "phase": "prefill", "context": 4000}
    about |= {"predicted acceleration": 1.2, "predicted kv share": 5 / 6, "loss before fit": 0.02}
    about |= {"measured acceleration": 1.17, "measured from": 1.1, "measured to": 1.25}
    about |= {"gap": 0.18460093495}
    return SkipPlan({A4: 0.97, F2: 0.98}, about={**about, COURSE: course().as_text()})


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with opened(tmp_path_factory.mktemp("browser")) as found:
        yield found


@pytest.fixture
def explorer(tmp_path: Path) -> Path:
    path = tmp_path / "plan.html"
    write_explorer(path, {"SEARCH-1.2": plan(), "by hand": SkipPlan({A1: None})})
    return path


def text(window: Browser, selector: str) -> str:
    found = window.value(f"document.querySelector({selector!r}).innerText")
    return " ".join(str(found).split())


def replaced(window: Browser) -> dict[str, str]:
    """What the heat map says takes whose place."""
    cells = window.value(
        "[...document.querySelectorAll('#map td')].map(c => c.querySelector('span')?.innerText)"
    )
    return {str(s): name for s, name in zip(EVERY, cells, strict=True) if name}


@browser
def test_the_slider_shows_what_each_budget_replaces(window: Browser, explorer: Path) -> None:
    window.open(explorer)
    assert text(window, "#facts").endswith("context 4000 gap 0.185")
    # It opens with the plan itself, which has been measured.
    assert replaced(window) == {"attn4": "gain", "ffn2": "gain"}
    tiles = text(window, ".tiles")
    assert "predicted 1.200 × 1670 of 2000 ms" in tiles
    assert "measured 1.170 × 1.100 to 1.250" in tiles
    assert "KV held 83.3 %" in tiles
    assert "loss 0.0200 nats per token, before it was fitted anew replaced" in tiles
    assert "the last loss is from before the plan was fitted anew" in text(window, ".legend")
    assert "attention 1 is computed again" in text(window, "#changed")
    # A click in the middle of the slider, then keys.
    window.click("#budget", share=0.34)
    assert replaced(window) == {"attn1": "window 64"}
    assert "loss 0.0100 nats per token replaced" in text(window, ".tiles")
    assert "measured not yet" in text(window, ".tiles")
    window.press("ArrowRight")
    assert replaced(window) == {"attn1": "window 64", "ffn2": "gain"}
    assert "FFN 2: gain" in text(window, "#changed")
    assert "--acceleration 1.1 …; a search for this acceleration" in text(window, "#how")
    window.press("Home")
    assert replaced(window) == {}
    assert text(window, "#list") == "Nothing is replaced."
    window.click("#more")
    assert replaced(window) == {"attn1": "window 64"}


@browser
def test_the_map_is_shaded_by_what_is_asked_for(window: Browser, explorer: Path) -> None:
    window.open(explorer)
    cell = "#map tbody tr:nth-child(3) td:nth-child(3)"
    shown = {}
    for metric in ("similarity", "sensitivity", "time"):
        window.click(f"input[value={metric}]")
        shown[metric] = text(window, cell)
    assert shown == {"similarity": "0.905 gain", "sensitivity": "– gain", "time": "100 ms gain"}
    shades = window.value(
        "[...document.querySelectorAll('#map td')].map(c => getComputedStyle(c).backgroundColor)"
    )
    assert len(set(shades)) == 2  # attention takes longer than FFN, each as long as the others


@browser
def test_it_can_be_used_without_seeing_or_pointing(window: Browser, explorer: Path) -> None:
    window.open(explorer)
    value = "document.querySelector('#budget').getAttribute('aria-valuetext')"
    assert window.value(value) == (
        "predicted 1.20 times as fast, 2 sublayers replaced, loss 0.020, before it was fitted anew"
    )
    seen = []
    for _ in range(5):
        window.press("Tab")
        seen.append(window.value("document.activeElement.id || document.activeElement.name"))
    # The button for more is disabled at the end; a group of choices is one stop.
    assert seen[:4] == ["plans", "less", "budget", "metric"]
    unlabelled = window.value(
        "[...document.querySelectorAll('input, select, button')]"
        ".filter(e => !e.labels?.length && !e.ariaLabel).map(e => e.outerHTML)"
    )
    assert unlabelled == []
    assert window.value("document.querySelector('#curve').ariaLabel").startswith("Loss against")


@browser
@pytest.mark.parametrize(("width", "dark"), [(1300, False), (1300, True), (420, False)])
def test_it_fits_the_screen_and_fetches_nothing(
    window: Browser, explorer: Path, width: int, dark: bool
) -> None:
    window.open(explorer, width=width, dark=dark)
    assert window.value("document.documentElement.scrollWidth") <= width
    assert window.value("performance.getEntriesByType('resource').length") == 0
    paper = window.value("getComputedStyle(document.body).backgroundColor")
    brightness = sum(int(part) for part in re.findall(r"\d+", paper)[:3])
    assert (brightness < 200) == dark


@browser
def test_plans_can_be_changed_also_to_one_without_a_course(window: Browser, explorer: Path) -> None:
    window.open(explorer)
    window.value(
        "{ const p = document.querySelector('#plans'); p.value = '1';"
        " p.dispatchEvent(new Event('change')); }"
    )
    assert text(window, "h1") == "by hand"
    assert "predicted – measured not yet KV held – loss –" in text(window, ".tiles")
    assert "attention 1: nothing" in text(window, "#changed")
    assert "Not known" in text(window, "#meaning")


@browser
def test_only_plans_of_one_model_phase_and_context_share_a_curve(
    window: Browser, tmp_path: Path
) -> None:
    other = SkipPlan(plan(), about={**plan().about, "context": 1000}, fingerprint="llama-6x8")
    alike = SkipPlan({A1: None}, about={k: v for k, v in plan().about.items() if k != COURSE})
    path = tmp_path / "plan.html"
    write_explorer(path, {"one": plan(), "of another context": other, "two": alike})
    window.open(path)
    assert window.value("document.querySelectorAll('#curve .other').length") == 1
    names = "[...document.querySelectorAll('#curve .name')].map(text => text.textContent)"
    assert window.value(names) == ["one", "two"]
    assert "those of another one are not drawn" in text(window, "#legend")
    window.value(
        "{ const p = document.querySelector('#plans'); p.value = '1';"
        " p.dispatchEvent(new Event('change')); }"
    )
    assert window.value("document.querySelectorAll('#curve .other').length") == 0
    assert window.value("document.title").startswith("of another context, llama-6x8 – ")


@browser
def test_the_list_tells_the_numbers_of_the_plan_itself(window: Browser, tmp_path: Path) -> None:
    path = tmp_path / "plan.html"
    windows = {Sublayer(i, "attn"): Window(64, 2) for i in (0, 5)}
    write_explorer(path, {"p": plan(), "w": SkipPlan({**windows, F2: 0.98})})
    window.open(path)
    assert text(window, "#list") == "gain (2): FFN 2 (0.98), attention 4 (0.97)"
    window.click("#less")
    assert text(window, "#list") == "gain (1): FFN 2 window 64 (1): attention 1"
    window.value(
        "{ const p = document.querySelector('#plans'); p.value = '1';"
        " p.dispatchEvent(new Event('change')); }"
    )
    assert "gain 0.98 (1): FFN 2" in text(window, "#list")
    assert "2 sinks (2): attention 0, attention 5" in text(window, "#list")


def test_what_a_plan_says_stays_text(tmp_path: Path) -> None:
    made = page({"</script><b>": SkipPlan({A1: None}, about={"source": "<img>"})})
    assert "<img" not in made
    assert "</script><b>" not in made
    addresses = re.findall(r"""(?:src|href|url|action)\s*[=(]\s*["']?([^"'\s>)]+)""", made)
    assert addresses == []
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', made)
    assert found is not None
    assert json.loads(found[1])[0]["name"] == "</script><b>"


def test_a_course_is_kept_in_a_plan(tmp_path: Path) -> None:
    plan().save(tmp_path / "plan.safetensors")
    kept = Course.of(SkipPlan.load(tmp_path / "plan.safetensors"))
    assert kept is not None
    # But for digits that nobody can measure.
    assert kept.stops == [stop._replace(kv_share=float(f"{stop.kv_share:.5g}")) for stop in
                          course().stops]  # fmt: skip
    assert kept.stops[-1].changes == {A4: "gain", A1: RUNS}
    assert kept.alone == course().alone
    assert kept.seconds == course().seconds
    assert COURSE not in plan().facts


@pytest.mark.parametrize("change", ["{", "[]", '{"total":1}', '{"total":"x","stops":[]}'])
def test_a_damaged_course_is_refused(change: str) -> None:
    with pytest.raises(PlanError, match="The course of the plan is damaged"):
        page({"plan": SkipPlan({A1: None}, about={COURSE: change})})


def test_a_stop_that_changes_nothing_takes_the_place_of_the_last() -> None:
    made = course()
    made.add({A4: "gain", F2: "gain"}, 1.2, 5 / 6, 0.015)
    assert [stop.loss for stop in made.stops] == [0.01, 0.03, 0.015]


def test_the_numbers_of_a_replacement_are_told() -> None:
    import torch

    linear = Linear(torch.ones(4, 4), torch.ones(4))
    low = Linear((torch.ones(4, 2), torch.ones(2, 4)), torch.ones(4))
    made = page({"p": SkipPlan({A1: Window(8), A4: linear, F2: low, Sublayer(0, "ffn"): None})})
    for told in ("window 8, 4 sinks", "linear map, rank 4", "linear map, rank 2", "nothing"):
        assert f'"{told}"' in made
