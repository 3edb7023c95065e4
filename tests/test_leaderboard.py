"""Methods at equal measured time: what is made once, and what is made anew."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from conftest import ROOT, prompt, tiny_model
from leaderboard_fixtures import FILE, file, filled, whole
from tiny_loaded import TinyLoaded, tiny_rows
from typing_extensions import override

from adaskip import (
    AdaskipError,
    PlanError,
    RunError,
    SkipPlan,
    Sublayer,
    distill_plan,
    fit_linears,
    shipped,
)
from adaskip.cli.leaderboard import leaderboard_main
from adaskip.configuration import config_path
from adaskip.fingerprint import fingerprint_name
from adaskip.leaderboard import making, sittings
from adaskip.leaderboard.board import Board
from adaskip.leaderboard.collecting import collect
from adaskip.leaderboard.making import PARTS, Maker
from adaskip.leaderboard.restoring import put_together, stand_in, told
from adaskip.leaderboard.rows import DENSE_DIGEST, PlanRow
from adaskip.leaderboard.settings import LeaderboardFile, Shipped
from adaskip.leaderboard.shipping import ship
from adaskip.leaderboard.values import REPORT_FILE, read_report
from adaskip.plan import Phase, all_sublayers
from adaskip.profiling.interleaving import Ratio
from adaskip.replacements import Linear, Window
from adaskip.reports.leaderboard_readme import readme_table
from adaskip.reports.leaderboard_tables import as_text, dense_sentence, equal_time_title
from adaskip.runs.runconfig import RunConfig
from adaskip.runs.yamlfile import read_yaml
from adaskip.search.rows import reads
from adaskip.sublayer_times import PlanTimes, SublayerTimes, timed_as
from adaskip.tasks.spec import Row

RESULTS = ROOT / "results/leaderboard"
SCORES = {"sample_qa": {"rows": 2, "new_tokens": 3}}


class Loaded(TinyLoaded):
    """A tiny model that serves every configuration."""

    @override
    def fits(self, config: RunConfig) -> bool:
        return True

    @override
    def warmup_rows(self, config: RunConfig, task: str, n: int) -> list[Row]:
        # Another seed, other rows.
        return tiny_rows(task, n + config.seed % 3)[-n:]


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return Loaded.make()


@pytest.fixture
def make(
    loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Board, Maker]]:
    """A board of a file with changes, and what makes it."""
    monkeypatch.setenv("ADASKIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sittings, "STEPS", 1)

    def made(**changes: Any) -> tuple[Board, Maker]:
        given = {"scores": SCORES, "methods": ["ADA", "EE"], "rows": 2, **changes}
        given.setdefault("contexts", {40: {"accelerations": [1.05]}})
        board = Board(file(**given), "smollm2", 40, tmp_path / "board")
        return board, Maker(board, lambda: loaded, progress=False)

    return made


def everything(maker: Maker) -> None:
    for part in PARTS:
        maker.make(part)


def digests(store: Any) -> dict[str, str]:
    return {row.id: row.plan_digest for row in store.rows()}


def test_every_part_is_made_once(
    make: Callable[..., tuple[Board, Maker]], monkeypatch: pytest.MonkeyPatch
) -> None:
    board, maker = make(methods=["ADA", "SD", "SEARCH gain"])
    everything(maker)
    names = ["ADA 1.05", "SD 1.05", "SEARCH gain 1.05"]
    made = {row.id: row for row in board.plans.rows()}
    assert [*made] == names
    found = [name for name in names if made[name].error is None]
    assert found
    for name in found:
        assert made[name].about["predicted acceleration"] >= 1.05
        assert made[name].replaced
    stores = (board.losses, board.sitting(1), board.scores("sample_qa"))
    expected = {name: made[name].plan_digest for name in found}
    for store in stores:
        kept = digests(store)
        assert [*kept] == ["dense", *found]
        assert {name: kept[name] for name in found} == expected
    assert {len(row.ttft) for row in board.sitting(1).rows()} == {3}
    assert {len(row.rows) for row in board.scores("sample_qa").rows()} == {2}
    assert set(board.losses.record()["characters"].values()) == {4, 5}
    before = {path: path.read_bytes() for path in board.folder.rglob("*.json")}

    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("made a second time")

    for name in ("make_plan", "search_plan", "reference_perplexity", "run"):
        monkeypatch.setattr(making, name, fail)
    with monkeypatch.context() as patch:
        patch.setattr(sittings, "time_request", fail)
        everything(maker)
    assert {path: path.read_bytes() for path in board.folder.rglob("*.json")} == before
    # Of a plan whose file is gone nothing is made again as long as all of it is known.
    for path in board.folder.rglob("*.safetensors"):
        path.unlink()
    everything(maker)
    assert {path: path.read_bytes() for path in board.folder.rglob("*.json")} == before
    # Times take no file.
    board.sitting(1).path.unlink()
    maker.make("times")
    assert {name: digests(board.sitting(1))[name] for name in found} == expected
    assert not [*board.folder.rglob("*.safetensors")]
    # Losses do: it is put together from the records, neither searched nor chosen anew.
    board.losses.keep(["dense", *found[:-1]])
    with pytest.raises(PlanError, match="give --parts plans first"):
        maker.make("losses")
    maker.make("plans")
    assert board.plan(found[-1]).digest == made[found[-1]].plan_digest
    assert [path.name for path in board.folder.rglob("*.safetensors")] == [
        board.path_of(board.point(found[-1])).name
    ]
    assert board.plans.path.read_bytes() == before[board.plans.path]


@pytest.mark.parametrize("rank", [None, 3])
def test_plans_are_put_together_from_what_a_board_has(rank: int | None) -> None:
    model = tiny_model("llama")
    rows = [(prompt(90, seed=seed)[0], [seed, 5, 6]) for seed in (1, 2)]
    # What the model reads of a row: all but the last token of its answer.
    seen = [torch.tensor([[*ids.tolist(), *answer[:-1]]]) for ids, answer in rows]
    kept = {
        Sublayer(0, "attn"): Window(16, 2),
        Sublayer(1, "attn"): Window(16, 4, (1,), 2),
        Sublayer(1, "ffn"): 1.0123456789012345,
        Sublayer(2, "ffn"): None,
    }
    linears = [Sublayer(2, "attn"), Sublayer(3, "ffn")]
    plan = fit_linears(model, seen, linears, rank=rank, plan=SkipPlan(kept))
    row = PlanRow(
        id="SEARCH 1.2",
        recipe={"rank": rank},
        plan_digest=plan.digest,
        about={"method": "SEARCH", "loss": 0.5, "calibration": "2 rows"},
        model=fingerprint_name(plan.fingerprint),
        replaced={str(sublayer): told(replacement) for sublayer, replacement in plan.items()},
    )
    again = put_together(model, row, lambda: rows)
    assert again is not None
    assert again.digest == plan.digest
    assert (again.about, again.fingerprint) == (row.about, plan.fingerprint)
    # Maps that are not those that were there: what was measured with them is not told of these.
    others = put_together(model, row, lambda: rows[:1] * 2)
    assert others is not None
    assert {s: others[s] for s in kept} == kept
    assert others.digest != plan.digest
    expected = {"method": "SEARCH", "calibration": "2 rows", "fitted on": "2 rows"}
    expected |= {"loss before fit": 0.5}
    assert dict(others.about) == expected

    def refuse() -> list[Any]:
        raise AssertionError("calibrated")

    # What is timed has the same in every place, with maps of the same shape, each its own.
    timed = stand_in(model, row)
    assert timed is not None
    assert {s: timed[s] for s in kept} == kept
    made = [r for r in timed.values() if isinstance(r, Linear)]
    assert [told(r) for r in made] == [told(plan[s]) for s in linears]
    assert made[0].factors[0].data_ptr() != made[1].factors[0].data_ptr()
    # Without linear maps there is nothing to fit.
    names = {name: text for name, text in row.replaced.items() if not text.startswith("linear")}
    whole = put_together(model, row.model_copy(update={"replaced": names}), refuse)
    assert whole is not None
    assert dict(whole) == kept
    # Those of a method's own maps, of records that say nothing and of another model are made anew.
    for changes in ({"about": {"method": "NBL"}}, {"replaced": {}}, {"model": "another"}):
        assert put_together(model, row.model_copy(update=changes), refuse) is None
    for wrong in ({"attn0": "magic"}, {"attn7": "nothing"}, {"ffn0": "gain x"}):
        with pytest.raises(RunError, match=r"record of SEARCH 1\.2 is damaged"):
            stand_in(model, row.model_copy(update={"replaced": wrong}))


def test_linear_maps_are_fitted_anew_on_more_rows(
    make: Callable[..., tuple[Board, Maker]], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, fitted, trained = "SEARCH linear2", "SEARCH linear2 fit4", "SEARCH linear2 distill4"
    methods = ["ADA", "ADA fit4", plain, fitted, trained]
    contexts = {40: {"accelerations": [1.05], "calibration_rows": 3, "calibration_tokens": 60}}
    board, maker = make(methods=methods, contexts=contexts, scores={})

    # On a busy machine a map of this size may seem slower than what it stands for.
    def times(model: Any, phase: Any, context: int, samples: Any, *, batch: int) -> PlanTimes:
        seconds = dict.fromkeys(all_sublayers(model.config.num_hidden_layers), 1.0)
        dense = SublayerTimes(10.0, seconds, Phase(phase), context, batch)
        return PlanTimes(dense, {timed_as(sample): 0.25 for sample in samples})

    monkeypatch.setattr("adaskip.search.journal.measured_plan_times", times)
    everything(maker)
    rows = {row.id: row for row in board.plans.rows()}
    assert rows["ADA fit4 1.05"].error == "ADA 1.05 has no linear map to fit anew."
    chosen, again = rows[f"{plain} 1.05"], rows[f"{fitted} 1.05"]
    assert again.replaced == chosen.replaced
    assert "linear 2" in again.replaced.values()
    assert again.plan_digest != chosen.plan_digest
    assert again.about["calibration"].endswith("; its linear maps fitted on 4")
    assert again.about["predicted acceleration"] == chosen.about["predicted acceleration"]
    assert "loss" not in again.about
    # Maps of four rows, three of which the search had: those that fit_linears makes.
    plan = board.plan(chosen.id)
    linears = [sublayer for sublayer, r in plan.items() if isinstance(r, Linear)]
    point = board.point(again.id)
    prompts = reads(maker._calibration(point, 4))
    searched = reads(maker._calibration(point))
    assert [ids.tolist() for ids in prompts[:3]] == [ids.tolist() for ids in searched]
    expected = fit_linears(maker._model, prompts, linears, rank=2, plan=plan)
    assert board.plan(again.id).digest == expected.digest
    # Of the same rows, those that distill_plan makes from there.
    expected = distill_plan(maker._model, expected, prompts)
    assert board.plan(f"{trained} 1.05").digest == expected.digest
    assert rows[f"{trained} 1.05"].about["divergence"] == expected.about["divergence"]
    assert rows[f"{trained} 1.05"].about["calibration"].endswith("; distilled on 4")
    assert not [*board.folder.rglob("*.distilling")]
    # A map takes as long whatever its numbers are, and is timed once.
    assert [*digests(board.sitting(1))] == ["dense", "ADA 1.05", chosen.id]
    assert board.timed[again.id] == board.timed[f"{trained} 1.05"] == board.timed[chosen.id]
    (table,) = collect(board.file, [board]).tables
    gaps = {entry.method: fmean(entry.by_row.values()) for entry in table.entries}
    assert gaps[fitted] != gaps[plain]
    entry = next(entry for entry in table.entries if entry.method == fitted)
    assert entry.ttft is not None
    # One is as fast as the other, whatever that is; a tiny model may be no faster than dense.
    theirs = gaps[plain] if entry.speed > 1 else 0.0
    assert entry.beside[plain].difference == pytest.approx(gaps[fitted] - theirs)
    assert entry.by_round == next(e.by_round for e in table.entries if e.method == plain)
    # One whose file is gone is trained again, not only fitted.
    board.path_of(board.point(f"{trained} 1.05")).unlink()
    board.losses.path.unlink()
    maker.make("plans")
    assert board.plan(f"{trained} 1.05").digest == expected.digest
    # Where what it was fitted from is made anew, so is it.
    content = json.loads(board.plans.path.read_text(encoding="utf-8"))
    content["rows"][3]["recipe"]["fitted"] = "of an earlier plan"
    board.plans.path.write_text(json.dumps(content), encoding="utf-8")
    stock, calls = making.refit_linears, []

    def counted(*args: Any, **kwargs: Any) -> SkipPlan:
        calls.append(1)
        return stock(*args, **kwargs)

    monkeypatch.setattr(making, "refit_linears", counted)
    maker.make("plans")
    maker.make("plans")
    assert len(calls) == 1
    assert digests(board.plans)[again.id] == again.plan_digest


def test_a_menu_says_the_rank_of_its_maps_and_the_share_of_keys_and_values(
    make: Callable[..., tuple[Board, Maker]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def search(*args: Any, **settings: Any) -> Any:
        asked.append((settings.get("replacements"), settings["rank"], settings["kv_share"]))
        raise AdaskipError("nothing can reach it")

    monkeypatch.setattr(making, "search_plan", search)
    board, maker = make(methods=["SEARCH", "SEARCH gain linear kv25", "SEARCH linear16 window"])
    maker.make("plans")
    gain, window = (["gain", "linear"], None, 0.25), (["linear", "window"], 16, None)
    assert asked == [(None, None, None), gain, window]
    assert [board.recipe(point)["rank"] for point in board.points] == [None, None, 16]


def test_a_shipped_plan_has_what_it_was_asked_for_in_its_name() -> None:
    given = {"model": "smollm2", "context": 4000, "acceleration": 1.2}
    assert Shipped(method="ADA", **given).name == "smollm2/1.2@4000"
    assert Shipped(method="SEARCH heads kv25", **given).name == "smollm2/1.2-kv25@4000"


def test_a_plan_made_anew_makes_what_was_measured_invalid(
    make: Callable[..., tuple[Board, Maker]], monkeypatch: pytest.MonkeyPatch
) -> None:
    board, maker = make()
    everything(maker)
    first = digests(board.losses)
    assert [*first] == ["dense", "ADA 1.05", "EE 1.05"]
    # As if it had skipped something else: times of other sublayers say nothing of the new plan.
    content = json.loads(board.plans.path.read_text(encoding="utf-8"))
    assert content["rows"][0]["id"] == "ADA 1.05"
    content["rows"][0]["replaced"] = {"ffn0": "nothing"}
    board.plans.path.write_text(json.dumps(content), encoding="utf-8")
    # Other calibration rows: other gains of AdaSkip; EE learns nothing.
    board, maker = make(calibration_rows=3)
    maker.make("plans")
    now = digests(board.plans)
    assert now["ADA 1.05"] != first["ADA 1.05"]
    assert now["EE 1.05"] == first["EE 1.05"]
    for store in (board.losses, board.sitting(1), board.scores("sample_qa")):
        assert [*board.known(store)] == ["dense", "EE 1.05"]
    measured, stock = [], making.reference_perplexity

    def counted(*args: Any, **kwargs: Any) -> Any:
        measured.append(1)
        return stock(*args, **kwargs)

    monkeypatch.setattr(making, "reference_perplexity", counted)
    everything(maker)
    assert len(measured) == 1
    for store in (board.losses, board.scores("sample_qa")):
        assert digests(store) == {"dense": first["dense"], **now}
    names = ["dense", "EE 1.05"], ["dense", "ADA 1.05"]
    assert [[*digests(store)] for store in board.sittings] == [*names]
    assert {n: timed.own.plan_digest for n, (timed,) in board.timed.items()} == now
    # What is reported is of the new plan only.
    (table,) = collect(board.file, [board]).tables
    assert [entry.calibration[:6] for entry in table.entries] == ["3 warm", "3 warm"]


def test_a_plan_with_other_numbers_in_the_same_places_keeps_its_times(
    make: Callable[..., tuple[Board, Maker]],
) -> None:
    board, maker = make()
    everything(maker)
    first, times = digests(board.plans), {row.id: row.ttft for row in board.sitting(1).rows()}
    board, maker = make(calibration_rows=3)
    maker.make("plans")
    now = digests(board.plans)
    assert now["ADA 1.05"] != first["ADA 1.05"]
    assert digests(board.sitting(1)) == {"dense": DENSE_DIGEST, **now}
    assert board.to_time == []
    everything(maker)
    assert {row.id: row.ttft for row in board.sitting(1).rows()} == times
    assert len(board.sittings) == 1


def test_losses_go_on_where_they_were(
    make: Callable[..., tuple[Board, Maker]], monkeypatch: pytest.MonkeyPatch
) -> None:
    board, maker = make()
    maker.make("plans")
    stock, calls = making.reference_perplexity, []

    def once(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return stock(*args, **kwargs)

    monkeypatch.setattr(making, "reference_perplexity", once)
    with pytest.raises(KeyboardInterrupt):
        maker.make("losses")
    assert [*digests(board.losses)] == ["dense"]
    maker.make("losses")
    assert len(calls) == 1 + len(board.losses.rows())


def test_times_go_on_round_by_round(
    make: Callable[..., tuple[Board, Maker]], monkeypatch: pytest.MonkeyPatch
) -> None:
    board, maker = make()
    maker.make("plans")
    stock, calls = sittings.time_request, []

    def killed(*args: Any) -> Any:
        calls.append(1)
        # One request to warm up; a round is three of dense and one of each plan.
        if len(calls) == 1 + 5 + 2:
            raise KeyboardInterrupt
        return stock(*args)

    monkeypatch.setattr(sittings, "time_request", killed)
    with pytest.raises(KeyboardInterrupt):
        maker.make("times")
    (first,) = {tuple(row.ttft) for row in board.sitting(1).rows() if row.id == "dense"}
    assert len(first) == 1
    maker.make("times")
    assert len(calls) == 8 + 1 + 2 * 5
    kept = {row.id: row for row in board.sitting(1).rows()}
    assert {len(row.ttft) for row in kept.values()} == {3}
    assert kept["dense"].ttft[:1] == [*first]
    # A context may have more rounds than the file.
    board, maker = make(contexts={40: {"accelerations": [1.05], "rounds": 4}})
    maker.make("times")
    more = {row.id: row for row in board.sitting(1).rows()}
    assert {len(row.ttft) for row in more.values()} == {4}
    assert more["dense"].ttft[:3] == kept["dense"].ttft


def test_a_new_plan_is_timed_beside_dense_and_no_other_anew(
    make: Callable[..., tuple[Board, Maker]],
) -> None:
    everything(make(methods=["EE"])[1])
    board, maker = make(methods=["EE", "SHORTGPT", "ADA"])
    first = board.sitting(1).path.read_bytes()
    everything(maker)
    assert board.sitting(1).path.read_bytes() == first
    assert [*digests(board.sitting(2))] == ["dense", "SHORTGPT 1.05", "ADA 1.05"]
    assert len(board.sittings) == 2
    store = board.sitting(2)
    slow = [
        row.model_copy(update={"ttft": [8.0] * 3 if row.id == "dense" else [2.0] * 3})
        for row in store.rows()
    ]
    store.append(slow)
    here = store.record()["environment"]
    store.note(environment=here | {"device": "abacus"})
    (table,) = collect(board.file, [board]).tables
    by_method = {entry.method: entry.ttft for entry in table.entries}
    for method in ("ADA", "SHORTGPT"):
        # Against the dense requests of its own sitting.
        assert by_method[method] == Ratio(4.0, 4.0, 4.0)
    assert by_method["EE"] != Ratio(4.0, 4.0, 4.0)
    assert table.rounds == (3, 3)
    assert table.environment["device"].endswith(" / abacus")
    assert "; 3 rounds in each of 2 sittings" in dense_sentence(table)
    several = replace(table, rounds=(6, 5, 7))
    assert "; 5 to 7 rounds in each of 3 sittings" in dense_sentence(several)
    # No sitting is added to that of another machine.
    board.sitting(1).append(
        [
            row.model_copy(update={"plan_digest": "of an earlier plan"})
            for row in board.sitting(1).rows()
            if row.id == "EE 1.05"
        ]
    )
    with pytest.raises(RunError, match=r"has times of abacus, \d+ threads; here is"):
        maker.make("times")
    store.note(environment=here)
    # A sitting of which all plans were made anew is gone, and its number free.
    assert board.untimed == ["EE 1.05"]
    maker.make("times")
    assert [*digests(board.sitting(1))] == ["dense", "EE 1.05"]
    assert board.sitting(1).path.read_bytes() != first
    assert len(board.sittings) == 2


def test_times_of_another_machine_are_taken_anew(
    make: Callable[..., tuple[Board, Maker]],
) -> None:
    board, maker = make()
    maker.make("plans")
    maker.make("times")
    record = board.sitting(1).record()["environment"]
    kept = [row.model_copy(update={"ttft": row.ttft[:1]}) for row in board.sitting(1).rows()]
    other = record | {"commit": "another"}
    for place, same in ((other, True), (record | {"transformers": "5.0"}, False)):
        board.sitting(1).path.unlink()
        board.sitting(1).append(kept)
        board.sitting(1).note(environment=place)
        maker.make("times")
        again = {row.id: row.ttft for row in board.sitting(1).rows()}
        assert {len(ttft) for ttft in again.values()} == {3}
        assert (again["dense"][0] == kept[0].ttft[0]) is same
        told = board.sitting(1).record()["environment"]
        assert told == record | ({"commit": f"another / {record['commit']}"} if same else {})


def test_times_that_are_taken_anew_stay_until_there_are_new_ones(
    make: Callable[..., tuple[Board, Maker]], monkeypatch: pytest.MonkeyPatch
) -> None:
    board, maker = make()
    maker.make("plans")
    maker.make("times")
    store = board.sitting(1)
    store.note(environment=store.record()["environment"] | {"transformers": "5.0"})
    before = store.path.read_bytes()
    board, maker = make(rounds=4)

    def killed(*args: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sittings, "time_request", killed)
        with pytest.raises(KeyboardInterrupt):
            maker.make("times")
    assert store.path.read_bytes() == before
    maker.make("times")
    assert {len(row.ttft) for row in board.sitting(1).rows()} == {4}
    assert board.sitting(1).record()["environment"]["transformers"] != "5.0"
    assert store.path.with_suffix(".old.json").read_bytes() == before
    assert [each.path for each in board.sittings] == [store.path]


def test_times_without_their_plans_are_not_deleted(
    make: Callable[..., tuple[Board, Maker]],
) -> None:
    board, maker = make()
    maker.make("plans")
    maker.make("times")
    before = board.sitting(1).path.read_bytes()
    board.plans.path.unlink()
    with pytest.raises(RunError, match="has no plans, and times say nothing without"):
        maker.make("times")
    assert board.sitting(1).path.read_bytes() == before


def test_losses_of_other_weights_precision_or_prompts_are_not_set_beside(
    make: Callable[..., tuple[Board, Maker]],
) -> None:
    board, maker = make()
    maker.make("plans")
    maker.make("losses")
    store = board.losses
    keys = ("computed_in", "sources", "model_fingerprint")
    record = {key: store.record()[key] for key in keys}
    assert record["computed_in"] == "float32 on cpu"
    row = next(iter(record["sources"]))
    for facts, said in (
        ({"computed_in": "bfloat16 on cuda"}, "computed in bfloat16 on cuda, it is now float32"),
        ({"sources": {row: "another prompt"}}, f"another row {row}"),
        ({"model_fingerprint": "f" * 64}, "was made with model"),
    ):
        store.keep(["dense"])
        store.note(**record | facts)
        with pytest.raises(RunError, match=said):
            maker.make("losses")
        assert [row.id for row in store.rows()] == ["dense"]
    store.note(**record)
    maker.make("losses")
    assert board.lacking(store) == []


def test_a_plan_without_times_does_not_stand_beside_those_that_have_them(tmp_path: Path) -> None:
    board = filled(tmp_path)
    (whole,) = collect(board.file, [board]).tables
    assert whole.missing == {}
    rows = [row for row in board.sitting(1).rows() if row.id != "ADA 1.1"]
    board.sitting(1).path.unlink()
    board.sitting(1).append(rows)
    (table,) = collect(board.file, [board]).tables
    points = [(entry.method, entry.asked) for entry in whole.entries]
    points.remove(("ADA", 1.1))
    assert [(entry.method, entry.asked) for entry in table.entries] == points
    assert all(entry.ttft is not None for entry in table.entries)
    assert table.missing == {"ADA 1.1": "has losses, but no times yet."}
    # Before any has times all are shown, by their predicted speeds.
    board.sitting(1).path.unlink()
    (table,) = collect(board.file, [board]).tables
    assert [(entry.ttft, entry.speed) for entry in table.entries] == [(None, 1.1)] * 3
    assert table.seconds is None
    assert table.missing == {}
    assert equal_time_title(table).startswith("At equal predicted time: ")
    assert equal_time_title(whole).startswith("At equal measured time: ")


def test_a_verdict_holds_at_both_ends_of_the_measured_time(tmp_path: Path) -> None:
    board = filled(tmp_path, contexts={40: {"accelerations": [1.05, 1.1]}})
    store = board.sitting(1)
    rows = {row.id: row for row in store.rows()}
    dense = rows["dense"].ttft

    def verdict_of(speeds: list[float]) -> str:
        """Of the searched plan, which loses 0.15 nats per token, beside AdaSkip's two."""
        ttft = [t / speed for t, speed in zip(dense, speeds, strict=True)]
        store.append([rows["SEARCH gain 1.05"].model_copy(update={"ttft": ttft})])
        (table,) = collect(board.file, [board]).tables
        (search,) = (e for e in table.entries if e.method == "SEARCH gain")
        return search.beside["ADA"].verdict

    assert verdict_of([1.1] * 5) == "better"
    assert verdict_of([1.02] * 5) == "worse"
    assert verdict_of([1.02, 1.1, 1.1, 1.1, 1.12]) == ""
    # Faster than any plan of the other method: nothing there says otherwise.
    assert verdict_of([1.1, 1.1, 1.1, 1.1, 2.0]) == "better"
    # There a worse one may be faster than all of the other's.
    assert verdict_of([1.02, 1.02, 1.02, 1.02, 2.0]) == ""


