"""Exported checkpoints in llama.cpp or vLLM: how near to the plan, how large, how fast."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, ClassVar, get_args

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import override

from adaskip.entering import skipping
from adaskip.errors import AdaskipError, refuse_below_one, unknown_name
from adaskip.export import comparing, engines, gguf_file, llamacpp
from adaskip.export.engines import Engine, Settings
from adaskip.export.exporting import export_checkpoint
from adaskip.export.report import ExportReport
from adaskip.importance import Importance, shipped_profiles
from adaskip.learning import learn_importance
from adaskip.models.loading import load_tokenizer
from adaskip.plan import EMPTY_PLAN, Phase, SkipPlan
from adaskip.policies import AdaSkip
from adaskip.policies.made_plan import read_plans
from adaskip.profiling.calibration import random_prompt
from adaskip.profiling.interleaving import Ratio, Spread, by_turns, per_round
from adaskip.speedtest.measurement import Row, Seconds, Study, option
from adaskip.speedtest.record import Key, Point

DENSE = "dense"
# Of the KV cache, as a table tells it.
KV_CONTEXT = 4096
_WARMUP_TOKENS = 1024
_N_NEW, _N_PROBS = 64, 20
ENGINES: tuple[engines.Name, ...] = get_args(engines.Name)


@dataclass(frozen=True)
class Served:
    """A plan's checkpoint.

    Attributes:
        plan: what it leaves out.
        report: what was written.
    """

    plan: SkipPlan
    report: ExportReport

    @property
    def path(self) -> Path:
        """What an engine loads: the GGUF file, or the folder."""
        folder = Path(self.report.folder)
        return folder / gguf_file.NAME if self.report.format == "gguf" else folder


@dataclass(frozen=True, kw_only=True)
class Serving(Study):
    """Dense, AdaSkip and given plans, exported and served by an engine, round by round."""

    kind: ClassVar[str] = "serving"
    title: ClassVar[str] = "Exported checkpoints, served"
    free: ClassVar[frozenset[str]] = Study.free | {"python"}

    # Texts are compared, so that random weights would tell nothing.
    real: bool = field(default=True)
    engine: str = option("llama.cpp", f"one of: {', '.join(ENGINES)}")
    python: str = option("", "python of the environment with the engine (default: this one)")
    dtype: str = option("f16", "of the weights; vLLM computes in float32")
    threads: int = option(1, "threads of the engine")
    budgets: tuple[int, ...] = option((8, 16), "AdaSkip's, in sublayers")
    plans: tuple[str, ...] = option((), "plan files besides")
    new_tokens: int = option(64, "decode steps per request")
    results_dir: str = option("results/export", "folder of the records")

    @override
    def check(self) -> None:
        super().check()
        refuse_below_one({"threads": self.threads, "budgets": min(self.budgets, default=None)})
        if self.engine not in ENGINES:
            raise unknown_name("engine", self.engine, ENGINES)
        read_plans(self.plans, [DENSE, *self._labels])
        if not Path(self._python).is_file():
            raise AdaskipError(f"There is no {self.python}; give the python that has the engine.")

    @override
    def path(self, device: torch.device) -> Path:
        name = self.name or f"{self.engine.replace('.', '').lower()}-{self.model}"
        return Path(self.results_dir) / f"{name}.json"

    @override
    def settings(self, device: torch.device) -> dict[str, Any]:
        # By whichever python: times of two versions are none of one record.
        version = engines.version(self._engine, self._python)
        return super().settings(device) | {"engine_version": version}

    @override
    def points(self, missing: Sequence[Key]) -> Iterator[Point]:
        model, tokenizer = self.open(keep_memory=False), load_tokenizer(self.model)
        with tempfile.TemporaryDirectory() as work:
            served = {
                label: Served(plan, self._export(model, tokenizer, plan, Path(work) / str(number)))
                for number, (label, plan) in enumerate(self._plans(model).items())
            }
            about = {label: self._about(model, tokenizer, case) for label, case in served.items()}
            for key in missing:
                rows = self._measured(model, served, key["context"])
                yield {"rows": [about[row["label"]] | row for row in rows]}

    @property
    def _engine(self) -> engines.Name:
        return next(name for name in ENGINES if name == self.engine)

    @property
    def _python(self) -> str:
        return self.python or sys.executable

    @property
    def _labels(self) -> dict[str, int]:
        """AdaSkip's budgets by the labels of the table."""
        return {f"AdaSkip {n}": n for n in self.budgets}

    def _plans(self, model: PreTrainedModel) -> dict[str, SkipPlan]:
        """By the labels of the table."""
        if self.model in shipped_profiles():
            importance = Importance.load(self.model)
        else:
            prompts = [random_prompt(model, _WARMUP_TOKENS)]
            importance = learn_importance(model, prompts, source="random ids")
        policies = {k: AdaSkip(importance, n_skip=n) for k, n in self._labels.items()}
        found = {DENSE: EMPTY_PLAN}
        for label, policy in policies.items():
            policy.bind(importance.n_layers)
            found[label] = SkipPlan({s: importance.gain(s, policy.gain) for s in policy.chosen()})
        return found | {label: file.plan for label, file in read_plans(self.plans).items()}

    def _export(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        plan: SkipPlan,
        folder: Path,
    ) -> ExportReport:
        if self.engine == "vLLM":
            return export_checkpoint(model, tokenizer, plan, folder, dtype="float32")
        return export_checkpoint(model, tokenizer, plan, folder, format="gguf", dtype=self.dtype)

    def _settings(self, path: Path, context: int) -> Settings:
        return Settings(
            self._engine,
            path,
            context,
            self._python,
            self.threads,
            flash_attention=True,
            exact=False,
        )

    def _about(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, case: Served
    ) -> Row:
        """What a checkpoint is, and how near the engine comes to the plan."""
        equal = total = 0
        largest = 0.0
        kv_tokens = None
        texts = comparing.texts_of(model, tokenizer)
        context = comparing.N_PROMPT + _N_NEW + 8
        with Engine(self._settings(case.path, context)) as engine:
            for ids in texts:
                prompt = ids[: comparing.N_PROMPT]
                with skipping(model, case.plan):
                    tokens, log_probs = comparing.greedy(model, prompt, _N_NEW)
                asked = {"ids": prompt.tolist(), "n_new": _N_NEW, "n_probs": _N_PROBS}
                answer = engine.ask(asked)
                kv_tokens = answer.get("kv_tokens")
                same = _equal(tokens.tolist(), answer["tokens"])
                equal, total = equal + same, total + len(answer["tokens"])
                largest = max(largest, _largest(log_probs[:same], answer["log_probs"]))
        if kv_tokens is None:
            kv = llamacpp.kv_mebibytes(case.path, KV_CONTEXT, self._python)
        else:
            # It was given a gibibyte.
            kv = 1024 / kv_tokens * KV_CONTEXT
        return {
            "bytes": case.report.bytes,
            "kv_mebibytes": kv,
            "attentions": case.report.attentions,
            "ffns": case.report.ffns,
            "greedy_equal": equal,
            "greedy_tokens": total,
            "largest_difference": largest,
        }

    def _measured(
        self, model: PreTrainedModel, served: Mapping[str, Served], context: int
    ) -> list[Row]:
        """Times of each checkpoint, all of them loaded at once."""
        ids = random_prompt(model, context)[0].tolist()
        asked = {"ids": ids, "n_new": self.new_tokens + 1, "ignore_eos": True}
        with ExitStack() as stack:
            kinds = {}
            for label, case in served.items():
                settings = self._settings(case.path, context + self.new_tokens + 8)
                engine = stack.enter_context(Engine(settings))
                kinds[label] = partial(_seconds, engine, asked)
            for warm_up in kinds.values():
                warm_up()
            title = f"{self.engine}, {context} tokens"
            taken = list(by_turns(kinds, rounds=self.rounds, baselines=[DENSE], title=title))
        return [_row(taken, label) for label in served]


