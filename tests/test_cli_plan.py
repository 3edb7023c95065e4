"""The command that makes plans: what it makes, keeps, goes on with, and refuses."""

from __future__ import annotations

import errno
import json
import re
from pathlib import Path
from typing import Any

import pytest
from tiny_loaded import TinyLoaded, character_tokenizer, tiny_rows

from adaskip import DataError, SkipPlan
from adaskip.cli.plan import plan_main
from adaskip.plan import Phase, all_sublayers
from adaskip.policies.made_plan import PlanFile
from adaskip.runs.calibration import text_rows
from adaskip.runs.loaded import LoadedModel
from adaskip.runs.runconfig import RunConfig
from adaskip.runs.runner import resolve
from adaskip.search.losses import Losses
from adaskip.sublayer_times import PlanTimes, SublayerTimes


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ADASKIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(LoadedModel, "open", lambda config: TinyLoaded.make())
    monkeypatch.setattr(
        "adaskip.runs.loaded.sample_rows", lambda task, tokenizer, n, **_: tiny_rows(task, n)
    )


def options(folder: Path, *more: str) -> list[str]:
    given = ["--model", "smollm2", "--context", "24", "--rows", "3", "--tasks", "sample_qa"]
    return [*given, "--out", str(folder), *more]


def test_plans_are_made_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = options(tmp_path / "plans", "--method", "SLEB", "LLMDROP", "--acceleration", "1.05")
    assert plan_main(given) == 0
    out = capsys.readouterr().out
    assert "\n| SLEB-1.05 " in out
    assert "\n| LLMDROP-1.05 " in out
    path = tmp_path / "plans" / "SLEB-1.05.safetensors"
    assert f"adaskip chat --model smollm2 --plan {path}\n" in out
    assert f"In experiments: --policy PLAN --plan {path}\n" in out
    plan = SkipPlan.load(tmp_path / "plans" / "SLEB-1.05.safetensors")
    about: Any = plan.about
    assert (about["method"], about["context"], about["batch"]) == ("SLEB", 24, 1)
    rows = "3 warm-up rows of sample_qa, 96 tokens of each answer, seed 2025"
    assert about["calibration"] == rows
    file = PlanFile.read(str(tmp_path / "plans" / "SLEB-1.05.safetensors"))
    assert (file.plan, file.name[:10]) == (plan, "SLEB-1.05-")
    # The second call loads nothing, and shows the same.
    monkeypatch.setattr(LoadedModel, "open", None)
    assert plan_main(given) == 0
    shown = capsys.readouterr().out
    assert [line for line in shown.splitlines() if line.startswith("| SLEB")] == [
        line for line in out.splitlines() if line.startswith("| SLEB")
    ]


def test_a_search_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = options(tmp_path, "--replacements", "gain", "--acceleration", "1.1", "--measure")
    compute, counts = Losses.loss, [0, 5]

    def counted(self: Losses, *args: Any, **kwargs: Any) -> float:
        if counts[0] == counts[1]:
            raise KeyboardInterrupt
        counts[0] += 1
        return compute(self, *args, **kwargs)

    monkeypatch.setattr(Losses, "loss", counted)
    assert plan_main(given) == 130
    [record] = tmp_path.glob("record-*.jsonl")
    counts[:] = [0, 10**9]
    assert plan_main(given) == 0
    assert len([line for line in record.read_text().splitlines() if '"loss"' in line]) > 5
    # Three more are not in the record: before and after learning anew, and of the plan.
    assert counts[0] == record.read_text().count('"loss"') - 5 + 3
    plan = SkipPlan.load(tmp_path / "SEARCH-gain-1.1.safetensors")
    assert set(plan.about) >= {"predicted acceleration", "measured acceleration", "loss"}
    assert "gain" in str(plan.about["replacements"])
    assert "| SEARCH-gain-1.1 " in capsys.readouterr().out


