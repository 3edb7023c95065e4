"""The report page in a real browser: tables and figures are there, and nothing is fetched."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import pytest
from chromium import browser, probed, shown
from run_fixtures import Workplace, save_checkpoint, save_data, save_plan

from adaskip import sweep


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    checkpoint = save_checkpoint(folder / "model")
    place = Workplace(checkpoint, save_data(folder / "data"), folder / "results" / "small")
    observations = folder / "results" / "observations"
    observations.mkdir(parents=True)
    from PIL import Image

    Image.linear_gradient("L").resize((1600, 400)).save(observations / "ob1-llama.png")
    Image.new("RGB", (10, 10)).save(observations / "ob1-other.png")
    (observations / "ob1-llama.md").write_text("# Observation <1>\n")
    file = save_plan(place, perplexity={"rows": 1, "max_tokens": 4}, policies={"EE": [1, 2, 9]})
    assert sweep.main([str(file)]) == 1
    return place.results


@browser
@pytest.mark.parametrize("width", [1280, 520])
def test_a_browser_shows_everything_and_fetches_nothing(
    results: Path, tmp_path: Path, width: int
) -> None:
    told = probed(results / "report.html", tmp_path, width)
    assert told["refused"] == told["fetched"] == []
    # Per experiment one table of quality and one of what was skipped, then the recipe's three.
    assert told["tables"][:6] == [5, 4, 5, 4, 5, 4]
    assert len(told["tables"]) == 9
    # The two figures of the sweep and the observation of this model, made narrower.
    assert told["pictures"][2:] == [1400]
    assert min(told["pictures"]) > 500
    assert told["wide"] <= told["screen"]


@browser
def test_the_page_can_be_photographed(results: Path, tmp_path: Path) -> None:
    from PIL import Image

    picture = tmp_path / "page.png"
    shown(results / "report.html", tmp_path, f"--screenshot={picture}", "--window-size=1280,2400")
    with Image.open(picture) as image:
        assert image.size == (1280, 2400)
        colours = image.convert("RGB").getcolors(1 << 24)
    assert colours is not None
    assert len(colours) > 50
    assert max(count for count, _ in colours) < 0.95 * 1280 * 2400


def test_the_page_refers_to_nothing_outside_itself(results: Path) -> None:
    text = (results / "report.html").read_text(encoding="utf-8")
    addresses = re.findall(r"""(?:src|href|url|action|data)\s*[=(]\s*["']?([^"'\s>)]*)""", text)
    assert {address.split(":")[0].split("#")[0] for address in addresses} <= {"", "data"}
    assert "<script" not in text
    assert "default-src 'none'" in text
    assert len(text) < 1_000_000


def test_the_page_and_the_text_say_the_same(results: Path) -> None:
    page = html.unescape((results / "report.html").read_text(encoding="utf-8"))
    text = (results / "report.md").read_text(encoding="utf-8")
    report = json.loads((results / "report.json").read_text(encoding="utf-8"))
    for part in ("FAILED: llama prefill EE 9 multifieldqa_en", "Observation <1>", "SHA-256"):
        assert part in page
        assert part in text
    assert "ob1-other" not in text
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert [name for name in pictures if not (results / name).is_file()] == []
    lines = [line for table in report["tables"] for line in table["lines"]]
    tasks = [task for line in lines for task in line["tasks"].values()]
    assert (len(pictures), len(tasks)) == (3, 3 * 3)
    assert [task["score"] for task in tasks if f"{task['score']:.2f}" not in page] == []
    compared = [task for task in tasks if task["delta_interval"]]
    assert len(compared) == 2  # a task of one row has no interval
    for task in compared:
        low, high = task["delta_interval"]
        assert low <= task["delta"] + 0.01
        assert task["delta"] <= high + 0.01
        assert f"[{low:+.1f}, {high:+.1f}]" in text