def test_few_rounds_of_times_show_nothing(tmp_path: Path) -> None:
    board = filled(tmp_path)
    store = board.sitting(1)

    def told() -> tuple[list[str], int]:
        report = collect(board.file, [board])
        (table,) = report.tables
        verdicts = [entry.beside["SEARCH gain"].verdict for entry in table.entries[:2]]
        return verdicts, as_text(report).count(", better")

    assert told() == (["worse", "worse"], 2)
    store.append([row.model_copy(update={"ttft": row.ttft[:4]}) for row in store.rows()])
    assert told() == (["", ""], 0)


def test_sittings_of_different_speed_share_their_seconds(tmp_path: Path) -> None:
    board = filled(tmp_path)
    first, second = board.sitting(1), board.sitting(2)
    rows = {row.id: row for row in first.rows()}
    slow = [
        rows[name].model_copy(update={"ttft": [3 * t for t in rows[name].ttft]})
        for name in ("dense", "ADA 1.1")
    ]
    first.keep([name for name in rows if name != "ADA 1.1"])
    second.append(slow)
    (table,) = collect(board.file, [board]).tables
    # Of the first, which has two plans; dense took 3, 6 and 9 s in the other.
    assert table.seconds == 2.0
    for entry in table.entries:
        assert entry.ttft is not None
        assert entry.seconds == pytest.approx(table.seconds / entry.ttft.median)