def test_ratios_that_are_nearly_the_same_have_files_of_their_own(tmp_path: Path) -> None:
    given = options(tmp_path, "--method", "EE", "--acceleration", "1.05", "1.0500001", "1")
    assert plan_main(given) == 0
    names = {"EE-1.05", "EE-1.0500001", "EE-1"}
    assert {path.stem for path in tmp_path.glob("*.safetensors")} == names


def test_what_fails_does_not_stop_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = options(tmp_path, "--method", "LLMDROP_ATTN", "EE", "--acceleration", "90", "1.05")
    assert plan_main(given) == 1
    out = capsys.readouterr().out
    assert "LLMDROP_ATTN-90: LLMDROP_ATTN does not reach an acceleration of 90.0" in out
    assert "\n| EE-1.05 " in out
    assert sorted(path.name for path in tmp_path.glob("EE*.safetensors")) == ["EE-1.05.safetensors"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--method", "SLEP"], "Unknown method 'SLEP'. Did you mean 'SLEB'"),
        (["--context", "0"], "--context is 0; it must be at least 1"),
        (["--rows", "0"], "--rows is 0"),
        (["--acceleration", "1.2", "nan", "nan"], "An acceleration of nan is none; give a ratio"),
        (["--context", "7500"], "--context is 7500; the longest prompt of smollm2 is 7500"),
        (["--phase", "both"], "invalid choice: 'both'"),
        (["--tasks", "sample_q"], "Did you mean 'sample_qa'"),
        (["--replacements", "widow"], "Unknown replacement 'widow'"),
    ],
)
def test_what_is_refused(
    tmp_path: Path, changes: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan_main(options(tmp_path / "new", *changes)) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.safetensors"))


def test_linear_maps_are_fitted_anew_on_more_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    linear = ["--replacements", "linear", "--rank", "2", "--acceleration", "1.05"]
    plans, losses = {}, {}
    for name, more in {"3": ["--fit_rows", "3"], "5": ["--fit_rows", "5"], "32": []}.items():
        given = options(tmp_path / name, *linear, "--method", "SEARCH", "EE", *more)
        assert plan_main(given) == 0
        out = capsys.readouterr().out
        (losses[name],) = re.findall(r"^\| SEARCH-linear-rank2-1.05 .*$", out, flags=re.M)
        assert re.search(r" \d\.\d{4} before fit \|", losses[name])
        plans[name] = SkipPlan.load(tmp_path / name / "SEARCH-linear-rank2-1.05.safetensors")
        about = plans[name].about
        told = (about["fitted on"], about["fit rows"], about["method"])
        assert told == (f"{name} rows", int(name), "SEARCH")
        assert "loss before fit" in about
        # One without linear maps has nothing to fit.
        other = SkipPlan.load(tmp_path / name / "EE-1.05.safetensors").about
        assert not {"fitted on", "fit rows"} & {*other}
    assert plans["32"].has_linears
    assert [*plans["3"]] == [*plans["5"]] == [*plans["32"]]
    assert len({plan.digest for plan in plans.values()}) == 3
    assert len({plan.about["calibration"] for plan in plans.values()}) == 1
    assert len(set(losses.values())) == 1

    def few(task: str, tokenizer: Any, n: int, **_: Any) -> list[Any]:
        if n > 9:
            raise DataError("has 9 rows; choose at most 9")
        return tiny_rows(task, n)

    # By default as many as there are; what was asked for, or not at all.
    monkeypatch.setattr("adaskip.runs.loaded.sample_rows", few)
    assert plan_main(options(tmp_path / "few", *linear)) == 0
    found = SkipPlan.load(tmp_path / "few" / "SEARCH-linear-rank2-1.05.safetensors").about
    assert (found["fitted on"], found["fit rows"]) == ("8 rows", 32)
    capsys.readouterr()
    assert plan_main(options(tmp_path / "new", *linear, "--fit_rows", "12")) == 2
    assert "choose at most 9" in capsys.readouterr().err
    assert plan_main(options(tmp_path / "3", *linear)) == 2
    assert "was made with another fit rows (3, asked for: 32)" in capsys.readouterr().err
    assert plan_main(options(tmp_path / "new", *linear, "--fit_rows", "2")) == 2
    assert "fewer than the 3 calibration rows" in capsys.readouterr().err


def test_gains_and_maps_are_distilled_when_that_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    linear = ["--replacements", "gain", "linear", "--rank", "2", "--acceleration", "1.05"]
    linear += ["--fit_rows", "6", "--method", "SEARCH", "EE"]
    name = "SEARCH-gain+linear-rank2-1.05.safetensors"
    assert plan_main(options(tmp_path / "fitted", *linear)) == 0
    assert plan_main([*options(tmp_path / "trained", *linear), "--distill", "2"]) == 0
    fitted, trained = (SkipPlan.load(tmp_path / run / name) for run in ("fitted", "trained"))
    told = (trained.about["distilled on"], trained.about["distilled epochs"])
    assert told == ("6 rows", 2)
    assert not [*tmp_path.rglob("*.distilling")]
    assert trained.about["divergence"] < trained.about["divergence before distilling"]
    assert [*trained] == [*fitted]
    assert trained.digest != fitted.digest
    assert trained.about["predicted acceleration"] == fitted.about["predicted acceleration"]
    # One that has nothing to train stays as it is, and serves both.
    other = SkipPlan.load(tmp_path / "trained" / "EE-1.05.safetensors")
    assert "distilled on" not in other.about
    assert other.digest == SkipPlan.load(tmp_path / "fitted" / "EE-1.05.safetensors").digest
    capsys.readouterr()
    for asked, message in (
        ([*options(tmp_path / "trained", *linear)], "distilled epochs (2, asked for: None)"),
        ([*options(tmp_path / "fitted", *linear), "--distill", "1"], "(None, asked for: 1)"),
        (
            [*options(tmp_path / "trained", *linear), "--distill", "2", "--fit_rows", "5"],
            "another fit rows (6, asked for: 5)",
        ),
        ([*options(tmp_path / "new", *linear), "--distill", "-1"], "--distill is -1; give 0"),
        (
            [*options(tmp_path / "new"), "--rows", "1", "--fit_rows", "1", "--distill", "2"],
            "--distill takes at least 2 rows or texts, as one is held out to judge by; there is 1",
        ),
    ):
        assert plan_main(asked) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["--method", "EE", "--kv_share", "0.5"], "--kv_share is of SEARCH, none of which"),
        (["--method", "EE", "NBL", "--rank", "3"], "--rank is of SEARCH"),
        (["--method", "EE", "--windows", "8"], "--windows is of SEARCH"),
        (["--method", "EE", "--replacements", "gain"], "--replacements is of SEARCH"),
        (["--exact"], "--exact is of BLOCKPRUNER and SLEB, none of which is asked for"),
        (
            ["--method", "SLEB", "--distill", "2"],
            "--distill is of ADA and NBL and",
        ),
        (
            ["--replacements", "window", "--distill", "2"],
            "--distill is of ADA and NBL and PRUNECOMP, ",
        ),
        (["--method", "SLEB", "ADA", "--fit_rows", "64"], "--fit_rows is of NBL and SEARCH, none"),
        (["--replacements", "gain", "--fit_rows", "64"], "--fit_rows is of NBL, none of which"),
        (
            ["--method", "EE", "--fit_rows", "64", "--distill", "2"],
            "--distill is of ADA and NBL and PRUNECOMP and SEARCH, none of which",
        ),
    ],
)
def test_what_no_method_takes_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], asked: list[str], message: str
) -> None:
    assert plan_main(options(tmp_path / "new", *asked)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_full_disk_is_one_sentence_and_stops_no_other_method(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = SkipPlan.save

    def full(plan: SkipPlan, path: Path, **given: Any) -> None:
        if path.stem.startswith("EE"):
            raise OSError(errno.ENOSPC, "No space left on device")
        stock(plan, path, **given)

    monkeypatch.setattr(SkipPlan, "save", full)
    given = options(tmp_path, "--method", "EE", "US", "--acceleration", "1.05")
    assert plan_main(given) == 1
    said = capsys.readouterr().out
    assert "EE-1.05: Cannot write" in said
    assert "the disk is full; free some space" in said
    assert [path.stem for path in tmp_path.glob("*.safetensors")] == ["US-1.05"]


def test_rows_that_are_scored_too_are_told_of(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "adaskip.runs.data.load_rows", lambda task, limit, **_: tiny_rows(task, limit)
    )
    given = options(tmp_path, "--method", "EE", "--acceleration", "1.05")
    given += ["--tasks", "trec", "qasper"]
    assert plan_main(given) == 0
    assert "trec qasper has no split: what is calibrated with are the first" in caplog.text
    path = str(tmp_path / "EE-1.05.safetensors")
    for more, message in (
        (["--min_length", "9"], "another min length (4000, asked for: 9)"),
        (["--data_dir", "d"], "another data dir (data, asked for: d)"),
    ):
        assert plan_main([*given, *more]) == 2
        assert message in capsys.readouterr().err
    # Plans of earlier versions do not tell, and stay.
    plan = SkipPlan.load(path)
    late = ("dtype", "device", "min length", "data dir")
    about = {key: value for key, value in plan.about.items() if key not in late}
    SkipPlan(plan, fingerprint=plan.fingerprint, about=about).save(path)
    assert plan_main([*given, "--min_length", "9", "--dtype", "bfloat16"]) == 0
    for task, scored in (("qasper", True), ("samsum", False)):
        caplog.clear()
        given: Any = {"policy": "PLAN", "plan": path, "tasks": (task,)}
        given |= {"experiment": "e2e", "model_name": "smollm2", "skip_sub_layer_num": 2}
        config = resolve(RunConfig.from_dict(given))
        TinyLoaded.make().policy(config, task)
        expected = f"was calibrated with the 3 first rows of trec qasper, .* what {task} scores"
        assert bool(re.search(expected, caplog.text)) == scored


def test_a_plan_made_otherwise_is_not_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = options(tmp_path, "--method", "SLEB", "--acceleration", "1.05")
    assert plan_main(given) == 0
    before = (tmp_path / "SLEB-1.05.safetensors").read_bytes()
    assert plan_main([*given, "--rows", "2"]) == 2
    assert "was made with another calibration" in capsys.readouterr().err
    assert plan_main([*given, "--reference_tokens", "8"]) == 2
    assert "was made with another calibration" in capsys.readouterr().err
    assert plan_main(["--model", "qwen", *given[2:]]) == 2
    assert "was made with another model (smollm2, asked for: qwen)" in capsys.readouterr().err
    assert plan_main([*given, "--exact"]) == 2
    assert "was made with another exact" in capsys.readouterr().err
    assert plan_main([*given, "--dtype", "bfloat16"]) == 2
    assert "was made with another dtype (float32, asked for: bfloat16)" in capsys.readouterr().err
    assert (tmp_path / "SLEB-1.05.safetensors").read_bytes() == before


def test_a_kept_plan_is_measured_when_that_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = options(tmp_path, "--method", "EE", "--acceleration", "1.05", "1.05")
    path = tmp_path / "EE-1.05.safetensors"
    assert plan_main(given) == 0
    assert "measured acceleration" not in SkipPlan.load(path).about
    assert plan_main([*given, "--measure"]) == 0
    plan = SkipPlan.load(path)
    assert "measured acceleration" in plan.about
    assert plan.about["method"] == "EE"
    before = path.read_bytes()
    assert plan_main([*given, "--measure"]) == 0
    assert path.read_bytes() == before


def test_texts_of_the_users_calibrate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "a.txt"
    text.write_text("abcdefghij" * 5)
    asked = ["--model", "smollm2", "--method", "EE", "--acceleration", "1.05", "--context", "24"]
    asked += ["--reference_tokens", "8", "--out", str(tmp_path / "plans"), "--texts", str(text)]
    assert plan_main(asked) == 0
    about: Any = SkipPlan.load(tmp_path / "plans" / "EE-1.05.safetensors").about
    assert about["calibration"].startswith("1 texts (")
    # Another text under the same name is another plan.
    text.write_text("bcdefghija" * 5)
    assert plan_main(asked) == 2
    text.write_text("abcdefghijabcde")
    assert plan_main([*asked, "--out", str(tmp_path / "short")]) == 2
    assert (
        f"The text {text} has 15 tokens; with 8 of them as the answer, 16 are"
        in capsys.readouterr().err
    )
    for more, message in (
        (["--rows", "2"], "leave --rows out"),
        (
            ["--fit_rows", "9", "--tasks", "sample_qa", "--method", "NBL"],
            "leave --fit_rows, --tasks out",
        ),
        (
            ["--seed", "9", "--data_dir", "d", "--min_length", "9"],
            "leave --data_dir, --min_length, --seed out",
        ),
        (["--texts", str(text), str(text)], "named twice"),
        (["--texts", str(tmp_path / "none.txt")], "cannot be read"),
    ):
        assert plan_main([*asked, *more]) == 2
        assert message in capsys.readouterr().err


def test_a_text_is_a_prompt_and_how_it_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = character_tokenizer()
    ids = tokenizer("abcdefghijklmnop").input_ids
    rows = text_rows(tokenizer, {"long": "abcdefghijklmnop", "short": "abcdefgh"}, 10, 4)
    assert rows == [(ids[:10], ids[10:14]), (ids[:4], ids[4:8])]
    assert "1 of 2 texts are shorter than --context 10, down to 4 tokens" in caplog.text
    caplog.clear()
    assert text_rows(tokenizer, {"long": "abcdefghijklmnop"}, 2, 4) == [(ids[:2], ids[2:6])]
    assert not caplog.text


def test_plans_are_explored_when_made_and_later(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Measured ones would let the number of steps depend on the machine.
    times = PlanTimes(SublayerTimes(10.0, dict.fromkeys(all_sublayers(4), 1.0), Phase.PREFILL, 24))
    monkeypatch.setattr("adaskip.search.journal.measured_plan_times", lambda *_, **__: times)
    made, later = tmp_path / "made.html", tmp_path / "later.html"
    given = options(tmp_path / "plans", "--method", "SLEB", "LLMDROP", "--acceleration", "1.3")
    assert plan_main([*given, "--html", str(made)]) == 0
    assert f"To explore them: {made}" in capsys.readouterr().out
    files = [str(tmp_path / "plans" / f"{name}-1.3.safetensors") for name in ("SLEB", "LLMDROP")]
    assert plan_main(["--show", *files, "--html", str(later)]) == 0
    assert f"\n| {files[1]} " in capsys.readouterr().out
    page = later.read_text()
    for file in files:
        page = page.replace(json.dumps(file), json.dumps(Path(file).stem))
    assert page == made.read_text()
    found = re.search(r'id="data">(.*?)</script>', made.read_text())
    assert found is not None
    sleb, drop = json.loads(found[1])
    for told in (sleb, drop):
        stops = told["stops"]
        assert told["layers"] == 4
        # Ever larger, each with its loss, the last one being the plan.
        assert [stop["speedup"] for stop in stops] == sorted(stop["speedup"] for stop in stops)
        assert all(stop["loss"] is not None for stop in stops)
        assert stops[-1]["speedup"] >= 1.3
    assert len(drop["stops"]) > 1
    assert all(drop["sensitivity"]["attn"][layer] is None for layer in range(4))
    assert [name for name, _ in sleb["sensitivity"]["ffn"]] == ["nothing, nor of its layer"] * 4
    # Shipped plans of two models may be called alike.
    assert plan_main(["--show", "smollm2/1.2@1000", "gemma3/1.2@1000"]) == 0
    assert "| gemma3/1.2@1000 " in capsys.readouterr().out
    assert plan_main(["--show", *files, "--acceleration", "1.4", "--exact"]) == 2
    assert "makes none; leave --acceleration, --exact out" in capsys.readouterr().err
