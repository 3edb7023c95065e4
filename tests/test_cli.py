"""The command lines as a user calls them: options, exit codes, one clear sentence."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from run_fixtures import Workplace, raw_row, rows_of, save_checkpoint, save_data

from adaskip import GrowingCache
from adaskip.cli.perplexity import perplexity_main
from adaskip.cli.run import eval_main, run_main, scoring_command
from adaskip.errors import DataError
from adaskip.plan import Phase, all_sublayers
from adaskip.policies import POLICIES
from adaskip.runs.runconfig import RunConfig
from adaskip.sublayer_times import SublayerTimes
from adaskip.tasks.spec import task_names

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(
    path for folder in ("prefill", "decode", "e2e") for path in (ROOT / folder).glob("run_*.py")
)
EE = ("--policy", "EE", "--skip_full_layer_num", "1")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture
def place(checkpoint: Path, tmp_path: Path) -> Workplace:
    return Workplace(checkpoint, save_data(tmp_path / "data"), tmp_path / "results")


def test_there_is_one_thin_script_per_experiment_and_model() -> None:
    assert len(SCRIPTS) == 18
    texts = set()
    for path in [*SCRIPTS, ROOT / "eval/eval.py"]:
        text = path.read_text()
        assert len(text.splitlines()) < 25
        if path in SCRIPTS:
            experiment, model = path.parent.name, path.stem.removeprefix("run_")
            assert f'run_main("{experiment}", "{model}")' in text
            texts.add(text.replace(experiment, "EXPERIMENT").replace(model, "MODEL"))
    assert len(texts) == 1


def test_a_script_runs_from_anywhere_without_installation(place: Workplace, tmp_path: Path) -> None:
    script = str(ROOT / "prefill/run_llama.py")
    # Without the path by which an editable installation is found.
    code = (
        "import runpy, sys\n"
        f"sys.path[:] = [path for path in sys.path if path not in ('', {str(ROOT)!r})]\n"
        f"sys.argv[0] = {script!r}\n"
        f"runpy.run_path({script!r}, run_name='__main__')"
    )
    command = [sys.executable, "-c", code, *EE, *place.options, "--tasks", "trec"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "python eval/eval.py --name llama-EE-PREFILL" in done.stdout
    assert len(rows_of(place.results / "llama-EE-PREFILL-SKIP-1", "trec")) == 3


def test_a_run_and_its_evaluation(place: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    for policy in (EE, ("--policy", "dense"), ("--policy", "ADA", "--skip_sub_layer_num", "2")):
        options = [*policy, *place.options, "--tasks", "multifieldqa_en", "--limit", "2"]
        assert run_main("prefill", "llama", options) == 0
    for name in ("llama-EE-PREFILL", "llama-ADA-PREFILL", "llama-dense-PREFILL"):
        capsys.readouterr()
        assert eval_main(["--model", name, "--results_dir", str(place.results)]) == 0
        out = capsys.readouterr().out
        assert "multifieldqa_en" in out
        assert eval_main(["--name", name, "--results_dir", str(place.results)]) == 0
        assert capsys.readouterr().out == out
    result = place.results / "llama-ADA-PREFILL-SKIP-2/result.json"
    assert json.loads(result.read_text())["tasks"]["multifieldqa_en"]["n_rows"] == 2


def damaged_data(place: Workplace) -> list[str]:
    path = place.data / "trec_e.jsonl"
    path.write_bytes(path.read_bytes()[:-30])
    return ["--tasks", "trec"]


def short_rows(place: Workplace) -> list[str]:
    text = json.dumps(raw_row(0, length=4000)) + "\n"
    (place.data / "trec_e.jsonl").write_text(text)
    return ["--tasks", "trec"]


def damaged_profile(place: Workplace) -> list[str]:
    path = place.data / "profile.json"
    path.write_text("{")
    return ["--policy", "ADA", "--skip_sub_layer_num", "2", "--importance", str(path)]


def other_architecture(place: Workplace) -> list[str]:
    folder = place.data / "bloom"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "bloom"}')
    return ["--model_path", str(folder)]


def internlm(place: Workplace) -> list[str]:
    folder = save_checkpoint(place.data / "internlm")
    config = json.loads((folder / "config.json").read_text())
    config |= {"max_position_embeddings": 64}
    config["rope_parameters"] = {"rope_type": "dynamic", "factor": 1.0, "rope_theta": 10000.0}
    (folder / "config.json").write_text(json.dumps(config))
    return ["--model_path", str(folder)]


def no_hub(*_: object) -> None:
    raise DataError("the hub cannot be reached")


BAD: dict[str, tuple[Any, str]] = {
    "budget negative": (
        ["--skip_full_layer_num", "-1"],
        "cannot skip -1 full layers; it",
    ),
    "budget too large": (
        ["--skip_full_layer_num", "5"],
        "cannot skip 5 full layers; it",
    ),
    "budget missing": (["--policy", "ADA"], "does not belong to policy ADA: use --skip_sub"),
    "budget no number": (["--skip_full_layer_num", "x"], "invalid int value: 'x'"),
    "two budgets": (["--skip_sub_layer_num", "2"], "does not belong to policy EE"),
    "dense budget": (["--policy", "dense"], "does not belong to policy dense: leave it out"),
    "policy": (["--policy", "ADAA"], "Unknown policy 'ADAA'. Did you mean 'ADA'?"),
    "task": (["--tasks", "terc"], "Unknown task 'terc'. Did you mean 'trec'?"),
    "model": (["--model_path", "lama"], "Unknown model 'lama'. Did you mean 'llama'?"),
    "model folder": (["--model_path", "./nowhere"], "There is no folder './nowhere'"),
    "architecture": (other_architecture, "Architecture 'bloom' is not supported"),
    "dtype": (["--dtype", "float31"], "Unknown dtype 'float31'. Did you mean"),
    "device": (["--device", "warp"], "Unknown device 'warp'"),
    "gain": (
        ["--policy", "ADA", "--skip_sub_layer_num", "2", "--gain", "nrom"],
        "Unknown gain 'nrom'. Did you mean 'norm'?",
    ),
    "gain of EE": (["--gain", "token"], "'gain' does not apply to EE; policies that take it: ADA"),
    "extension of EE": (["--no-online"], "'online' does not apply to EE; policies that"),
    "profile of EE": (["--importance", "no.json"], "'importance' does not apply to EE;"),
    "gain of dense": (["--policy", "dense", "--gain", "norm"], "'gain' does not apply to dense"),
    "acceleration": (["--acceleration", "0.5"], "An acceleration of 0.5 is none; give a ratio"),
    "acceleration nan": (["--acceleration", "nan"], "An acceleration of nan is none"),
    "acceleration infinite": (["--acceleration", "inf"], "An acceleration of inf is none"),
    "acceleration no number": (["--acceleration", "fast"], "invalid float value: 'fast'"),
    "limit": (["--limit", "0"], "--limit is 0; it must be at least 1"),
    "name": (["--name", "../up"], "'../up' cannot name a file"),
    "option": (["--skip_layers", "1"], "unrecognized arguments: --skip_layers 1"),
    "no data": (["--data_dir", "nowhere"], "No trec_e.jsonl or trec.jsonl in nowhere"),
    "damaged data": (damaged_data, "trec_e.jsonl line 3 is not JSON"),
    "no rows": (short_rows, "none longer than 4000 words"),
    "profile": (damaged_profile, "profile.json cannot be read"),
    "no profile": (
        ["--policy", "ADA", "--skip_full_layer_num", "1", "--importance", "no.json"],
        "does not belong",
    ),
    "prompt too long": (internlm, "exact only up to 64 tokens"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_writes_no_row(
    place: Workplace,
    case: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("adaskip.tasks.longbench._load_hub", no_hub)
    given, expected = BAD[case]
    options = given(place) if callable(given) else given
    base = () if case in ("profile", "gain") else EE
    code = run_main("prefill", "llama", [*base, *place.options, "--tasks", "trec", *options])
    captured = capsys.readouterr()
    assert code == 2
    lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert expected in lines[0]
    assert "Traceback" not in captured.err
    assert not list(place.results.rglob("*.jsonl"))
    if case != "prompt too long":
        assert not place.results.exists()


SAMPLE = ("--tasks", "sample_qa")
MADE_OF_FILES = ("--warmup_task", "qasper", "--min_length", "0")
LEARNING = ("--policy", "ADA", "--skip_sub_layer_num", "2")
UNUSED: dict[str, tuple[tuple[str, ...], str | None]] = {
    "files of a sample": (
        (*EE, *SAMPLE, "--min_length", "0", "--no-longbench_e"),
        "--longbench_e, --min_length: without effect; no task has LongBench's files.",
    ),
    "files of a warm-up": ((*LEARNING, *SAMPLE, *MADE_OF_FILES), None),
    "length of files": (
        (*EE, "--tasks", "trec", "--sample_tokens", "500"),
        "--sample_tokens: without effect; no task is made offline.",
    ),
    "length of a warm-up": (
        (*LEARNING, "--tasks", "trec", "--warmup_task", "sample_qa", "--sample_tokens", "500"),
        None,
    ),
    "warm-up of files": (
        (*LEARNING, *SAMPLE, *MADE_OF_FILES, "--warmup_tokens", "500"),
        "--warmup_tokens: without effect; the length of qasper cannot be chosen.",
    ),
    "nothing to learn": (
        (*EE, *SAMPLE, "--warmup", "3"),
        "--warmup: without effect; with EE nothing is learned from prompts.",
    ),
    "learned before": (
        (*LEARNING, *SAMPLE, "--importance", "kept.json", "--warmup", "3"),
        "--warmup: without effect; with --importance nothing is learned from prompts.",
    ),
    "all used": ((*LEARNING, *SAMPLE, "--warmup", "3", "--warmup_tokens", "500"), None),
    "a default": ((*EE, *SAMPLE, "--min_length", "4000"), None),
}


@pytest.mark.parametrize("case", UNUSED)
def test_an_option_without_effect_is_told(
    case: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("adaskip.runs.runner.run", lambda config, loaded: Path("folder"))
    options, sentence = UNUSED[case]
    assert run_main("prefill", "llama", options) == 0
    assert [record.message for record in caplog.records] == ([sentence] if sentence else [])


def test_help_lists_policies_and_tasks(capsys: pytest.CaptureFixture[str]) -> None:
    for main in (partial(run_main, "prefill", "llama"), perplexity_main):
        with pytest.raises(SystemExit):
            main(["--help"])
        shown = " ".join(capsys.readouterr().out.split())
        assert ", ".join(POLICIES) in shown
        assert ", ".join(task_names()) in shown
        assert "in sublayers, of ADA" in shown


def test_the_command_that_scores_a_run_finds_it(
    place: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    place.results = place.results.with_name("my results")
    options = [*EE, *place.options, "--tasks", "trec", "--limit", "1"]
    assert run_main("prefill", "llama", options) == 0
    command = shlex.split(capsys.readouterr().out.partition("score it: ")[2])
    assert command[:2] == ["python", "eval/eval.py"]
    assert eval_main(command[2:]) == 0
    # Where runs lie unless told otherwise, the name is enough.
    config = RunConfig(experiment="prefill", model_name="llama", policy="EE")
    assert scoring_command(config) == "python eval/eval.py --name llama-EE-PREFILL"
    # Rows that the run was asked for count.
    shorter = scoring_command(replace(config, min_length=0))
    assert shorter == "python eval/eval.py --name llama-EE-PREFILL --min_length 0"


def test_a_row_with_only_an_id_is_damaged_to_the_run_and_to_eval(
    place: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*EE, *place.options, "--tasks", "trec"]
    assert run_main("prefill", "llama", options) == 0
    path = place.results / "llama-EE-PREFILL-SKIP-1/trec.jsonl"
    whole = path.read_text().splitlines(keepends=True)
    path.write_text(whole[0] + '{"id": "row1"}\n' + whole[2])
    capsys.readouterr()
    expected = "line 2 is damaged ('prediction' is missing); delete it and run again"
    assert run_main("prefill", "llama", options) == 2
    assert expected in capsys.readouterr().err
    assert eval_main(["--model", "llama-EE-PREFILL", "--results_dir", str(place.results)]) == 2
    assert expected in capsys.readouterr().err
    path.write_text(whole[0] + whole[2])
    assert run_main("prefill", "llama", options) == 0
    assert [row["id"] for row in rows_of(path.parent, "trec")] == ["row0", "row1", "row2"]


def test_chinese_in_a_locale_without_it(place: Workplace) -> None:
    row = raw_row(0, context="数字是数字。" * 20, input="数字是什么？", answers=["数字"])
    (place.data / "multifieldqa_zh.jsonl").write_text(
        json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    ascii_only = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    made = [*EE, *place.options, "--tasks", "multifieldqa_zh"]
    scored = ["--model", "llama-EE-PREFILL", "--results_dir", str(place.results)]
    code = (
        "from adaskip.cli.run import eval_main, run_main\n"
        f"assert run_main('prefill', 'llama', {made!r}) == eval_main({scored!r}) == 0"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=ascii_only, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "| ? |" in " ".join(done.stdout.split())  # the dash of a missing number
    (row,) = rows_of(place.results / "llama-EE-PREFILL-SKIP-1", "multifieldqa_zh")
    assert row["references"] == ["数字"]


def test_ada_needs_its_budget(place: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main("e2e", "llama", ["--policy", "ADA", *place.options]) == 2
    assert "Policy ADA needs its budget: --skip_sub_layer_num N" in capsys.readouterr().err


def test_an_unknown_run_cannot_be_scored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert eval_main(["--model", "llama-EE-PREFILL", "--results_dir", str(tmp_path)]) == 2
    assert "No run 'llama-EE-PREFILL'" in capsys.readouterr().err
    assert eval_main([]) == 2
    assert "error: the following arguments are required: --name/--model" in capsys.readouterr().err


def start(place: Workplace) -> subprocess.Popen[str]:
    """Starts a run of many rows and waits for the first of them."""
    save_data(place.data, 600)
    options = [*EE, *place.options, "--tasks", "trec"]
    # Programs that a shell starts in the background ignore Ctrl-C, and so do their children.
    code = (
        "import signal, sys\nfrom adaskip.cli.run import run_main\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "sys.exit(run_main('prefill', 'llama'))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    path = place.results / "llama-EE-PREFILL-SKIP-1/trec.jsonl"
    deadline = time.monotonic() + 60
    while not path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    return process


def test_ctrl_c_ends_cleanly_and_a_second_process_is_refused(
    place: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    process = start(place)
    try:
        options = [*EE, *place.options, "--tasks", "trec"]
        assert run_main("prefill", "llama", options) == 2
        assert "Another process is working on" in capsys.readouterr().err
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "interrupted: what is finished is kept" in stderr
    assert "Traceback" not in stderr
    rows = rows_of(place.results / "llama-EE-PREFILL-SKIP-1", "trec")
    assert 0 < len(rows) < 200


def test_an_acceleration_becomes_a_number_of_sublayers(
    place: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def times(model: Any, phase: Phase, context: int, batch: int, make_cache: Any) -> SublayerTimes:
        assert (phase, context, batch) == (Phase.DECODE, 64, 1)
        assert isinstance(make_cache(model), GrowingCache)  # what answers are generated with
        n_layers = model.config.num_hidden_layers
        seconds = dict.fromkeys(all_sublayers(n_layers), 10 / (2 * n_layers))
        return SublayerTimes(10.0, seconds, phase, context)

    monkeypatch.setattr("adaskip.runs.runner.measured_times", times)
    save_data(place.data, 2)
    options = [*place.options, "--tasks", "trec", "--max_length", "64"]
    ada = ["--policy", "ADA"]
    # Each of 2L sublayers takes 1 / 2L of the time: half of them halve it.
    assert run_main("decode", "llama", [*options, *ada, "--acceleration", "2"]) == 0
    n_skip = json.loads((place.checkpoint / "config.json").read_text())["num_hidden_layers"]
    assert (place.results / f"llama-ADA-DECODE-SKIP-{n_skip}" / "trec.jsonl").is_file()
    for wrong in ([*ada, "--skip_sub_layer_num", "3"], ["--policy", "EE"]):
        assert run_main("decode", "llama", [*options, "--acceleration", "1.3", *wrong]) == 2
        assert "in place of --skip_sub_layer_num" in capsys.readouterr().err