def test_what_a_file_does_not_name_any_more_is_neither_reported_nor_lost(
    make: Callable[..., tuple[Board, Maker]],
) -> None:
    everything(make(methods=["ADA", "EE"])[1])
    board, maker = make(methods=["EE"])
    before = board.sitting(1).path.read_bytes()
    (table,) = collect(board.file, [board]).tables
    assert [entry.method for entry in table.entries] == ["EE"]
    assert all(entry.ttft is not None for entry in table.entries)
    maker.make("times")
    # One more round, which the file that named both goes on with.
    settings = {"contexts": {40: {"accelerations": [1.05], "rounds": 4}}}
    make(methods=["EE"], **settings)[1].make("times")
    assert board.sitting(1).path.read_bytes() == before
    board, maker = make(methods=["ADA", "EE"], **settings)
    maker.make("times")
    assert {len(row.ttft) for row in board.sitting(1).rows()} == {4}


def test_other_calibrations_are_points_of_their_own(
    make: Callable[..., tuple[Board, Maker]],
) -> None:
    other = {"model": "smollm2", "context": 40, "method": "ADA", "acceleration": 1.05}
    board, maker = make(
        methods=["ADA"],
        scores={},
        other_calibrations=[
            {**other, "tasks": ["sample_qa"], "seeds": [1]},
            {**other, "tokens": [20]},
        ],
    )
    everything(maker)
    (table,) = collect(board.file, [board]).tables
    assert [entry.method for entry in table.entries] == ["ADA"]
    assert [entry.calibration for entry in table.calibrations] == [
        "2 warm-up rows of sample_summarization, 30 tokens",
        "2 warm-up rows of sample_qa, 30 tokens",
        "2 warm-up rows of sample_summarization, 30 tokens, seed 1",
        "2 warm-up rows of sample_summarization, 20 tokens",
    ]
    # The rows of these tests are the same at either length.
    assert len({entry.gap for entry in table.calibrations}) == 3


