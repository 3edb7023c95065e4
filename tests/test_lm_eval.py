"""lm-evaluation-harness inside a block: in an environment of its own (make lm-eval).

The tasks are files made here, as are their rows: nothing is fetched.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from run_fixtures import N_LAYERS, save_checkpoint
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adaskip import SkipPlan, Sublayer, load_model, load_tokenizer, skipping
from adaskip.plan import Phase

# Elsewhere its wheel is there for its prompts alone, without what it imports.
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("sacrebleu") is None or importlib.util.find_spec("lm_eval") is None,
    reason="lm-eval is not installed with what it imports",
)

N_ROWS = 6
HARSH = SkipPlan({Sublayer(i, "ffn"): None for i in range(N_LAYERS)} | {Sublayer(2, "attn"): 1.5})
TASKS: dict[str, dict[str, Any]] = {
    "local_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "local_generation": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[label]}}",
        "generation_kwargs": {"until": ["\n\n"], "do_sample": False, "max_gen_toks": 12},
        "metric_list": [{"metric": "exact_match"}],
    },
}


Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]
# The harness's results, and by task what the model answered to each row.
Found = tuple[dict[str, Any], dict[str, list[Any]]]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = str(save_checkpoint(tmp_path_factory.mktemp("model")))
    return load_model(folder, device="cpu"), load_tokenizer(folder)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of task files, with their rows."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {
            "question": f"Which of these is number {number}?",
            "choices": ["one", f"it is {number}", "something else"],
            "label": number % 3,
        }
        for number in range(N_ROWS)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"data_files": {"test": str(folder / "rows.jsonl")}}
    data = {"dataset_path": "json", "test_split": "test", "dataset_kwargs": files}
    for name, facts in TASKS.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **data, **facts}))
    return folder


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Rows are cached in a folder of the test, and the hub is not asked."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        patched.setenv("HF_HUB_OFFLINE", "1")
        yield


def evaluated(loaded: Loaded, folder: Path) -> Found:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model, tokenizer = loaded
    found = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2),
        tasks=[*TASKS],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
    )
    answers = {name: [row["resps"] for row in rows] for name, rows in found["samples"].items()}
    return found["results"], answers


@pytest.fixture(scope="module")
def dense(loaded: Loaded, tasks: Path) -> Found:
    return evaluated(loaded, tasks)


def test_an_empty_plan_gives_the_numbers_of_the_dense_model(
    loaded: Loaded, tasks: Path, dense: Found
) -> None:
    with skipping(loaded[0], SkipPlan({})) as session:
        found = evaluated(loaded, tasks)
    assert found == dense
    assert set(found[0]) == set(TASKS)
    assert all(len(rows) == N_ROWS for rows in found[1].values())
    assert set(session.summary().phases) == {Phase.PREFILL, Phase.DECODE}


def test_a_harsh_plan_changes_every_likelihood_and_what_is_generated(
    loaded: Loaded, tasks: Path, dense: Found
) -> None:
    with skipping(loaded[0], HARSH) as session:
        _, answers = evaluated(loaded, tasks)
    for phase in session.summary().phases.values():
        assert phase.skipped == {"attn": 1, "ffn": N_LAYERS}
    for name in TASKS:
        pairs = zip(answers[name], dense[1][name], strict=True)
        assert all(own != other for own, other in pairs)
    assert evaluated(loaded, tasks) == dense


def test_likelihoods_are_prefill(loaded: Loaded, tasks: Path, dense: Found) -> None:
    """The prompt and a choice are one forward: plans of decode steps leave it alone."""
    with skipping(loaded[0], HARSH, scope="decode"):
        _, answers = evaluated(loaded, tasks)
    assert answers["local_choice"] == dense[1]["local_choice"]
    assert answers["local_generation"] != dense[1]["local_generation"]
