"""Recorded similarities against hidden states; resuming; the numbers, figures and scripts."""

from __future__ import annotations

import json
import shlex
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import N_LAYERS, ROOT, tiny_model
from test_recorders import residuals
from tiny_loaded import TinyLoaded, tiny_rows
from torch.nn.functional import cosine_similarity

from adaskip import AdaskipError, DataError, RunError
from adaskip.cli.observe import RESULTS, configured, observation_main
from adaskip.cli.run import as_words
from adaskip.configuration import read_config
from adaskip.observing import analysis, similarities as similarities_module
from adaskip.observing.analysis import (
    VIEWS,
    agreement,
    between_tasks,
    full_attention,
    hybrid_summary,
    kinds_summary,
    phases_summary,
    spread,
)
from adaskip.observing.layer_skipping import (
    HIGHEST,
    LOWEST,
    choices,
    layer_similarity,
    measure,
)
from adaskip.observing.recording import observe_requests, observe_task
from adaskip.observing.similarities import SPANS, from_rows, layers
from adaskip.observing.stability import chosen, overlap, resampled, stability
from adaskip.plan import KINDS, Phase, all_sublayers
from adaskip.recorders import Span
from adaskip.reports.observation_figures import Curve, Panel, draw
from adaskip.reports.observations import PANELS, TABLES, TITLES
from adaskip.runs.generation import StopRule, generate_greedy
from adaskip.runs.runconfig import RunConfig
from adaskip.tasks.spec import Row, task_spec

NAMES = ("ob0", "ob1", "ob2", "ob3", "stability")
SAMPLE = "adaskip.runs.loaded.sample_rows"


@pytest.fixture(scope="module")
def loaded() -> TinyLoaded:
    return TinyLoaded.make()


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., RunConfig]:
    def make(**settings: object) -> RunConfig:
        given = {"tasks": ("sample_qa",), "limit": 3, "results_dir": str(tmp_path)}
        return configured("ob1", "smollm2", given | settings)

    return make


def never(config: RunConfig) -> TinyLoaded:
    raise AssertionError("the model is not needed")


def sums(values: list[list[float]]) -> list[list[float]]:
    """`[total, squares]` of each layer's values."""
    return [[sum(layer), sum(value * value for value in layer)] for layer in values]


def similarities(attn: list[float], ffn: list[float], shift: float = 0.0) -> pd.DataFrame:
    """One token per phase; decode is `shift` higher."""
    phases = {
        phase: {
            "count": 1,
            "attn": sums([[a + plus] for a in attn]),
            "ffn": sums([[f + plus] for f in ffn]),
            "layer": sums([[a * f] for a, f in zip(attn, ffn, strict=True)]),
        }
        for phase, plus in (("prefill", 0.0), ("decode", shift))
    }
    return from_rows([{"id": "1", "sums": phases}])


def test_every_token_weighs_the_same() -> None:
    def row(name: str, prefill: list[float], decode: list[float]) -> dict[str, object]:
        phases = {"prefill": prefill, "decode": decode}
        kept = {p: {"count": len(v), "attn": sums([v])} for p, v in phases.items()}
        return {"id": name, "sums": kept}

    seen = from_rows([row("a", [0.5, 1.0], [0.0]), row("b", [0.3, 0.3, 0.3], [])])
    prefill = layers(seen, "attn", Phase.PREFILL).loc[0]
    assert (prefill["count"], prefill["mean"]) == (5, pytest.approx(0.48))
    both = layers(seen[seen["id"] == "a"], "attn").loc[0]
    assert both.tolist() == [3, 0.5, pytest.approx((1 / 6) ** 0.5)]
    flat = layers(seen[seen["id"] == "b"], "attn").loc[0]
    assert flat["std"] == pytest.approx(0, abs=1e-8)