def test_digests_tell_plans_apart_by_what_they_compute() -> None:
    import torch

    def linear(value: float) -> Linear:
        return Linear(torch.full((4, 4), value), torch.zeros(4))

    attention = Sublayer(1, "attn")
    plans = [
        {attention: each}
        for each in (None, 1.0, 1.5, Window(8), Window(9), linear(1.0), linear(2.0))
    ]
    found = [SkipPlan(plan).digest for plan in plans]
    found += [SkipPlan().digest, SkipPlan({Sublayer(0, "attn"): 1.0}).digest]
    assert len(set(found)) == len(found)
    assert SkipPlan(plans[5], about={"loss": 1.0}).digest == found[5]


def test_what_is_committed_is_what_the_report_says() -> None:
    given = read_yaml(config_path("leaderboard.yaml"), LeaderboardFile)
    given.check()
    boards = [Board(given, model, context, RESULTS) for model, context in given.boards()]
    found = replace(collect(given, boards), config="leaderboard.yaml")
    assert found == read_report(RESULTS / REPORT_FILE)


def test_readme_has_the_table_of_what_is_committed() -> None:
    table = readme_table(read_report(RESULTS / REPORT_FILE))
    assert f"<!-- leaderboard -->\n\n{table}\n\n<!-- /leaderboard -->" in (
        ROOT / "README.md"
    ).read_text(encoding="utf-8")