def _seconds(engine: Engine, asked: Mapping[str, Any]) -> Seconds:
    answer = engine.ask(asked)
    return answer["prefill"], answer["decode"]


def _row(taken: Sequence[Mapping[str, Sequence[Seconds]]], label: str) -> Row:
    """Times of each phase, and how many times as fast as dense, round by round."""
    row: Row = {"label": label}
    for index, phase in enumerate(Phase):
        own, dense = (per_round(taken, kind, itemgetter(index)) for kind in (label, DENSE))
        row[str(phase)] = asdict(Spread.of(own)) | {"speedup": asdict(Ratio.paired(dense, own))}
    return row


def _equal(expected: Sequence[int], found: Sequence[int]) -> int:
    """How many tokens come before the first one that differs."""
    same = 0
    while same < min(len(expected), len(found)) and expected[same] == found[same]:
        same += 1
    return same


def _largest(expected: torch.Tensor, told: Sequence[Mapping[str, float]]) -> float:
    """The largest difference of the log-probabilities that were told.

    llama.cpp tells none where a token is no whole character, and then later ones are not compared.
    """
    differences = [
        abs(float(row[int(index)]) - value)
        for row, by_id in zip(expected, told, strict=False)
        for index, value in by_id.items()
    ]
    return max(differences, default=0.0)