def test_similarities_equal_a_direct_computation(
    loaded: TinyLoaded, make_config: Callable[..., RunConfig]
) -> None:
    config = make_config()
    found = observe_task(config, "sample_qa", lambda _: loaded)
    values: dict[tuple[str, str, int], list[torch.Tensor]] = {}
    for row in loaded.rows(config, "sample_qa"):
        ids = loaded.prompt(config, row).input_ids
        new = generate_greedy(loaded.model, [ids], StopRule(frozenset(), 10)).tokens[0]
        # The last of ten new tokens is never an input.
        stream = residuals(loaded.model, torch.tensor([ids + list(new[:-1])]))
        for layer in range(N_LAYERS):
            ends = {"attn": (0, 1), "ffn": (1, 2), "layer": (0, 2)}
            for span, (start, end) in ends.items():
                x, y = stream[2 * layer + start], stream[2 * layer + end]
                cosine = cosine_similarity(x, y, dim=-1)[0]
                for phase, part in (
                    ("prefill", cosine[: len(ids)]),
                    ("decode", cosine[len(ids) :]),
                ):
                    values.setdefault((phase, span, layer), []).append(part)
    for (phase, span, layer), parts in values.items():
        expected = torch.cat(parts).double()
        cell = layers(found, span, Phase(phase)).loc[layer]  # type: ignore[arg-type]
        assert cell["count"] == len(expected)
        assert cell["mean"] == pytest.approx(expected.mean().item(), abs=1e-5)
        assert cell["std"] == pytest.approx(expected.std(correction=0).item(), abs=1e-4)
    assert layers(found, "attn", Phase.DECODE)["count"][0] == 3 * 9
    # The phases are pooled by tokens, not averaged.
    pooled = layers(found, "ffn")["count"]
    assert pooled[1] == sum(layers(found, "ffn", phase)["count"][1] for phase in Phase)


class Interrupted(TinyLoaded):
    """Fails at the third prompt, all three of which are looked at before."""

    count = 0

    def prompt(self, config: RunConfig, row: object) -> object:  # type: ignore[override]
        self.count += 1
        if self.count == 3 + 3:
            raise KeyboardInterrupt
        return super().prompt(config, row)  # type: ignore[arg-type]