def test_readme_is_written_between_its_marks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled(tmp_path)
    path, config = tmp_path / "README.md", tmp_path / "board.yaml"
    config.write_text(json.dumps(FILE | {"rows": 2}), encoding="utf-8")
    options = ["--config", str(config), "--results_dir", str(tmp_path), "--readme", str(path)]
    path.write_text("# Before\n", encoding="utf-8")
    assert leaderboard_main([*options, "--parts", "report"]) == 2
    assert "put <!-- leaderboard --> and <!-- /leaderboard --> into it" in capsys.readouterr().err
    path.write_text("# A\n<!-- leaderboard -->\nold\n<!-- /leaderboard -->\nB\n", encoding="utf-8")
    assert leaderboard_main([*options, "--parts", "report"]) == 0
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# A\n<!-- leaderboard -->\n\n| model ")
    assert text.endswith(" |\n\n<!-- /leaderboard -->\nB\n")
    assert "old" not in text
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "<code>python eval/leaderboard.py --config board.yaml</code>" in page
    # At 1.1, between plans: 0.2 to 0.6 at 1.0625 to 1.125; the second row loses twice as much.
    assert "0.660 [0.440, 0.880]" in text


def test_shipped_plans_tell_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    boards = whole(tmp_path)
    board, given = boards[0], boards[0].file
    plan = SkipPlan({Sublayer(0, "attn"): 1.5}, fingerprint="f", about={"method": "ADA"})
    (point,) = (p for p in board.points if p.name == "ADA 1.2")
    plan.save(board.path_of(point))
    for store in (board.plans, board.losses, board.sitting(1)):
        content = json.loads(store.path.read_text(encoding="utf-8"))
        rows = [r for r in content["rows"] if r["id"] in ("dense", "ADA 1.2")]
        rows[-1]["plan_digest"] = plan.digest
        store.path.write_text(json.dumps(content | {"rows": rows}), encoding="utf-8")
    report = collect(given, boards)
    folder = tmp_path / "plans-of-the-package"
    (path,) = ship(given, tmp_path, report, folder)
    assert path == folder / "smollm2/1.2@1000.safetensors"
    monkeypatch.setattr(shipped, "_SHIPPED", folder)
    loaded = SkipPlan.load("smollm2/1.2@1000")
    assert (loaded, loaded.fingerprint) == (plan, "f")
    about = loaded.about
    assert about["method"] == "ADA"
    assert about["measured acceleration"] == pytest.approx(1.202)
    assert about["gap"] == pytest.approx(1.35)
    assert about["tested on"] == "2 references of sample_summarization"
    assert about["measured on"] == "abacus, 2 threads, torch 2"
    # One that was shipped is found there, should its own file be gone.
    board.path_of(point).unlink()
    assert ship(given, tmp_path, report, folder) == [path]
    assert SkipPlan.load(path).digest == plan.digest
    # A plan put together from its record has no course: it keeps that of the one it stands for.
    SkipPlan({Sublayer(0, "attn"): 1.4}, about={"course": "all the way"}).save(path)
    plan.save(board.path_of(point))
    assert ship(given, tmp_path, report, folder) == [path]
    assert SkipPlan.load(path).digest == plan.digest
    assert SkipPlan.load(path).about["course"] == "all the way"
    SkipPlan({Sublayer(1, "attn"): 1.5}, about={"course": "another way"}).save(path)
    assert ship(given, tmp_path, report, folder) == [path]
    assert "course" not in SkipPlan.load(path).about
    board.path_of(point).unlink()
    SkipPlan({}).save(path)
    with pytest.raises(AdaskipError, match=r"is gone\. Delete its row from"):
        ship(given, tmp_path, report, folder)
    plan.save(board.path_of(point))
    monkeypatch.setattr("adaskip.leaderboard.shipping.LIMIT", 100)
    path.unlink()
    with pytest.raises(ValueError, match=r"bytes together \(smollm2/1.2@1000.safetensors .* 100"):
        ship(given, tmp_path, report, folder)
    assert not path.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: smollm2\n", "Unknown key 'model'. Did you mean 'models'"),
        ("- a\n", "must be a mapping"),
        (json.dumps(FILE | {"contexts": {"40": {"accelerations": [1.0]}}}), "greater than 1"),
        (json.dumps(FILE | {"phase": "decode"}), "by the time to the first token: give phase"),
        (json.dumps(FILE | {"methods": ["SLEP"]}), "Unknown method 'SLEP'. Did you mean 'SLEB'"),
        (json.dumps(FILE | {"methods": ["SEARCH gian"]}), "Unknown replacement 'gian'"),
        (json.dumps(FILE | {"methods": ["SEARCH window64"]}), "Unknown replacement 'window64'"),
        (json.dumps(FILE | {"methods": ["SEARCH linear0"]}), "Unknown replacement 'linear0'"),
        (json.dumps(FILE | {"methods": ["SEARCH kv"]}), "Unknown replacement 'kv'"),
        (json.dumps(FILE | {"methods": ["SEARCH kv101"]}), "Unknown replacement 'kv101'"),
        (json.dumps(FILE | {"methods": ["SEARCH linear linear64"]}), "names a replacement twice"),
        (json.dumps(FILE | {"methods": ["NBL fit32"]}), "fits the linear maps of 'NBL' anew"),
        (json.dumps(FILE | {"methods": ["NBL fit32", "NBL"]}), "does not stand before it"),
        (json.dumps(FILE | {"methods": ["NBL", "NBL fit"]}), "fit32"),
        (json.dumps(FILE | {"methods": ["NBL distill9", "NBL"]}), "does not stand before it"),
        (json.dumps(FILE | {"methods": ["NBL", "NBL fit9 distill9"]}), "of its own each"),
        (json.dumps(FILE | {"methods": ["NBL", "NBL gain"]}), "has a menu, which SEARCH alone"),
        (json.dumps(FILE | {"methods": ["EE gain"]}), "which SEARCH alone takes"),
        (json.dumps(FILE | {"scores": {"sample_qu": {"rows": 1}}}), "Unknown task 'sample_qu'"),
        (
            json.dumps(FILE | {"contexts": {"40": {"accelerations": [1.1], "models": ["gemma3"]}}}),
            "names the model 'gemma3', which it compares nowhere; it compares smollm2.",
        ),
        (
            json.dumps(FILE | {"scores": {"sample_qa": {"rows": 1, "methods": ["NBL"]}}}),
            "names the method 'NBL', which it compares nowhere; it compares ",
        ),
        (json.dumps(FILE | {"methods": ["ADA", "ADA"]}), "'ADA 1.05' of smollm2 at 40 tokens"),
        (json.dumps(FILE | {"models": ["a/m", "b/m"]}), "'a/m' and 'b/m' end in the same name"),
        (json.dumps(FILE | {"models": ["smollm2", "smollm2"]}), "40 tokens 2 times; name each"),
        (
            json.dumps(FILE | {"contexts": {"40": {"accelerations": [1.1, 1.2, 1.2]}}}),
            "'ADA 1.2' of smollm2 at 40 tokens 2 times",
        ),
        (
            json.dumps(
                FILE
                | {
                    "other_calibrations": [
                        {
                            "model": "smollm2",
                            "context": 40,
                            "method": "ADA",
                            "acceleration": 1.1,
                            "seeds": [1, 2, 1],
                        }
                    ]
                }
            ),
            "'ADA 1.1 seed 1' of smollm2 at 40 tokens 2 times",
        ),
        (json.dumps(FILE | {"task": "gov_report"}), "be calibrated on what they are tested on"),
        (json.dumps(FILE | {"scores": {"trec": {"rows": 1}}}), "'trec' has no rows apart from"),
        (
            json.dumps(
                FILE
                | {
                    "shipped": [
                        {"model": "smollm2", "context": 41, "method": "ADA", "acceleration": 1.1}
                    ]
                }
            ),
            "'ADA 1.1' of smollm2 at 41 tokens, which is none of the points",
        ),
    ],
)
def test_files_that_cannot_be(
    tmp_path: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "board.yaml"
    path.write_text(text, encoding="utf-8")
    assert leaderboard_main(["--config", str(path), "--results_dir", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--contexts", "3"], "3 is no context of the file; it has 1000"),
        (["--models", "gpt"], "gpt is no model of the file; it has smollm2"),
        (
            ["--models", "qwen", "gemma3", "--contexts", "7000"],
            "compares qwen and gemma3 at no context of 7000 tokens; it has smollm2 1000, smollm2",
        ),
        (["--parts", "times", "--contexts", "4000", "--ship", "x"], "has no plan yet"),
    ],
)
def test_what_the_file_lacks(
    tmp_path: Path,
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Maker, "make", lambda *args: None)
    assert leaderboard_main([*options, "--results_dir", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