def test_an_interrupted_recording_goes_on(
    loaded: TinyLoaded, make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = make_config()
    broken = Interrupted(loaded.spec, loaded.model, loaded.tokenizer, ())
    with pytest.raises(KeyboardInterrupt):
        observe_task(config, "sample_qa", lambda _: broken)
    path = tmp_path / "similarity" / "smollm2-sample_qa.jsonl"
    assert len(path.read_text().splitlines()) == 2
    with path.open("ab") as file:
        file.write(b'{"id": "sample_qa-2", "su')  # torn by a kill
    resumed = observe_task(config, "sample_qa", lambda _: loaded)
    other = make_config(results_dir=str(tmp_path / "other"))
    whole = observe_task(other, "sample_qa", lambda _: loaded)
    assert set(whole["span"]) == set(SPANS)
    pd.testing.assert_frame_equal(resumed, whole, rtol=1e-12)
    # Finished: neither model nor rows are needed; fewer rows are there as well.
    assert observe_task(config, "sample_qa", never).equals(resumed)
    fewer = observe_task(make_config(limit=2), "sample_qa", never)
    assert fewer["id"].nunique() == 2
    assert fewer.equals(resumed[: len(fewer)])
    more = observe_task(make_config(limit=4), "sample_qa", lambda _: loaded)
    assert more["id"].nunique() == 4
    with pytest.raises(RunError, match="seed: 2025 then, 1 now"):
        observe_task(make_config(seed=1), "sample_qa", never)


def test_rows_with_holes_are_not_taken_for_the_first_ones(
    loaded: TinyLoaded, make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    whole = observe_task(make_config(limit=4), "sample_qa", lambda _: loaded)
    # As one of two processes leaves them that was interrupted with the other's share.
    path = tmp_path / "similarity" / "smollm2-sample_qa.jsonl"
    first, _, third, _ = path.read_text().splitlines(keepends=True)
    path.write_text(first + third)
    record = json.loads(path.with_suffix(".json").read_text())
    del record["limit"]
    path.with_suffix(".json").write_text(json.dumps(record))
    with pytest.raises(RunError, match="rows that are not among those asked for now"):
        observe_task(make_config(limit=2), "sample_qa", lambda _: loaded)
    assert observe_task(make_config(limit=4), "sample_qa", lambda _: loaded).equals(whole)
    # Without holes, but never completed: those that are asked for and no more.
    path.with_suffix(".json").write_text(json.dumps(record))
    fewer = observe_task(make_config(limit=2), "sample_qa", lambda _: loaded)
    assert fewer.equals(whole[: len(fewer)])
    assert fewer["id"].nunique() == 2


def test_a_task_of_fewer_rows_than_asked_for_is_complete(
    make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = TinyLoaded.make()
    monkeypatch.setattr(loaded, "rows", lambda config, task: tiny_rows(task, 1))
    whole = observe_task(make_config(), "sample_qa", lambda _: loaded)
    assert observe_task(make_config(), "sample_qa", never).equals(whole)


def test_nothing_is_added_to_what_other_weights_showed(
    loaded: TinyLoaded, make_config: Callable[..., RunConfig]
) -> None:
    observe_task(make_config(limit=2), "sample_qa", lambda _: loaded)
    other = TinyLoaded(loaded.spec, tiny_model("llama", seed=5), loaded.tokenizer, ())
    with pytest.raises(RunError, match=r"was made with model llama.*it is now llama"):
        observe_task(make_config(limit=3), "sample_qa", lambda _: other)
    made = choices([0.9, 0.5, 0.7, 0.8], [1])
    config = make_config(limit=2)
    measure(config, "sample_qa", made[:1], lambda _: loaded)
    with pytest.raises(RunError, match="was made with model llama"):
        measure(config, "sample_qa", made, lambda _: other)
    assert len(measure(config, "sample_qa", made, lambda _: loaded)) == len(made)


def test_weights_that_were_written_since_are_loaded_and_compared(
    loaded: TinyLoaded,
    make_config: Callable[..., RunConfig],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr("adaskip.runs.ledger.weights_stamp", lambda name: "before")
    config, made = make_config(limit=2), choices([0.9, 0.5, 0.7, 0.8], [1])
    whole = observe_task(config, "sample_qa", lambda _: loaded)
    measured = measure(config, "sample_qa", made, lambda _: loaded)
    assert observe_task(config, "sample_qa", never).equals(whole)
    assert measure(config, "sample_qa", made, never) == measured
    monkeypatch.setattr("adaskip.runs.ledger.weights_stamp", lambda name: "since")
    other = TinyLoaded(loaded.spec, tiny_model("llama", seed=5), loaded.tokenizer, ())
    for again in (
        lambda: observe_task(config, "sample_qa", lambda _: other),
        lambda: measure(config, "sample_qa", made, lambda _: other),
    ):
        with pytest.raises(RunError, match="was made with model llama"):
            again()
    # The same weights, written anew: known from then on, and no row is lost.
    fewer = observe_task(make_config(limit=1), "sample_qa", lambda _: loaded)
    assert fewer.equals(whole[: len(fewer)])
    assert observe_task(config, "sample_qa", never).equals(whole)
    assert measure(config, "sample_qa", made, lambda _: loaded) == measured
    assert measure(config, "sample_qa", made, never) == measured


def test_scores_of_some_choices_are_not_told_unless_asked_for(
    loaded: TinyLoaded, make_config: Callable[..., RunConfig]
) -> None:
    config, made = make_config(limit=1), choices([0.9, 0.5, 0.7, 0.8], [1])
    # As an interrupted `--scores` leaves them.
    [scored] = measure(config, "sample_qa", made[:1], lambda _: loaded, scores=True)
    found = measure(config, "sample_qa", made, lambda _: loaded)
    assert ["score" in each for each in found] == [False] * len(made)
    assert measure(config, "sample_qa", made[:1], never, scores=True) == [scored]
    numbers = {
        "choices": [{"side": c.side, "layers": sorted(c.layers)} for c in made],
        "tasks": {"sample_qa": [each | {"perplexity": 2.0} for each in found]},
    }
    assert "score" not in TABLES["ob0"](numbers)


def test_prompts_of_other_files_are_not_taken_for_these(
    loaded: TinyLoaded,
    make_config: Callable[..., RunConfig],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(
        "adaskip.runs.data.load_rows", lambda task, limit, **_: tiny_rows(task, limit)
    )
    observe_task(make_config(tasks=("qasper",), limit=1), "qasper", lambda _: loaded)
    elsewhere = make_config(tasks=("qasper",), data_dir="elsewhere", limit=1)
    with pytest.raises(RunError, match="data_dir: 'data' then, 'elsewhere' now"):
        observe_task(elsewhere, "qasper", never)
    # Records of earlier versions do not tell.
    path = tmp_path / "similarity/smollm2-qasper.json"
    record = json.loads(path.read_text())
    del record["settings"]["data_dir"]
    path.write_text(json.dumps(record))
    assert observe_task(elsewhere, "qasper", never)["id"].nunique() == 1


def test_similarities_that_are_no_numbers_are_refused(
    loaded: TinyLoaded, make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SAMPLE, lambda task, tokenizer, n, **_: tiny_rows(task, n))
    observe_task(make_config(limit=1), "sample_qa", lambda _: loaded)
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.mul_(1e38)
    wrong = TinyLoaded(loaded.spec, model, loaded.tokenizer, ())
    config = make_config(results_dir=str(Path(make_config().results_dir) / "wrong"))
    with pytest.raises(AdaskipError, match=r"no numbers in torch\.float32"):
        observe_task(config, "sample_qa", lambda _: wrong)
    with pytest.raises(AdaskipError, match=r"no numbers in torch\.float32"):
        observe_requests(config, "sample_qa", lambda _: wrong, 2)
    # As earlier versions kept them.
    kept = [{"id": "a", "sums": {Phase.PREFILL: {"count": 2, "attn": [[1.9, float("nan")]]}}}]
    with pytest.raises(RunError, match="similarities of prompt a that are no numbers"):
        from_rows(kept)


def test_requests_are_recorded_as_importance_is_learned(
    loaded: TinyLoaded, make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    from adaskip import learn_importance

    monkeypatch.setattr(SAMPLE, lambda task, tokenizer, n, **_: tiny_rows(task, n))
    config = make_config()
    found = observe_requests(config, "sample_qa", lambda _: loaded, 3)
    prompts = [
        torch.tensor([loaded.prompt(config, row).input_ids]) for row in tiny_rows("sample_qa", 3)
    ]
    importance = learn_importance(loaded.model, prompts)
    means = np.mean(found, axis=0)
    for sublayer in all_sublayers(N_LAYERS):
        assert means[sublayer.position] == pytest.approx(importance.similarity[sublayer], abs=1e-7)
    assert observe_requests(config, "sample_qa", never, 2) == found[:2]


def test_requests_of_every_task_are_recorded(
    make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = TinyLoaded.make()
    splits = []

    def rows(task: str, tokenizer: object, n: int, split: str, **_: object) -> list[Row]:
        splits.append(split)
        return tiny_rows(task, n)

    monkeypatch.setattr("adaskip.runs.loaded.retrieval_rows", rows)
    monkeypatch.setattr(
        "adaskip.runs.data.load_rows", lambda task, limit, **_: tiny_rows(task, min(limit, 2))
    )
    config = make_config(tasks=("needle_single", "qasper"))
    assert len(observe_requests(config, "needle_single", lambda _: loaded, 2)) == 2
    assert splits == ["warmup"]
    assert len(observe_requests(config, "qasper", lambda _: loaded, 2)) == 2
    with pytest.raises(DataError, match="qasper has 2 rows, 3 are needed"):
        observe_requests(config, "qasper", lambda _: loaded, 3)


def curve(*values: float) -> pd.Series:
    return pd.Series(values, index=pd.RangeIndex(len(values), name="layer"))


def test_numbers() -> None:
    a, b = curve(0.1, 0.8, 0.9, 0.7), curve(0.2, 0.9, 0.8, 0.7)
    found = spread(pd.DataFrame({"mean": a, "std": 0.5}))
    assert (found["min"], found["min_layer"], found["max"], found["max_layer"]) == (0.1, 0, 0.9, 2)
    assert found["mean"] == 0.625
    found = agreement(a, b)
    assert found["mean_difference"] == 0.025
    assert found["largest_difference"] == 0.1
    # Ranks 0 2 3 1 and 0 3 2 1: 1 - 6 * (0 + 1 + 1 + 0) / (4 * 15).
    assert found["spearman"] == pytest.approx(0.8)
    # 0.8 0.9 0.7 and 0.9 0.8 0.7: covariance 0.005 of variances 0.01.
    assert found["pearson_without_layer_0"] == pytest.approx(0.5)
    assert agreement(a, curve(0.5, 0.5, 0.5, 0.5))["pearson"] is None
    # Two layers: one is left beside layer 0.
    assert agreement(a[:2], b[:2])["pearson_without_layer_0"] is None


def test_summaries() -> None:
    seen = similarities([0.9, 0.8, 0.7, 0.6, 0.5], [0.95, 0.1, 0.2, 0.3, 0.4], shift=0.02)
    kinds = kinds_summary(seen)
    assert kinds["layers where attention is higher"] == 4
    assert kinds["attention among the top 8"] == 5
    phases = phases_summary(seen)
    assert phases["all prefill / decode"]["pearson"] == pytest.approx(1)
    assert phases["all prefill / decode"]["mean_difference"] == pytest.approx(0.02)
    assert phases["common among the top 8"] == 8


def test_layers_are_chosen_by_prefill_similarity() -> None:
    one = similarities([0.9, 0.5, 0.7, 0.8], [1.0, 1.0, 1.0, 1.0], shift=-0.9)
    assert layer_similarity({"a": one, "b": one}) == pytest.approx([0.9, 0.5, 0.7, 0.8])
    made = choices([0.9, 0.5, 0.7, 0.8], [1, 3, 5])
    assert [(choice.side, choice.layers) for choice in made[1:]] == [
        (HIGHEST, (0,)),
        (LOWEST, (1,)),
        (HIGHEST, (0, 3, 2)),
        (LOWEST, (1, 2, 3)),
    ]


MODELS = ("smollm2", "gemma3", "qwen")


def published(name: str) -> Path:
    """Where an observation is published, without the suffix."""
    models = MODELS if name in ("ob1", "ob2", "ob3") else MODELS[:1]
    return ROOT / "results" / "observations" / "-".join([name, *models])


def published_numbers(name: str) -> dict[str, Any]:
    """What a published observation says, by model."""
    path = published(name).with_suffix(".json")
    models: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["models"]
    return models


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", ["ob1", "ob2", "ob3"])
def test_published_similarities_give_the_published_numbers(
    name: str, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = published_numbers(name)[model]

    def kept(task: str, span: Span, phase: Phase | None = None) -> pd.DataFrame:
        columns = pd.DataFrame(part["tasks"][task]["similarity"][phase or "all"][span])
        return columns.rename_axis("layer")

    for module in (analysis, similarities_module):
        monkeypatch.setattr(module, "layers", kept)
    for task, found in part["tasks"].items():
        # Beside these, a model with hybrid attention has its kinds of layers.
        numbers = VIEWS[name].summary(task)
        assert {key: found["summary"][key] for key in numbers} == numbers
    if name != "ob3":  # of which the pooled columns are not published, nor a second task
        tasks = {task: task for task in part["tasks"]}
        assert between_tasks(tasks, VIEWS[name].spans) == part["between_tasks"]


@pytest.mark.parametrize("name", NAMES)
def test_published_numbers_give_the_published_tables(name: str) -> None:
    text = published(name).with_suffix(".md").read_text(encoding="utf-8")
    title, _, rest = text.partition("\n\n")
    assert title == f"# {TITLES[name]}"
    for model, numbers in published_numbers(name).items():
        begins, _, rest = rest.partition("\n\n")
        assert begins.startswith(f"**{model}** (offline sample: ")
        tables = TABLES[name](numbers)
        assert rest.startswith(tables)
        rest = rest.removeprefix(tables).lstrip("\n")
        assert all(panel.curves for panel in PANELS[name](model, numbers))
    assert rest == "" or rest.startswith("Made by `python observations/")


def test_the_chosen_sublayers() -> None:
    # A tie goes to the one less deep.
    mask = chosen(np.array([[0.5, 0.9, 0.5, 0.1], [0.1, 0.2, 0.3, 0.4]]), 2)
    assert mask.tolist() == [[True, True, False, False], [False, False, True, True]]
    found = overlap(np.array([[0.9, 0.8, 0.1, 0.0], [0.9, 0.1, 0.8, 0.0]]), np.arange(4.0)[::-1], 2)
    assert found["mean"] == 0.75
    assert found["low"] == pytest.approx(0.5125)


def test_stability() -> None:
    rng = np.random.default_rng(0)
    base = np.linspace(0.2, 0.9, 8)
    requests = {
        "same": np.tile(base, (10, 1)).tolist(),
        "noisy": (base + rng.normal(0, 0.2, (10, 8))).tolist(),
        "reversed": np.tile(base[::-1], (10, 1)).tolist(),
    }
    found = stability(requests, [2, 10], [4], seed=1)
    assert found["chosen"]["same"]["4"] == ["attn2", "ffn2", "attn3", "ffn3"]
    assert found["by_prompts"]["same"]["4"]["2"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
    noisy = found["by_prompts"]["noisy"]["4"]
    assert noisy["2"]["mean"] < noisy["10"]["mean"] < 1
    assert found["between_tasks"]["4"]["same / same"]["mean"] == 1
    assert found["between_tasks"]["4"]["same / reversed"]["all_prompts"] == 0
    assert found == stability(requests, [2, 10], [4], seed=1)
    # Drawn with replacement: profiles of as many prompts as there are differ, too.
    assert len({tuple(row) for row in resampled(np.asarray(requests["noisy"]), 10, 1, 50)}) > 40


def test_no_share_is_below_the_axis() -> None:
    rising = np.tile(np.linspace(0.2, 0.9, 8), (10, 1)).tolist()
    tasks = {"same": rising, "reversed": np.asarray(rising)[:, ::-1].tolist()}
    panels = PANELS["stability"]("m", stability(tasks, [2, 10], [4], seed=1))
    assert {panel.bounds for panel in panels} == {(-0.02, 1.02)}
    # Shares that are high have the axis of the published ones.
    published = PANELS["stability"]("smollm2", published_numbers("stability")["smollm2"])
    assert {panel.bounds for panel in published} == {(0.48, 1.02)}


def test_figures_are_small_and_complete(tmp_path: Path) -> None:
    x = list(range(30))
    flat = [0.95 + 0.001 * i for i in x]
    outlier = [0.05, *flat[1:]]
    curves = (
        Curve("with an outlier", x, outlier, 0),
        Curve(
            "banded", x, flat, 1, dashed=True, low=flat, high=[y + 0.01 for y in flat], band=True
        ),
    )
    path = tmp_path / "a" / "figure.png"
    draw([[Panel("one", "x", "y", curves)], [Panel("two", "x", "y", curves[1:], log=True)]], path)
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", data[16:24])
    assert width >= 900
    assert height >= 900
    assert len(data) < 150_000
    # An odd number of panels in two columns.
    one = Panel("one", "x", "y", curves)
    draw([[one, one], [one]], path)
    assert struct.unpack(">II", path.read_bytes()[16:24])[0] > width


def test_layers_of_full_attention_stand_apart_where_others_slide(tmp_path: Path) -> None:
    config = configured("ob2", "gemma3", {"tasks": (), "results_dir": str(tmp_path)})
    assert config.tasks == ("sample_classification", "sample_qa")
    assert full_attention(config) == [5, 11, 17]
    assert full_attention(replace(config, model_name="smollm2")) == []
    seen = similarities([0.5, 0.9, 0.7], [0.4, 0.4, 0.4])
    found = hybrid_summary(seen, ("attn",), [1])
    assert found["attn, full attention"]["mean"] == 0.9
    assert found["attn, sliding attention"]["mean"] == 0.6
    columns = {"mean": [0.5, 0.9, 0.7], "std": [0.0] * 3, "count": [1] * 3}
    task = {"similarity": {"all": {"layer": columns}}, "summary": {}}
    numbers = {"tasks": {"sample_qa": task}, "between_tasks": {}}
    [marked] = PANELS["ob1"]("gemma3", numbers | {"full_attention": [1]})
    [plain] = PANELS["ob1"]("qwen", numbers)
    assert (marked.marks, plain.marks) == ((1,), ())
    draw([[marked, plain]], tmp_path / "both.png")


def test_an_axis_ends_above_outliers() -> None:
    from matplotlib.figure import Figure

    from adaskip.reports.observation_figures import _draw_panel

    for values, bottom in (([0.05, 0.9, 0.95, 1.0], 0.85), ([0.5, 0.7, 0.9, 1.0], 0.4)):
        axis = Figure().subplots()
        _draw_panel(axis, Panel("t", "x", "y", (Curve("c", range(4), values, 0),)))
        assert axis.get_ylim()[0] > bottom
        texts = [text.get_text() for text in axis.texts]
        assert texts == (["below the axis: layer 0: 0.05"] if values[0] < 0.1 else [])
    # Of what is most of the values no axis is cut.
    axis = Figure().subplots()
    values = [0.28, 0.29, 0.3, 0.31, 0.32, 0.97]
    _draw_panel(axis, Panel("t", "x", "y", (Curve("c", range(6), values, 0),)))
    assert axis.get_ylim()[0] < 0.28
    assert not axis.texts


@pytest.mark.parametrize("name", NAMES)
def test_scripts_write_json_text_and_figure(
    name: str, loaded: TinyLoaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "adaskip.cli.observe.ModelSlot", lambda: SimpleNamespace(get=lambda config: loaded)
    )
    monkeypatch.setattr(SAMPLE, lambda task, tokenizer, n, **_: tiny_rows(task, n))
    monkeypatch.setattr("adaskip.observing.stability.RESAMPLES", 20)
    models = ["smollm2"] if name == "stability" else ["smollm2", "qwen", "llama"]
    tasks = ["--tasks", *read_config("observations.yaml")[name]["sample_tasks"]]
    limit = "10" if name == "stability" else "2"
    arguments = ["--model", *models, *tasks, "--limit", limit, "--results_dir", str(tmp_path)]
    scores = ["--scores"] if name == "ob0" else []
    assert observation_main(name, [*arguments, *scores]) == 0
    stem = f"{name}-{'-'.join(models)}"
    content = json.loads((tmp_path / f"{stem}.json").read_text())
    assert [*content["models"]] == models
    assert (tmp_path / f"{stem}.png").stat().st_size < 150_000
    text = (tmp_path / f"{stem}.md").read_text()
    assert shlex.split(text.split("Made by `")[1].split("`")[0])[2:] == [*arguments, *scores]
    assert text.count("\n| -") >= len(models)
    assert text.count("stands in for") >= len(models)
    part = content["models"]["smollm2"]
    if name in ("ob1", "ob2", "ob3"):
        task = next(iter(part["tasks"].values()))
        cell = task["similarity"]["decode" if name == "ob3" else "all"]
        assert set(cell) == ({"layer"} if name == "ob1" else set(KINDS))
        assert all(len(column) == N_LAYERS for kind in cell.values() for column in kind.values())
    if name == "ob0":
        # Whole layers of the random model differ; skipping nothing is dense in both models.
        assert [len(c["layers"]) for c in part["choices"]] == [0, 1, 1, 3, 3]
        assert all(part["tasks"].values())
        assert len(part["tasks"]) == len(tasks) - 1
        assert all("score" in each for task in part["tasks"].values() for each in task)
    assert content["environment"]["torch"] == torch.__version__
    # Again: everything is there, and stays where it was measured.
    for path in tmp_path.glob("*/*.json"):
        record = json.loads(path.read_text())
        assert record["environment"] == content["environment"]
        record["environment"]["torch"] = "2.9"
        path.write_text(json.dumps(record))
    monkeypatch.setattr("adaskip.cli.observe.ModelSlot", lambda: SimpleNamespace(get=never))
    assert observation_main(name, [*arguments, *scores]) == 0
    again = json.loads((tmp_path / f"{stem}.json").read_text())
    assert again["environment"] == content["environment"] | {"torch": "2.9"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "smollm3"], "smollm2"),
        (["--model", "smollm2", "llama", "--model_path", "x"], "one --model"),
        (["--model", "a/m", "b/m"], "'a/m' and 'b/m' end in the same name"),
        (["--model", "smollm2", "--tasks", "nothing"], "nothing"),
        (["--model", "smollm2", "--policy", "EE"], "unrecognized"),
        ([], "--model"),
    ],
)
def test_bad_options(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], message: str
) -> None:
    assert observation_main("ob1", [*arguments, "--results_dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error


def test_a_folder_that_other_commands_have_by_default_is_repeated() -> None:
    assert as_words({"results_dir": RESULTS}, results_dir=RESULTS) == []
    assert as_words({"results_dir": "results"}, results_dir=RESULTS) == ["--results_dir", "results"]
    assert as_words({"longbench_e": False, "seed": 2025, "limit": 2}) == [
        *("--limit", "2", "--no-longbench_e")
    ]


def test_every_stand_in_is_a_task() -> None:
    facts = read_config("observations.yaml")
    for name in (*NAMES, "perplexity"):
        tasks, stand_ins = facts[name]["tasks"], facts[name]["sample_tasks"]
        assert len(tasks) == len(stand_ins)
        assert not any(task_spec(task).offline for task in tasks)
        assert all(task_spec(task).offline for task in stand_ins)
